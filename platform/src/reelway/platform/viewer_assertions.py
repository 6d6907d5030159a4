"""Makes proofs of a viewer's identity: JSON Web Tokens, and the header of a gateway.

An application's identity provider, or its gateway, makes them in production. The commands make them to test a service
that demands them. ``serving.access`` verifies them.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import time
from pathlib import Path
from typing import Final

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from reelway.platform.errors import ConfigError

GATEWAY_HEADER: Final = "Reelway-Viewer"
ALGORITHM: Final = "EdDSA"
TOKEN_LIFETIME_S: Final = 3600


def gateway_signature(secret: bytes, signed: bytes) -> str:
    """Returns the HMAC-SHA256 (RFC 2104) of ``<viewer id>.<Unix seconds>`` in hexadecimal digits."""
    return hmac.new(secret, signed, hashlib.sha256).hexdigest()


def gateway_header(secret: bytes, viewer_id: int, now_s: float) -> str:
    """Returns the value of the header ``Reelway-Viewer``: ``<viewer id>.<Unix seconds>.<signature>``."""
    signed = f"{viewer_id}.{int(now_s)}"
    return f"{signed}.{gateway_signature(secret, signed.encode())}"


class ViewerTokenSigner:
    """Signs JSON Web Tokens of viewers with an Ed25519 key (RFC 8037).

    Args:
        key: the private key.
        lifetime_s: seconds for which a token is valid.
    """

    def __init__(
        self,
        key: ed25519.Ed25519PrivateKey,
        *,
        audience: str,
        issuer: str | None = None,
        lifetime_s: float = TOKEN_LIFETIME_S,
    ) -> None:
        self._key = key
        self._claims = {"aud": audience, **({"iss": issuer} if issuer else {})}
        self.lifetime_s = lifetime_s

    def sign(self, viewer_id: int, now_s: float | None = None) -> str:
        """Returns the token of a viewer."""
        now = int(time.time() if now_s is None else now_s)
        claims = {**self._claims, "sub": str(viewer_id), "iat": now, "exp": now + int(self.lifetime_s)}
        return jwt.encode(claims, self._key, algorithm=ALGORITHM)


def read_viewer_key(path: Path) -> ed25519.Ed25519PrivateKey:
    """Returns the private key in a file in PEM format.

    Raises:
        ConfigError: if the file cannot be read, or has another kind of key.
    """
    advice = "make one with `reelway viewer-key`"
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the viewer key: {error.strerror or error}; {advice}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path}: not a private key in PEM format: {error}; {advice}") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ConfigError(f"{path}: not an Ed25519 key; {advice}")
    return key


def create_viewer_key(path: Path) -> Path:
    """Writes a new private key, readable by its owner only, and its public key beside it. Returns the latter's path.

    The public key's name differs from those of releases' keys, ``*.public.pem``: in a folder of these, it would be
    trusted to sign releases.

    Raises:
        ConfigError: if the file exists, or cannot be written.
    """
    key = ed25519.Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    public_path = path.with_name(f"{path.stem}-public.pem")
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(private)
        public_path.write_bytes(public)
    except FileExistsError as error:
        raise ConfigError(f"{path}: exists already; use it, or choose another name") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}; choose another folder") from error
    return public_path
