"""Signed impression tokens: what an outcome needs to be counted for the right release, carried by the client.

A token goes out with every video of a slate and comes back with every outcome, so the service keeps no state between
the two and nobody can invent an impression or move one to another arm. A token is signed, not encrypted, and it is
no proof of freshness: how old an outcome may be is the reader's rule (``issued_at_s``).
"""

from __future__ import annotations

import binascii
import hashlib
import hmac
import re
import struct
from collections.abc import Iterable
from types import MappingProxyType
from typing import Final, NamedTuple

from reelway.platform.contracts.events import Arm
from reelway.platform.errors import ConfigError, TokenError
from reelway.platform.rollout.policy import Slice

MAC_BYTES: Final = 16
SECRET_MIN_BYTES: Final = 16
ROLLOUT_MAX_BYTES: Final = 63
SLICE_BITS: Final = MappingProxyType({Slice.NEW_VIEWERS: 1, Slice.NEW_VIDEOS: 2, Slice.SMALL_CREATORS: 4})
"""What an impression belongs to besides ``overall``, as the bits of ``ImpressionToken.slices``."""
ALL_SLICES: Final = sum(SLICE_BITS.values())
_VERSION: Final = 2
_PERSON: Final = b"reelway-token-1"  # names the key, which all versions share
_HEAD_1: Final = struct.Struct("<BQQQQHBddBB")
"""version, impression, request, viewer, video, position, arm, propensity, issued at, length of release, of source."""
_HEAD: Final = struct.Struct(_HEAD_1.format + "BfBI")
"""The same, then length of rollout, weight, slices, duration."""
_IS_RELEASE_ID: Final = re.compile(r"[0-9a-f]{64}").fullmatch
"""A release id (64 hex digits) travels as its 32 bytes; any other release name as text, marked by the top bit."""
_TEXT: Final = 0x80
_ARMS: Final = tuple(Arm)
_ARM_CODES: Final = {arm: code for code, arm in enumerate(_ARMS)}
_TO_URL: Final = bytes.maketrans(b"+/", b"-_")
_FROM_URL: Final = bytes.maketrans(b"-_", b"+/")


class ImpressionToken(NamedTuple):
    """One video as it was shown.

    ``weight`` travels as a float32, so give it one. A token of version 1 reads with the last four at their defaults.
    """

    impression_id: int
    request_id: int
    viewer_id: int
    video_id: int
    position: int  # 0 is the top
    release: str
    arm: Arm
    source: str
    propensity: float
    issued_at_s: float  # Unix seconds by the signer's clock, whatever time the request gave for its context
    rollout: str = ""  # its id, at most ROLLOUT_MAX_BYTES; empty outside of any
    weight: float = 0.0  # sequential.overlap_weight of the arms when it was shown
    slices: int = 0  # SLICE_BITS, added up
    duration_ms: int = 0  # of the video; 0 where nobody knows


class TokenSigner:
    """Signs and reads tokens with a keyed BLAKE2b (RFC 7693) of 128 bits.

    Args:
        *secrets: the first one signs, all of them are accepted; so a new secret is put in front and the old one
            kept until its last token has come back.

    Raises:
        ConfigError: no secret, or one shorter than ``SECRET_MIN_BYTES``.
    """

    def __init__(self, *secrets: bytes) -> None:
        if not secrets:
            raise ConfigError("no token secret was given; set at least one, the first of which signs")
        for place, secret in enumerate(secrets):
            if len(secret) < SECRET_MIN_BYTES:
                raise ConfigError(
                    f"token secret {place} has {len(secret)} bytes, expected at least {SECRET_MIN_BYTES}; "
                    "make one with `openssl rand -hex 32`"
                )
        # A key of BLAKE2b has at most 64 bytes; hashing lets a secret have any length.
        self._keys = tuple(hashlib.blake2b(secret, digest_size=32, person=_PERSON).digest() for secret in secrets)

    def sign(self, token: ImpressionToken) -> str:
        """The token as URL-safe text without padding, about 155 characters, and 20 more within a rollout.

        Raises:
            TokenError: a value that a token cannot carry.
        """
        return self.sign_many((token,))[0]

    def sign_many(self, tokens: Iterable[ImpressionToken]) -> list[str]:
        """``sign`` for a whole slate."""
        key = self._keys[0]
        signed = []
        for token in tokens:
            body = _body(token)
            mac = hashlib.blake2b(body, digest_size=MAC_BYTES, key=key).digest()
            signed.append(_encode(body + mac))
        return signed

    def read(self, text: str) -> ImpressionToken:
        """The token that ``sign`` was given.

        Raises:
            TokenError: not a token, or not signed by one of the secrets; the message says which.
        """
        raw = _decode(text)
        if len(raw) < _HEAD_1.size + MAC_BYTES:
            raise TokenError(
                f"impression token has {len(raw)} bytes, expected at least {_HEAD_1.size + MAC_BYTES}; it was cut off"
            )
        body, mac = raw[:-MAC_BYTES], raw[-MAC_BYTES:]
        expected = [hashlib.blake2b(body, digest_size=MAC_BYTES, key=key).digest() for key in self._keys]
        if not sum(hmac.compare_digest(mac, one) for one in expected):  # a sum: every secret takes the same time
            raise TokenError(
                f"impression token {text[:12]!r}... is signed by none of the {len(expected)} accepted secrets; "
                "it was changed, or its secret was retired"
            )
        return _token(body)


def _body(token: ImpressionToken) -> bytes:
    (
        impression, request, viewer, video, position, release, arm, source, propensity, issued_at_s,
        rollout, weight, slices, duration_ms,
    ) = token  # fmt: skip
    try:
        if _IS_RELEASE_ID(release):
            name = bytes.fromhex(release)
            marked = 0
        else:
            name = release.encode()
            marked = _TEXT
        origin, trial = source.encode(), rollout.encode()
        if len(name) >= _TEXT:
            raise ValueError(f"release {release!r} is longer than {_TEXT - 1} bytes")
        if len(trial) > ROLLOUT_MAX_BYTES:
            raise ValueError(f"rollout {rollout!r} is longer than {ROLLOUT_MAX_BYTES} bytes")
        if not 0.0 <= weight <= 1.0:
            raise ValueError(f"weight {weight} is outside 0..1")
        if slices & ~ALL_SLICES:
            raise ValueError(f"slices {slices} are outside 0..{ALL_SLICES}")
        head = _HEAD.pack(
            _VERSION, impression, request, viewer, video, position, _ARM_CODES[arm],
            propensity, issued_at_s, len(name) | marked, len(origin), len(trial), weight, slices, duration_ms,
        )  # fmt: skip
    except (ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
        raise TokenError(f"cannot sign {token}: {error}") from error
    return head + name + origin + trial


def _token(body: bytes) -> ImpressionToken:
    """The inverse of ``_body``, for bytes whose signature held."""
    trial, weight, slices, duration_ms = 0, 0.0, 0, 0
    if body[0] == _VERSION:
        (
            _, impression, request, viewer, video, position, arm, propensity, issued_at_s, name, origin,
            trial, weight, slices, duration_ms,
        ) = _HEAD.unpack_from(body)  # fmt: skip
        start = _HEAD.size
    elif body[0] == 1:
        _, impression, request, viewer, video, position, arm, propensity, issued_at_s, name, origin = (
            _HEAD_1.unpack_from(body)
        )
        start = _HEAD_1.size
    else:
        raise TokenError(f"impression token has version {body[0]}, expected 1 or {_VERSION}; it is by another release")
    end = start + (name & ~_TEXT)
    release = body[start:end].decode() if name & _TEXT else body[start:end].hex()
    source = body[end : end + origin].decode()
    rollout = body[end + origin : end + origin + trial].decode()
    return ImpressionToken(
        impression, request, viewer, video, position, release, _ARMS[arm], source, propensity, issued_at_s,
        rollout, weight, slices, duration_ms,
    )  # fmt: skip


def _encode(raw: bytes) -> str:
    return binascii.b2a_base64(raw, newline=False).rstrip(b"=").translate(_TO_URL).decode()


def _decode(text: str) -> bytes:
    """Strict: one text for one token, so that a token cannot be written in two ways."""
    try:
        padded = text.encode("ascii").translate(_FROM_URL) + b"=" * (-len(text) % 4)
        raw = binascii.a2b_base64(padded, strict_mode=True)
    except ValueError as error:  # binascii.Error and UnicodeEncodeError are ValueErrors
        raise TokenError(f"impression token {text[:12]!r}... is not URL-safe base64: {error}") from error
    if _encode(raw) != text:
        raise TokenError(f"impression token {text[:12]!r}... is not as it was written: its spelling differs")
    return raw
