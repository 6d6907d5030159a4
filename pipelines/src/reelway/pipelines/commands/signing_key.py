"""Creates a run's signing key, which signs its releases if no other key is given."""

from __future__ import annotations

from pathlib import Path

from reelway.platform.cli.terminal import print_status
from reelway.platform.release.signing import PRIVATE_NAME, create_keys
from reelway.platform.run_directory import RunDirectory


def ensure_signing_key(directory: RunDirectory) -> Path:
    """Returns the path of the run's private key; the key is created if it does not exist."""
    path = directory.keys / PRIVATE_NAME
    if not path.exists():
        pair = create_keys(directory.keys)
        print_status(f"release: created the run's signing key {pair.private}; in production pass your own with --key")
    return path
