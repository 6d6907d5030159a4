"""Why: a secret between programs of one run is made once, by whoever needs it first, and readable by nobody else."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path
from typing import Final

from reelway.platform.durable import sync_folder
from reelway.platform.errors import StorageError

MINIMUM_CHARACTERS: Final = 16


def bearer_token(path: Path) -> str:
    """The token in ``path``, made there (mode 0600) when there is none. Safe between processes.

    Raises:
        StorageError: it cannot be read or written, or holds less than ``MINIMUM_CHARACTERS``.
    """
    try:
        if not path.exists():
            _make(path)
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"cannot read or write the token {path}: {error}") from error
    if len(token) < MINIMUM_CHARACTERS or not token.isascii() or not token.isprintable():
        raise StorageError(
            f"token {path} has {len(token)} characters, expected {MINIMUM_CHARACTERS} or more of printable ASCII; "
            "remove the file to have one made"
        )
    return token


def _make(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # 0600
    try:
        with os.fdopen(fd, "w") as handle:
            handle.write(secrets.token_hex(32) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        Path(aside).chmod(0o600)
        try:
            path.hardlink_to(aside)  # unlike a rename it never replaces another process's token
        except FileExistsError:
            return
        sync_folder(path.parent)
    finally:
        Path(aside).unlink(missing_ok=True)
