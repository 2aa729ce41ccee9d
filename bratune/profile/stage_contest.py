"""``python -m bratune.profile.stage_contest`` of earlier versions; see `bratune.profile.translate`."""

from bratune.profile.translate import main

if __name__ == "__main__":
    raise SystemExit(main("stage_contest"))
