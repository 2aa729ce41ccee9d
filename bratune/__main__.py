"""``python -m bratune``: the command line from a checkout with nothing installed."""

from bratune.cli import main

if __name__ == "__main__":
    main()
