"""Verifies the proof of a viewer's identity: a JSON Web Token, or a header that a gateway signed."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import jwt
from cachetools import LRUCache

from reelway.platform.contracts.ids import MAX_ID
from reelway.platform.errors import ConfigError
from reelway.platform.rollout.traffic.access_options import GatewayOptions, JwtOptions
from reelway.platform.viewer_assertions import GATEWAY_HEADER, gateway_signature
from reelway.serving.access.errors import UnauthenticatedError
from reelway.serving.access.refreshed import Refreshed
from reelway.serving.access.verification_keys import KeySet, key_reader

MAX_ASSERTION_BYTES: Final = 8 << 10
MAX_CACHED: Final = 20_000
"""Verified tokens that are remembered: about 6 MB."""
MIN_SECRET_BYTES: Final = 16
_GATEWAY_HEADER: Final = GATEWAY_HEADER.lower().encode()
_REASONS: Final = (
    (jwt.ExpiredSignatureError, "expired"),
    (jwt.ImmatureSignatureError, "not_yet_valid"),
    (jwt.InvalidAudienceError, "audience"),
    (jwt.InvalidIssuerError, "issuer"),
    (jwt.MissingRequiredClaimError, "claims"),
    (jwt.InvalidSignatureError, "signature"),
)


class AssertionVerifier(Protocol):
    """Verifies the proof in a request's headers."""

    async def prepare(self) -> None:
        """Reads the keys, so that the first requests need not wait. A failure is counted and logged."""
        ...

    async def verify(self, headers: list[tuple[bytes, bytes]]) -> int:
        """Returns the viewer id.

        Raises:
            UnauthenticatedError: if the proof is missing or invalid.
            KeysUnavailableError: if no key was read yet.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Verified:
    viewer_id: int
    expires_at_s: float
    keys: KeySet  # a token is verified again with new keys, since its key may have been withdrawn


class JwtVerifier:
    """Verifies ``Authorization: Bearer``.

    A verified token is remembered by its digest until it expires: a signature costs more than the rest of admission.

    Args:
        on_fault: called when the keys could not be read.
        clock: Unix seconds.
    """

    def __init__(
        self, options: JwtOptions, on_fault: Callable[[], None], *, clock: Callable[[], float] = time.time
    ) -> None:
        self._options = options
        self._keys = Refreshed("JWT keys", key_reader(options), on_fault, refresh_s=options.refresh_s)
        self._required = ["exp", "aud", options.viewer_claim, *(["iss"] if options.issuer else [])]
        self._clock = clock
        self._verified: LRUCache[bytes, _Verified] = LRUCache(MAX_CACHED)

    async def prepare(self) -> None:
        """See ``AssertionVerifier``."""
        await self._keys.renew()

    async def verify(self, headers: list[tuple[bytes, bytes]]) -> int:
        """See ``AssertionVerifier``."""
        token = _bearer_token(headers)
        digest = hashlib.sha256(token).digest()
        keys = await self._keys.get()
        known = self._verified.get(digest)
        if known is not None and known.keys is keys and self._clock() < known.expires_at_s:
            return known.viewer_id
        key_id, algorithm = self._named_key(token)
        if not keys.find(key_id, algorithm):
            await self._keys.renew()
            keys = await self._keys.get()
        claims = self._claims(token, key_id, algorithm, keys)
        viewer_id = _viewer_id(claims[self._options.viewer_claim])
        self._verified[digest] = _Verified(viewer_id, float(claims["exp"]) + self._options.leeway_s, keys)
        return viewer_id

    def _named_key(self, token: bytes) -> tuple[str | None, str]:
        """Returns the key id and the algorithm in the token's header, before anything is verified."""
        try:
            header = jwt.get_unverified_header(token)
        except jwt.PyJWTError as error:
            raise _bearer("malformed", f"the token is not a JSON Web Token: {error}") from error
        algorithm, key_id = header.get("alg"), header.get("kid")
        if algorithm not in self._options.algorithms:
            accepted = ", ".join(self._options.algorithms)
            raise _bearer("algorithm", f"the token's algorithm is not accepted; sign it with one of {accepted}")
        if "crit" in header:
            raise _bearer("malformed", "the token's header has critical extensions, expected none")
        return key_id, algorithm

    def _claims(self, token: bytes, key_id: str | None, algorithm: str, keys: KeySet) -> dict[str, Any]:
        options = self._options
        candidates = keys.find(key_id, algorithm)
        if not candidates:
            raise _bearer("unknown_key", "the token names a key that its issuer does not publish; get a new token")
        for index, candidate in enumerate(candidates):
            try:
                claims: dict[str, Any] = jwt.decode(
                    token,
                    candidate.key,
                    algorithms=[algorithm],
                    audience=options.audience,
                    issuer=options.issuer,
                    leeway=options.leeway_s,
                    options={"require": self._required, "verify_sub": False},
                )
            except jwt.InvalidSignatureError as error:
                if index + 1 == len(candidates):
                    raise _bearer("signature", "the token's signature is invalid; get a new token") from error
            except jwt.PyJWTError as error:
                reason = next((reason for kind, reason in _REASONS if isinstance(error, kind)), "malformed")
                raise _bearer(reason, f"the token is not accepted: {error}; get a new token") from error
            else:
                return claims
        raise AssertionError("the loop returns or raises")


class GatewayVerifier:
    """Verifies ``Reelway-Viewer: <viewer id>.<Unix seconds>.<signature>``; see ``platform.viewer_assertions``.

    Args:
        on_fault: called when the secrets could not be read.
        clock: Unix seconds.
    """

    def __init__(
        self, options: GatewayOptions, on_fault: Callable[[], None], *, clock: Callable[[], float] = time.time
    ) -> None:
        self._options = options
        path = options.keys_file
        self._secrets = Refreshed("gateway keys", lambda: read_secrets(path), on_fault, refresh_s=options.refresh_s)
        self._clock = clock

    async def prepare(self) -> None:
        """See ``AssertionVerifier``."""
        await self._secrets.renew()

    async def verify(self, headers: list[tuple[bytes, bytes]]) -> int:
        """See ``AssertionVerifier``."""
        value = _only_value(headers, _GATEWAY_HEADER, _gateway)
        secrets = await self._secrets.get()
        parts = value.split(b".")
        if len(parts) != 3 or not parts[1].isdigit() or len(parts[1]) > 12:
            raise _gateway("malformed", "not `<viewer id>.<Unix seconds>.<signature>`")
        signatures = [gateway_signature(secret, b".".join(parts[:2])).encode() for secret in secrets]
        if not sum(hmac.compare_digest(parts[2], known) for known in signatures):
            raise _gateway("signature", "its signature is invalid; compare the keys of gateway and service")
        age_s = self._clock() - int(parts[1])
        if age_s > self._options.max_age_s + self._options.leeway_s:
            raise _gateway("expired", f"it is {age_s:.0f} s old, expected at most {self._options.max_age_s:g} s")
        if age_s < -self._options.leeway_s:
            raise _gateway("not_yet_valid", f"it is {-age_s:.0f} s from the future; compare the clocks")
        return _viewer_id(parts[0].decode("latin-1"), _gateway)


def read_secrets(path: Path) -> tuple[bytes, ...]:
    """Returns the secrets of a file, one per line.

    Raises:
        ConfigError: if there is none, or one is short.
    """
    secrets = tuple(line.strip() for line in path.read_bytes().splitlines() if line.strip())
    if not secrets or any(len(secret) < MIN_SECRET_BYTES for secret in secrets):
        raise ConfigError(
            f"{path}: {len(secrets)} secrets, expected at least one, each of at least {MIN_SECRET_BYTES} bytes; "
            "make one with `openssl rand -hex 32`"
        )
    return secrets


def _bearer(reason: str, message: str) -> UnauthenticatedError:
    return UnauthenticatedError(reason, f"Authorization: {message}", scheme="Bearer")


def _gateway(reason: str, message: str) -> UnauthenticatedError:
    return UnauthenticatedError(reason, f"{GATEWAY_HEADER}: {message}", scheme=GATEWAY_HEADER)


_Refusal = Callable[[str, str], UnauthenticatedError]


def _bearer_token(headers: list[tuple[bytes, bytes]]) -> bytes:
    scheme, _, token = _only_value(headers, b"authorization", _bearer).partition(b" ")
    if scheme.lower() != b"bearer":
        raise _bearer("malformed", "expected `Bearer <token>`")
    return token.strip()


def _only_value(headers: list[tuple[bytes, bytes]], name: bytes, refusal: _Refusal) -> bytes:
    values = [value for key, value in headers if key == name]
    if not values:
        raise refusal("missing", "missing; send a proof of the viewer's identity")
    if len(values) > 1 or len(values[0]) > MAX_ASSERTION_BYTES:
        raise refusal("malformed", f"expected one value of at most {MAX_ASSERTION_BYTES} bytes")
    return values[0]


def _viewer_id(claim: object, refusal: _Refusal = _bearer) -> int:
    """Returns the viewer id of a claim: an integer, or its decimal digits as they are usually written."""
    viewer_id = claim if isinstance(claim, int) and not isinstance(claim, bool) else -1
    if isinstance(claim, str) and len(claim) <= len(str(MAX_ID)) and claim.isascii() and claim.isdigit():
        viewer_id = int(claim)
        if str(viewer_id) != claim:
            viewer_id = -1
    if not 0 <= viewer_id <= MAX_ID:
        raise refusal("subject", f"the identity is not a viewer id from 0 to {MAX_ID}")
    return viewer_id
