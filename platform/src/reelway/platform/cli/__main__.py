"""``python -m reelway.platform.cli``: runs the ``reelway`` command."""

from reelway.platform.cli.main import main

if __name__ == "__main__":
    main()
