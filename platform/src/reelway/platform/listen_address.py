"""Addresses to listen at: all interfaces, for IPv4 and IPv6 alike where the machine has both."""

from __future__ import annotations

import socket
from typing import Final

EVERYWHERE: Final = "*"
"""The host that stands for all interfaces in options and settings."""


def all_interfaces() -> str:
    """Returns the address of all interfaces: IPv6's, whose sockets take IPv4 too, or IPv4's where IPv6 is off."""
    return "::" if socket.has_dualstack_ipv6() else "0.0.0.0"


def resolve_host(host: str) -> str:
    """Returns the address for a host option, which may be ``*``."""
    return all_interfaces() if host == EVERYWHERE else host


def url_host(host: str) -> str:
    """Returns a host as it is written in a URL, an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def create_listener(host: str, port: int) -> socket.socket:
    """Returns a listening TCP socket. At all interfaces (``*`` or ``::``) it takes IPv4 and IPv6.

    Raises:
        OSError: if the address is in use or does not exist.
    """
    address = resolve_host(host)
    is_ipv6 = ":" in address
    return socket.create_server(
        (address, port),
        family=socket.AF_INET6 if is_ipv6 else socket.AF_INET,
        dualstack_ipv6=is_ipv6 and address == "::" and socket.has_dualstack_ipv6(),
    )
