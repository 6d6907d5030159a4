"""Signed impression tokens, which identify the impression that an outcome belongs to.

Every video of a slate carries a token, and every outcome returns it. The service therefore keeps no state between the
two, and a client can neither invent an impression nor move one to another arm. A token is signed, not encrypted. It
does not expire: the reader decides by ``issued_at_s`` whether an outcome is too late.
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

SECRET_VARIABLE: Final = "REELWAY_TOKEN_SECRET"
"""Environment variable of the secrets that sign tokens, separated by commas. The first secret signs; all verify."""
MAC_BYTES: Final = 16
SECRET_MIN_BYTES: Final = 16
ROLLOUT_MAX_BYTES: Final = 63
SLICE_BITS: Final = MappingProxyType({Slice.NEW_VIEWERS: 1, Slice.NEW_VIDEOS: 2, Slice.SMALL_CREATORS: 4})
"""Bits of ``ImpressionToken.slices``: the slices of an impression besides ``overall``."""
ALL_SLICES: Final = sum(SLICE_BITS.values())
_VERSION: Final = 2
_BLAKE2_PERSON: Final = b"reelway-token-1"  # separates the key from other uses of the same secret
_HEAD: Final = struct.Struct("<BQQQQHBddBBBfBIqi")
"""version, impression, request, viewer, video, position, arm, propensity, issued at; lengths of release, source and
rollout; weight, slices, duration, creator, topic."""
_IS_RELEASE_ID: Final = re.compile(r"[0-9a-f]{64}").fullmatch
"""A release id (64 hex digits) is encoded as its 32 bytes. Another release name is encoded as text."""
_TEXT: Final = 0x80
"""Bit of the release's length that marks text."""
_ARMS: Final = tuple(Arm)
_ARM_CODES: Final = {arm: code for code, arm in enumerate(_ARMS)}
_TO_URL: Final = bytes.maketrans(b"+/", b"-_")
_FROM_URL: Final = bytes.maketrans(b"-_", b"+/")


class ImpressionToken(NamedTuple):
    """One video as it was shown. ``weight`` is encoded as a float32 and should be one already."""

    impression_id: int
    request_id: int
    viewer_id: int
    video_id: int
    position: int  # 0 is the top
    release: str
    arm: Arm
    source: str
    propensity: float
    issued_at_s: float  # Unix seconds by the signer's clock, not by the client's context
    rollout: str = ""  # rollout id of at most ROLLOUT_MAX_BYTES; empty outside of a rollout
    weight: float = 0.0  # sequential.overlap_weight of the arms when the video was shown
    slices: int = 0  # sum of SLICE_BITS
    duration_ms: int = 0  # of the video; 0 if unknown
    creator_id: int = -1  # of the video; -1 if unknown
    topic: int = -1  # of the video; -1 if unknown


class TokenSigner:
    """Signs and reads tokens with a keyed BLAKE2b (RFC 7693) of 128 bits.

    Args:
        *secrets: the first signs, all are accepted. To rotate, put the new secret first and remove the old one when
            no outcome with its tokens can arrive any more.

    Raises:
        ConfigError: if there is no secret, or one is shorter than ``SECRET_MIN_BYTES``.
    """

    def __init__(self, *secrets: bytes) -> None:
        if not secrets:
            raise ConfigError("impression tokens: no token secret was given; set at least one, the first one signs")
        for index, secret in enumerate(secrets):
            if len(secret) < SECRET_MIN_BYTES:
                raise ConfigError(
                    f"token secret {index} has {len(secret)} bytes, expected at least {SECRET_MIN_BYTES}; "
                    "make one with `openssl rand -hex 32`"
                )
        # A key of BLAKE2b has at most 64 bytes; hashing allows secrets of any length.
        self._keys = tuple(
            hashlib.blake2b(secret, digest_size=32, person=_BLAKE2_PERSON).digest() for secret in secrets
        )

    def sign(self, token: ImpressionToken) -> str:
        """Returns URL-safe text without padding: about 171 characters, and 20 more in a rollout.

        Raises:
            TokenError: if a token cannot encode one of the values.
        """
        return self.sign_many((token,))[0]

    def sign_many(self, tokens: Iterable[ImpressionToken]) -> list[str]:
        """Signs the tokens of all videos of a slate."""
        key = self._keys[0]
        signed = []
        for token in tokens:
            body = _body(token)
            mac = hashlib.blake2b(body, digest_size=MAC_BYTES, key=key).digest()
            signed.append(_encode(body + mac))
        return signed

    def read(self, text: str) -> ImpressionToken:
        """Returns the token that was signed.

        Raises:
            TokenError: if the text is not a token, or none of the secrets signed it.
        """
        raw = _decode(text)
        if len(raw) < _HEAD.size + MAC_BYTES:
            raise TokenError(
                f"impression token has {len(raw)} bytes, expected at least {_HEAD.size + MAC_BYTES}; it was cut off"
            )
        body, mac = raw[:-MAC_BYTES], raw[-MAC_BYTES:]
        expected = [hashlib.blake2b(body, digest_size=MAC_BYTES, key=key).digest() for key in self._keys]
        if not sum(
            hmac.compare_digest(mac, one) for one in expected
        ):  # a sum compares with every secret, so the duration reveals nothing
            raise TokenError(
                f"impression token {text[:12]!r}... is signed by none of the {len(expected)} accepted secrets; "
                "it was changed, or its secret was retired"
            )
        return _token(body)


def _body(token: ImpressionToken) -> bytes:
    (
        impression, request, viewer, video, position, release, arm, source, propensity, issued_at_s,
        rollout, weight, slices, duration_ms, creator, topic,
    ) = token  # fmt: skip
    try:
        if _IS_RELEASE_ID(release):
            name = bytes.fromhex(release)
            text_bit = 0
        else:
            name = release.encode()
            text_bit = _TEXT
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
            propensity, issued_at_s, len(name) | text_bit, len(origin), len(trial), weight, slices, duration_ms,
            creator, topic,
        )  # fmt: skip
    except (ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
        raise TokenError(f"cannot sign {token}: {error}") from error
    return head + name + origin + trial


def _token(body: bytes) -> ImpressionToken:
    """Decodes a body, the inverse of ``_body``, for bytes whose signature is valid."""
    if body[0] != _VERSION:
        raise TokenError(
            f"impression token has version {body[0]}, expected {_VERSION}; another version of Reelway signed it"
        )
    (
        _, impression, request, viewer, video, position, arm, propensity, issued_at_s, name, origin,
        trial, weight, slices, duration_ms, creator, topic,
    ) = _HEAD.unpack_from(body)  # fmt: skip
    start = _HEAD.size
    end = start + (name & ~_TEXT)
    release = body[start:end].decode() if name & _TEXT else body[start:end].hex()
    source = body[end : end + origin].decode()
    rollout = body[end + origin : end + origin + trial].decode()
    return ImpressionToken(
        impression, request, viewer, video, position, release, _ARMS[arm], source, propensity, issued_at_s,
        rollout, weight, slices, duration_ms, creator, topic,
    )  # fmt: skip


def _encode(raw: bytes) -> str:
    return binascii.b2a_base64(raw, newline=False).rstrip(b"=").translate(_TO_URL).decode()


def _decode(text: str) -> bytes:
    """Decodes strict base64, in which exactly one text encodes a token."""
    try:
        padded = text.encode("ascii").translate(_FROM_URL) + b"=" * (-len(text) % 4)
        raw = binascii.a2b_base64(padded, strict_mode=True)
    except ValueError as error:  # binascii.Error and UnicodeEncodeError are ValueErrors
        raise TokenError(f"impression token {text[:12]!r}... is not URL-safe base64: {error}") from error
    if _encode(raw) != text:
        raise TokenError(f"impression token {text[:12]!r}... is not in canonical base64; send it as it was received")
    return raw
