"""Checks that a port is free before a service is started, and finds free ports."""

from __future__ import annotations

import socket

from reelway.platform.errors import ConfigError


def check_port_free(host: str, port: int) -> int:
    """Returns the port if a process can listen on it.

    Raises:
        ConfigError: if the port cannot be listened on.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"{host} port {port}: cannot listen: {error.strerror}; stop the process that uses it, or pass another "
                "--port (--port 0 chooses a free one)"
            ) from error
    return port


def find_free_port(host: str) -> int:
    """Returns a port that no process listens on at present."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port
