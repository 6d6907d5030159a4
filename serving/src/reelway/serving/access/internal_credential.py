"""The credential with which the service calls itself: for the internal paths, and for its own warm-up.

It is derived from the token secret, which the routers, the outcomes and the internal API have in common.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from typing import Any, Final

HEADER: Final = "reelway-internal"
_PERSON: Final = b"reelway-internal"  # separates the credential from other uses of the secret
_HEADER_BYTES: Final = HEADER.encode()


class InternalCredential:
    """Makes and recognises the header.

    Args:
        secrets: token secrets; the first makes the header, each of them is accepted.
    """

    def __init__(self, secrets: Iterable[bytes]) -> None:
        self._values = tuple(_derived(secret) for secret in secrets)

    @property
    def headers(self) -> dict[str, str]:
        """Headers of a request that this service sends to itself."""
        return {HEADER: self._values[0].decode()}

    def is_in(self, scope: Any) -> bool:
        """Returns whether the request of an ASGI scope has the credential."""
        values = [value for name, value in scope["headers"] if name == _HEADER_BYTES]
        if len(values) != 1:
            return False
        return bool(sum(hmac.compare_digest(values[0], known) for known in self._values))


def _derived(secret: bytes) -> bytes:
    key = hashlib.blake2b(secret, digest_size=32).digest()
    return hashlib.blake2b(b"", digest_size=32, key=key, person=_PERSON).hexdigest().encode()
