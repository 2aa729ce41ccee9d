"""``python -m bratune.profile.whole_model`` of earlier versions; see `bratune.profile.translate`."""

from bratune.profile.translate import main

if __name__ == "__main__":
    raise SystemExit(main("whole_model"))
