"""Reads the secrets that sign impression tokens, from the environment or a file.

The secrets must never appear in arguments, in the Serve config or in logs.
"""

from __future__ import annotations

import os
from pathlib import Path

from reelway.platform.errors import ConfigError
from reelway.platform.tokens import SECRET_VARIABLE


def read_token_secrets(path: Path | None) -> tuple[bytes, ...]:
    """Returns the secrets of the environment variable or, if it is not set, of the file.

    Raises:
        ConfigError: if there is no secret, or the file cannot be read.
    """
    secrets = os.environ.get(SECRET_VARIABLE)
    if secrets is None and path is not None:
        try:
            secrets = path.read_text().strip()
        except OSError as error:
            raise ConfigError(
                f"token secret {path}: cannot be read: {error.strerror or error}; check its permissions"
            ) from error
    if not secrets:
        raise ConfigError(f"no token secret: set {SECRET_VARIABLE}, or configure a file that contains one")
    return tuple(secret.encode() for secret in secrets.split(","))
