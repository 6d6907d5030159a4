"""``python -m reelway.platform.cli``: the same program as the ``reelway`` script."""

from reelway.platform.cli.main import main

if __name__ == "__main__":
    main()
