"""Public keys of JSON Web Tokens: reads them from a file or a URL, and says which algorithms each key verifies."""

from __future__ import annotations

import json
import logging
import re
import ssl
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from jwt import PyJWK
from jwt.exceptions import PyJWTError

from reelway.platform.errors import ConfigError
from reelway.platform.rollout.traffic.access_options import JwtOptions

log = logging.getLogger(__name__)

PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | ed448.Ed448PublicKey

MAX_KEYS_BYTES: Final = 1 << 20
MAX_KEYS: Final = 64
MIN_RSA_BITS: Final = 2048
TIMEOUT_S: Final = 3.0
_RSA: Final = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
_CURVES: Final = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
_IGNORED: Final = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "alg"})
"""Members of a JWK: those of a private key, and the algorithm, which is compared with the setting."""
_ADVICE: Final = "publish one, or accept its algorithm in the setting algorithms"
_ADVICE_PRIVATE: Final = "it has a private key; name its public key, such as viewers-public.pem beside viewers.pem"
_PEM_KEY: Final = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)


@dataclass(frozen=True)
class VerificationKey:
    """A public key, with the id and the algorithms that a token must name."""

    key_id: str | None  # None: tokens name no key, or any
    key: PublicKey
    algorithms: frozenset[str]


class KeySet:
    """Verification keys that were read together. A new key set is another object."""

    def __init__(self, keys: Sequence[VerificationKey]) -> None:
        self._keys = tuple(keys)

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, key_id: str | None, algorithm: str) -> list[VerificationKey]:
        """Returns the keys that may verify a token. A token without a key id, and a key without one, fit any."""
        return [
            one
            for one in self._keys
            if algorithm in one.algorithms and (key_id is None or one.key_id in (None, key_id))
        ]


def key_reader(options: JwtOptions) -> Callable[[], KeySet]:
    """Returns the function that reads the key set; it blocks."""
    allowed = frozenset(options.algorithms)
    if options.keys_file is not None:
        path = options.keys_file
        return lambda: parse_keys(path.read_bytes(), allowed, str(path))
    assert options.jwks_url is not None, "the options have a file or a URL"
    return partial(_fetch_keys, options.jwks_url, options.ca_file, allowed)


def parse_keys(text: bytes, allowed: Collection[str], source: str) -> KeySet:
    """Returns the usable keys of a key set (JWKS, RFC 7517), or of public keys in PEM format.

    Keys of other types or for another use, and secrets of MACs, are left out.

    Raises:
        ConfigError: if no key is usable.
    """
    if text.lstrip().startswith(b"-----BEGIN"):
        candidates = [_pem_key(block) for block in _PEM_KEY.findall(text)]
    else:
        candidates = [_jwk(one) for one in _entries(text, source)]
    keys = []
    for key_id, key, named in candidates:
        algorithms = _algorithms(key) & set(allowed) & ({named} if named else set(allowed))
        if key is not None and algorithms:
            keys.append(VerificationKey(key_id, key, frozenset(algorithms)))
    if not keys:
        raise ConfigError(
            f"{source}: none of {len(candidates)} keys is a public key for {', '.join(sorted(allowed))}; "
            f"{_ADVICE_PRIVATE if b'PRIVATE KEY' in text else _ADVICE}"
        )
    return KeySet(keys[:MAX_KEYS])


def _fetch_keys(url: str, ca_file: Path | None, allowed: Collection[str]) -> KeySet:
    context = ssl.create_default_context(cafile=ca_file)
    with (
        httpx.Client(timeout=TIMEOUT_S, verify=context) as client,
        client.stream("GET", url, headers={"Accept": "application/json"}) as answer,
    ):
        if answer.status_code != 200:
            raise ConfigError(f"{url}: answered {answer.status_code}, expected a key set")
        text = b""
        for chunk in answer.iter_bytes():
            text += chunk
            if len(text) > MAX_KEYS_BYTES:
                raise ConfigError(f"{url}: more than {MAX_KEYS_BYTES} bytes, expected a key set")
    return parse_keys(text, allowed, url)


def _entries(text: bytes, source: str) -> list[Any]:
    try:
        keys = json.loads(text)["keys"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{source}: neither a key set (JSON) nor keys in PEM format: {error!r}") from error
    return keys if isinstance(keys, list) else []


def _jwk(entry: Any) -> tuple[str | None, PublicKey | None, str | None]:
    if not isinstance(entry, dict) or entry.get("kty") not in ("RSA", "EC", "OKP") or entry.get("use", "sig") != "sig":
        return None, None, None
    key_id, named = entry.get("kid"), entry.get("alg")
    public = {name: value for name, value in entry.items() if name not in _IGNORED}
    try:
        key = PyJWK.from_dict(public).key
    except (PyJWTError, ValueError, TypeError, KeyError) as error:
        log.warning("key %r of the key set is not usable: %s", key_id, error)
        return None, None, None
    return (key_id if isinstance(key_id, str) else None), key, (named if isinstance(named, str) else None)


def _pem_key(block: bytes) -> tuple[str | None, PublicKey | None, str | None]:
    try:
        key = load_pem_public_key(block)
    except (ValueError, UnsupportedAlgorithm) as error:
        log.warning("a key in PEM format is not usable: %s", error)
        return None, None, None
    return None, key if isinstance(key, PublicKey) else None, None


def _algorithms(key: PublicKey | None) -> set[str]:
    """Returns the algorithms that a key verifies; none for a short RSA key and an unknown curve."""
    if isinstance(key, rsa.RSAPublicKey):
        return set(_RSA) if key.key_size >= MIN_RSA_BITS else set()
    if isinstance(key, ec.EllipticCurvePublicKey):
        return {_CURVES[key.curve.name]} if key.curve.name in _CURVES else set()
    return {"EdDSA"} if key is not None else set()
