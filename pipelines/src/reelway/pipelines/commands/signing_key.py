"""Why: whoever brings no key signs with one of the run's own, which is made once."""

from __future__ import annotations

from pathlib import Path

from reelway.platform.cli.terminal import print_status
from reelway.platform.release.signing import PRIVATE_NAME, create_keys
from reelway.platform.run_directory import RunDirectory


def ensure_signing_key(directory: RunDirectory) -> Path:
    """Path of the run's private key, which is made where there is none."""
    path = directory.keys / PRIVATE_NAME
    if not path.exists():
        pair = create_keys(directory.keys)
        print_status(f"release: made a key of this run's own, {pair.private}; for production sign with --key")
    return path
