"""Why: a port that is taken should be a message before anything is started, and tests want one that is not."""

from __future__ import annotations

import socket

from reelway.platform.errors import ConfigError


def refuse_taken_port(host: str, port: int) -> int:
    """The port, if it can be listened on.

    Raises:
        ConfigError: it cannot.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host} port {port}: {error.strerror}; stop what uses it, name another --port, or "
                "give --port 0 to have a free one chosen"
            ) from error
    return port


def free_port(host: str) -> int:
    """A port that nobody listens on just now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port
