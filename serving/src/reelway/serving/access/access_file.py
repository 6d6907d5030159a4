"""Reads the file of ``reelway serve --auth``."""

from __future__ import annotations

from pathlib import Path

from reelway.platform.errors import ConfigError
from reelway.platform.rollout.traffic.access_options import AccessOptions
from reelway.platform.settings import load_settings
from reelway.serving.access.assertions import read_secrets
from reelway.serving.access.verification_keys import key_reader


def read_access(path: Path | None) -> AccessOptions:
    """Returns the options of a file; the defaults without a file.

    Paths in the file are relative to its folder.

    Raises:
        ConfigError: if the file cannot be read, an option is wrong, or the keys in a file cannot be used. A key set at
            a URL is read when the first request needs it.
    """
    options = load_settings(AccessOptions, path)
    if path is None:
        return options
    folder, updates = path.absolute().parent, {}
    for name in ("jwt", "gateway"):
        group = getattr(options, name)
        if group is not None:
            paths = {key: folder / value for key, value in group if isinstance(value, Path)}
            updates[name] = group.model_copy(update=paths)
    options = options.model_copy(update=updates)
    _check_keys(options)
    return options


def _check_keys(options: AccessOptions) -> None:
    try:
        if options.gateway is not None:
            read_secrets(options.gateway.keys_file)
        if options.jwt is not None and options.jwt.keys_file is not None:
            key_reader(options.jwt)()
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot read the keys: {error.strerror or error}") from error
