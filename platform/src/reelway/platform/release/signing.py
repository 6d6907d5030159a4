"""Ed25519 signatures of release manifests: only a release built by the holder of a trusted key can take traffic.

The signature covers the canonical manifest, which contains the digest of every file. Keys are PEM files. A private key
is never printed, never overwritten, and readable by its owner only.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from reelway.platform.atomic_files import atomic_file, create_private_file
from reelway.platform.contracts.ids import short_id
from reelway.platform.contracts.manifest import Manifest
from reelway.platform.errors import ConfigError, SignatureError

PRIVATE_NAME: Final = "release.private.pem"
PUBLIC_NAME: Final = "release.public.pem"
PUBLIC_PATTERN: Final = "*.public.pem"


@dataclass(frozen=True)
class KeyPair:
    """Paths of a key pair. The private key signs; the public key is given to every verifier."""

    private: Path
    public: Path


def create_keys(folder: Path) -> KeyPair:
    """Creates a pair in ``folder``: ``release.private.pem`` (mode 0600) and ``release.public.pem``.

    Raises:
        ConfigError: if a private key exists.
        StorageError: if the folder cannot be written.
    """
    pair = KeyPair(folder / PRIVATE_NAME, folder / PUBLIC_NAME)
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        create_private_file(pair.private, private)
    except FileExistsError as error:
        raise ConfigError(f"{pair.private} exists and is never overwritten; use it, or name another folder") from error
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    with atomic_file(pair.public) as temporary:
        temporary.write_bytes(public)
    return pair


def load_private_key(path: Path) -> Ed25519PrivateKey:
    """Loads the signing key.

    Raises:
        SignatureError: if the file cannot be read, or is not an unencrypted Ed25519 private key in PEM.
    """
    try:
        key = serialization.load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError) as error:
        raise SignatureError(f"{path} is not an unencrypted private key in PEM: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise SignatureError(f"{path} holds a {type(key).__name__}, expected an Ed25519 private key")
    return key


def load_public_keys(path: Path) -> tuple[Ed25519PublicKey, ...]:
    """Loads trusted keys: one PEM file, or every ``*.public.pem`` of a folder. Hidden files are ignored.

    macOS writes a file ``._NAME`` beside each file on a volume that has no extended attributes.

    Raises:
        SignatureError: if there is no key, or one is not an Ed25519 public key.
    """
    paths = [path]
    if path.is_dir():
        paths = sorted(key for key in path.glob(PUBLIC_PATTERN) if not key.name.startswith("."))
    if not paths:
        raise SignatureError(f"{path} has no {PUBLIC_PATTERN}; create a pair with `reelway release keys`")
    return tuple(_load_public_key(key) for key in paths)


def fingerprint(key: Ed25519PublicKey) -> str:
    """Returns the first 12 hex digits of SHA-256 over the raw public key, for comparison by people."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:12]


def sign(manifest: Manifest, key: Ed25519PrivateKey) -> Manifest:
    """Returns the manifest with this key's signature. The release id does not change."""
    signature = base64.b64encode(key.sign(manifest.canonical_bytes())).decode("ascii")
    return manifest.model_copy(update={"signature": signature})


def check_signature(manifest: Manifest, keys: Sequence[Ed25519PublicKey]) -> Ed25519PublicKey:
    """Returns the trusted key that signed the manifest.

    Raises:
        SignatureError: if there is no signature, an unreadable one, or one by none of ``keys``.
    """
    release = f"release {short_id(manifest.release_id)}"
    if not keys:
        raise SignatureError(f"{release} cannot be trusted: no public key was given; name one with --public-keys")
    if manifest.signature is None:
        raise SignatureError(f"{release} is not signed; build it with a key (`reelway release build --key ...`)")
    try:
        signature = base64.b64decode(manifest.signature, validate=True)
    except (binascii.Error, ValueError) as error:
        raise SignatureError(f"{release} has a signature that is not base64: {manifest.signature[:20]!r}") from error
    body = manifest.canonical_bytes()
    for key in keys:
        try:
            key.verify(signature, body)
        except InvalidSignature:
            continue
        return key
    trusted = ", ".join(fingerprint(key) for key in keys)
    raise SignatureError(
        f"{release} is signed by none of the trusted keys ({trusted}); its manifest was changed, or "
        "the builder's public key is missing from the trusted keys"
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SignatureError(
            f"cannot read key {path}: {error.strerror or error}; create a pair with `reelway release keys`"
        ) from error


def _load_public_key(path: Path) -> Ed25519PublicKey:
    try:
        key = serialization.load_pem_public_key(_read(path))
    except ValueError as error:
        raise SignatureError(f"{path} is not a public key in PEM: {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise SignatureError(f"{path} holds a {type(key).__name__}, expected an Ed25519 public key")
    return key
