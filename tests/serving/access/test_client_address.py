"""The client's address behind trusted proxies."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest

from reelway.serving.access.client_address import bucket_key, client_address


def scope(*forwarded: str, peer: str = "10.0.0.9") -> dict[str, Any]:
    return {
        "client": (peer, 1234),
        "headers": [(b"host", b"x"), *((b"x-forwarded-for", value.encode()) for value in forwarded)],
    }


@pytest.mark.parametrize(
    ("forwarded", "proxies", "expected"),
    [
        ([], 0, "10.0.0.9"),
        ([], 1, "10.0.0.9"),
        (["1.1.1.1"], 0, "10.0.0.9"),  # nobody may be believed
        (["1.1.1.1"], 1, "1.1.1.1"),
        (["6.6.6.6", "1.1.1.1"], 1, "1.1.1.1"),  # the client invented the first line
        (["6.6.6.6, 7.7.7.7,1.1.1.1"], 1, "1.1.1.1"),
        (["6.6.6.6, 2.2.2.2", "1.1.1.1"], 2, "2.2.2.2"),
        (["1.1.1.1"], 2, "1.1.1.1"),  # the request did not pass the outer proxy
        (["::ffff:1.2.3.4"], 1, "1.2.3.4"),
        (["1.2.3.4:5678"], 1, "1.2.3.4"),
        (["[2001:db8::1]:443"], 1, "2001:db8::1"),
        (["unknown"], 1, None),
        ([""], 1, None),
    ],
)
def test_address_is_read_from_trusted_entries_only(forwarded: list[str], proxies: int, expected: str | None) -> None:
    assert client_address(scope(*forwarded), proxies) == (expected and ip_address(expected))


def test_addresses_of_one_ipv6_network_share_a_bucket() -> None:
    one, same, other = (ip_address(text) for text in ("2001:db8::1", "2001:db8::2:3", "2001:db8:0:1::1"))
    assert bucket_key(one) == bucket_key(same) != bucket_key(other)
    assert bucket_key(ip_address("1.1.1.1")) != bucket_key(ip_address("1.1.1.2"))
    assert bucket_key(None) == bucket_key(None)
