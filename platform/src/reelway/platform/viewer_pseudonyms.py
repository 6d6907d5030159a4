"""Pseudonyms of viewers for logs, reports, statuses and metrics, which never show a viewer's id.

A pseudonym is a keyed hash (BLAKE2b, RFC 7693), so nobody without the key can find the id by hashing all ids. The key
is derived from the secret that signs impression tokens: all processes of a service print the same pseudonym for a
viewer. A process without that secret uses a random key of its own. A new secret gives every viewer a new pseudonym.
"""

from __future__ import annotations

import os
import secrets
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Final

from reelway.platform.tokens import SECRET_VARIABLE

SECRET_FILE: Final = "token.secret"
"""File of the token secret in the keys of a run."""
_DOMAIN: Final = b"reelway.viewers"  # separates this key from the one that signs tokens
_DIGEST_BYTES: Final = 6
_key_of_process: list[bytes] = []


def use_secret(secret: bytes) -> None:
    """Derives this process's key from a secret."""
    _key_of_process[:] = [_derived(secret)]


def use_secret_of_run(keys: Path) -> None:
    """Derives this process's key from the run's token secret, unless the environment has one. No file, no change.

    Args:
        keys: folder of the run's keys.
    """
    path = keys / SECRET_FILE
    if SECRET_VARIABLE not in os.environ and path.is_file():
        use_secret(_signing(path.read_text()))


def viewer_pseudonym(viewer_id: int) -> str:
    """Returns the pseudonym, such as ``viewer-3f9c0a1b2c3d``."""
    digest = blake2b(str(int(viewer_id)).encode(), key=_key(), digest_size=_DIGEST_BYTES).hexdigest()
    return f"viewer-{digest}"


def _key() -> bytes:
    if _key_of_process:
        return _key_of_process[0]
    configured = os.environ.get(SECRET_VARIABLE)
    return _derived(_signing(configured)) if configured else _random_key()


def _signing(stored: str) -> bytes:
    """Returns the first of the stored secrets, which signs."""
    return stored.strip().split(",")[0].encode()


@cache
def _derived(secret: bytes) -> bytes:
    return blake2b(secret, person=_DOMAIN, digest_size=32).digest()


@cache
def _random_key() -> bytes:
    return secrets.token_bytes(32)
