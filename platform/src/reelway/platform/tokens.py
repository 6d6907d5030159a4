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
from typing import Final, NamedTuple

from reelway.platform.contracts.events import Arm
from reelway.platform.errors import ConfigError, TokenError

MAC_BYTES: Final = 16
SECRET_MIN_BYTES: Final = 16
_VERSION: Final = 1
_PERSON: Final = b"reelway-token-1"
_HEAD: Final = struct.Struct("<BQQQQHBddBB")
"""version, impression, request, viewer, video, position, arm, propensity, issued at, length of release, of source."""
_IS_RELEASE_ID: Final = re.compile(r"[0-9a-f]{64}").fullmatch
"""A release id (64 hex digits) travels as its 32 bytes; any other release name as text, marked by the top bit."""
_TEXT: Final = 0x80
_ARMS: Final = tuple(Arm)
_ARM_CODES: Final = {arm: code for code, arm in enumerate(_ARMS)}
_TO_URL: Final = bytes.maketrans(b"+/", b"-_")
_FROM_URL: Final = bytes.maketrans(b"-_", b"+/")


class ImpressionToken(NamedTuple):
    """One video as it was shown."""

    impression_id: int
    request_id: int
    viewer_id: int
    video_id: int
    position: int  # 0 is the top
    release: str
    arm: Arm
    source: str
    propensity: float
    issued_at_s: float  # Unix seconds


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
        """The token as URL-safe text without padding, about 140 characters.

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
        if len(raw) < _HEAD.size + MAC_BYTES:
            raise TokenError(
                f"impression token has {len(raw)} bytes, expected at least {_HEAD.size + MAC_BYTES}; it was cut off"
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
    impression, request, viewer, video, position, release, arm, source, propensity, issued_at_s = token
    try:
        if _IS_RELEASE_ID(release):
            name = bytes.fromhex(release)
            marked = 0
        else:
            name = release.encode()
            marked = _TEXT
        origin = source.encode()
        if len(name) >= _TEXT:
            raise ValueError(f"release {release!r} is longer than {_TEXT - 1} bytes")
        head = _HEAD.pack(
            _VERSION, impression, request, viewer, video, position, _ARM_CODES[arm],
            propensity, issued_at_s, len(name) | marked, len(origin),
        )  # fmt: skip
    except (ValueError, TypeError, KeyError, struct.error) as error:
        raise TokenError(f"cannot sign {token}: {error}") from error
    return head + name + origin


def _token(body: bytes) -> ImpressionToken:
    """The inverse of ``_body``, for bytes whose signature held."""
    version, impression, request, viewer, video, position, arm, propensity, issued_at_s, name, origin = (
        _HEAD.unpack_from(body)
    )
    if version != _VERSION:
        raise TokenError(f"impression token has version {version}, expected {_VERSION}; it is by another release")
    end = _HEAD.size + (name & ~_TEXT)
    release = body[_HEAD.size : end].decode() if name & _TEXT else body[_HEAD.size : end].hex()
    source = body[end : end + origin].decode()
    return ImpressionToken(
        impression, request, viewer, video, position, release, _ARMS[arm], source, propensity, issued_at_s
    )


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
