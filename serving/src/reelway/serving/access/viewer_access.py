"""Admits or refuses a request before its body is read; the package's docstring has the order of the checks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from reelway.platform.rollout.traffic.access_options import AccessOptions, RateLimit
from reelway.platform.viewer_assertions import GATEWAY_HEADER
from reelway.serving.access.assertions import AssertionVerifier, GatewayVerifier, JwtVerifier
from reelway.serving.access.client_address import Address, bucket_key, client_address
from reelway.serving.access.errors import RateLimitedError
from reelway.serving.access.internal_credential import InternalCredential
from reelway.serving.access.rate_limiter import RateLimiter


class Caller(NamedTuple):
    """Who sent a request."""

    viewer_id: int | None  # None: not proven, and any viewer may be named
    internal: bool = False  # the service itself

    @property
    def authenticated(self) -> bool:
        """Whether the request's viewer is proven."""
        return self.viewer_id is not None


ANYONE: Final = Caller(None)
_ITSELF: Final = Caller(None, internal=True)


class ViewerAccess:
    """The checks of one router.

    Args:
        credential: how the service recognises its own requests.
        verifier: None if nobody has to prove an identity.
        proxies: trusted proxies that append to ``X-Forwarded-For``, HAProxy included.
        clock: seconds that never go back, for the rates.
    """

    def __init__(
        self,
        options: AccessOptions,
        credential: InternalCredential,
        verifier: AssertionVerifier | None,
        *,
        proxies: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.options = options
        self._credential = credential
        self._verifier = verifier
        self._proxies = proxies
        self._addresses = _limiter(options.per_address, clock)
        self._viewers = _limiter(options.per_viewer, clock) if verifier else None

    async def prepare(self) -> None:
        """Reads what proofs are verified with; see ``AssertionVerifier.prepare``."""
        if self._verifier is not None:
            await self._verifier.prepare()

    def is_internal(self, scope: Any) -> bool:
        """Returns whether the service itself sent the request of an ASGI scope."""
        return self._credential.is_in(scope)

    async def admit(self, scope: Any) -> Caller:
        """Returns who sent the request of an ASGI scope.

        Raises:
            AccessError: if the request is refused.
        """
        if self.is_internal(scope):
            return _ITSELF
        if self._addresses is not None:
            self._limit_address(self._addresses, client_address(scope, self._proxies))
        if self._verifier is None:
            return ANYONE
        viewer_id = await self._verifier.verify(scope["headers"])
        if self._viewers is not None:
            wait_s = self._viewers.take(viewer_id)
            if wait_s:
                raise RateLimitedError(
                    "viewer_rate", _too_many("this viewer", self.options.per_viewer), retry_after_s=wait_s
                )
        return Caller(viewer_id)

    def _limit_address(self, limiter: RateLimiter, address: Address | None) -> None:
        if address is not None and any(address in network for network in self.options.unlimited_networks):
            return
        wait_s = limiter.take(bucket_key(address))
        if wait_s:
            message = _too_many("this address", self.options.per_address)
            raise RateLimitedError("address_rate", message, retry_after_s=wait_s)


def build_viewer_access(
    options: AccessOptions, credential: InternalCredential, on_fault: Callable[[], None], *, behind_haproxy: bool
) -> ViewerAccess:
    """Returns the checks that the options describe.

    Args:
        on_fault: called when keys could not be read.
        behind_haproxy: whether Ray Serve's HAProxy is the peer of every connection.
    """
    verifier: AssertionVerifier | None = None
    if options.jwt is not None:
        verifier = JwtVerifier(options.jwt, on_fault)
    elif options.gateway is not None:
        verifier = GatewayVerifier(options.gateway, on_fault)
    return ViewerAccess(options, credential, verifier, proxies=options.trusted_proxies + behind_haproxy)


def _limiter(limit: RateLimit, clock: Callable[[], float]) -> RateLimiter | None:
    return RateLimiter(limit.per_second, limit.burst, clock=clock) if limit.per_second else None


def _too_many(subject: str, limit: RateLimit) -> str:
    return f"more than {limit.per_second:g} requests per second of {subject}; wait before you try again"


def describe_access(options: AccessOptions) -> str:
    """Returns one sentence on who may ask."""
    if options.mode == "off":
        return "authentication is off: a client may ask for any viewer, and report any viewer's outcomes"
    proof = "a JSON Web Token" if options.mode == "jwt" else f"the header {GATEWAY_HEADER}"
    return f"authentication is {options.mode!r}: each request proves its viewer with {proof}"
