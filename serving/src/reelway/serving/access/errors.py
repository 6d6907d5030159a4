"""Why a request was refused before it was read: status, the label of the metric, and headers of the response."""

from __future__ import annotations

import math

from reelway.platform.errors import ServingError


class AccessError(ServingError):
    """The request is refused. ``reason`` is the value of a metric's label."""

    status = 403

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    @property
    def headers(self) -> dict[str, str]:
        return {}


class ForbiddenError(AccessError):
    """The identity is proven, and the request is about another viewer."""


class UnauthenticatedError(AccessError):
    """The identity is not proven.

    Args:
        scheme: authentication scheme of the header ``WWW-Authenticate`` (RFC 9110).
    """

    status = 401

    def __init__(self, reason: str, message: str, *, scheme: str) -> None:
        super().__init__(reason, message)
        self._scheme = scheme

    @property
    def headers(self) -> dict[str, str]:
        problem = "" if self.reason == "missing" else ', error="invalid_token"'  # RFC 6750, section 3.1
        return {"WWW-Authenticate": f'{self._scheme} realm="reelway"{problem}'}


class KeysUnavailableError(AccessError):
    """No key was read yet, so that no identity can be verified."""

    status = 503

    def __init__(self, message: str) -> None:
        super().__init__("no_keys", message)

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": "5"}


class RateLimitedError(AccessError):
    """More requests than the limit of a viewer or an address allows. ``reason`` names which of them."""

    status = 429

    def __init__(self, reason: str, message: str, *, retry_after_s: float) -> None:
        super().__init__(reason, message)
        self._retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(max(1, math.ceil(self._retry_after_s)))}
