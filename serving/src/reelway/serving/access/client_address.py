"""The address of a request's client behind HAProxy and a known number of further proxies."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Any, Final

Address = IPv4Address | IPv6Address
UNKNOWN: Final = "unknown"
_IPV6_CLIENT_BITS: Final = 64
"""A client of IPv6 has a whole network of this prefix, so that its single addresses do not identify it."""


def client_address(scope: Any, proxies: int) -> Address | None:
    """Returns the client's address; None if it is not an address.

    Each proxy appends the address that it received the request from to ``X-Forwarded-For``. Only the last ``proxies``
    entries were written by trusted proxies; a client can invent all entries before them.

    Args:
        scope: ASGI scope of the request.
        proxies: trusted proxies, of which HAProxy is one. 0, or a request without the header: the peer of the
            connection is the client.
    """
    lines = [value.decode("latin-1") for name, value in scope["headers"] if name == b"x-forwarded-for"]
    if not proxies or not lines:
        return _parse(scope["client"][0] if scope.get("client") else "")
    return _parse(",".join(lines).split(",")[-proxies:][0].strip())


def bucket_key(address: Address | None) -> object:
    """Returns the key of an address's bucket: the address, or the network of an IPv6 address."""
    if address is None:
        return UNKNOWN
    if isinstance(address, IPv6Address):
        return IPv6Network((address, _IPV6_CLIENT_BITS), strict=False).network_address
    return address


def _parse(text: str) -> Address | None:
    host = text[1:].partition("]")[0] if text.startswith("[") else text
    if host.count(":") == 1:  # some proxies append the port
        host = host.partition(":")[0]
    try:
        address = ip_address(host)
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        return address.ipv4_mapped
    return address
