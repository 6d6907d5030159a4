"""The bearer token that programs of one run share: created by the program that needs it first, with mode 0600."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from reelway.platform.atomic_files import ensure_private_token
from reelway.platform.errors import StorageError

MINIMUM_CHARACTERS: Final = 16


def ensure_bearer_token(path: Path) -> str:
    """Returns the token in ``path``, which is created if it does not exist. Safe between processes.

    Raises:
        StorageError: if the file cannot be read or written, or holds less than ``MINIMUM_CHARACTERS``.
    """
    ensure_private_token(path)
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"cannot read the token {path}: {error}") from error
    if len(token) < MINIMUM_CHARACTERS or not token.isascii() or not token.isprintable():
        raise StorageError(
            f"token {path}: {len(token)} characters, expected at least {MINIMUM_CHARACTERS} of printable ASCII; "
            "remove the file to have a new one created"
        )
    return token
