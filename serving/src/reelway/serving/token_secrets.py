"""Why: whoever signs or reads tokens needs their secrets, and no argument, document or log may ever hold them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from reelway.platform.errors import ConfigError

SECRET_VARIABLE: Final = "REELWAY_TOKEN_SECRET"
"""The secret of impression tokens; several are separated by commas, the first one signs."""


def read_token_secrets(path: Path | None) -> tuple[bytes, ...]:
    """From the environment, else from the file, as ``TokenSigner`` wants them.

    Raises:
        ConfigError: neither is there.
    """
    given = os.environ.get(SECRET_VARIABLE)
    if given is None and path is not None:
        try:
            given = path.read_text().strip()
        except OSError as error:
            raise ConfigError(f"cannot read the token secret {path}: {error.strerror or error}") from error
    if not given:
        raise ConfigError(f"no token secret: set {SECRET_VARIABLE}, or name a file that holds one")
    return tuple(secret.encode() for secret in given.split(","))
