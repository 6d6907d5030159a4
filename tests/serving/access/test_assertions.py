"""Proofs of identity: tokens and gateway headers, with real keys and a real key server."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from reelway.platform.contracts.ids import MAX_ID
from reelway.platform.errors import ConfigError
from reelway.platform.rollout.control.webhook import serve_in_thread
from reelway.platform.rollout.traffic.access_options import GatewayOptions, JwtOptions
from reelway.platform.viewer_assertions import (
    ViewerTokenSigner,
    create_viewer_key,
    gateway_header,
    read_viewer_key,
)
from reelway.serving.access.assertions import GatewayVerifier, JwtVerifier
from reelway.serving.access.errors import KeysUnavailableError, UnauthenticatedError
from reelway.serving.access.refreshed import MIN_INTERVAL_S
from reelway.serving.access.verification_keys import parse_keys

NOW = int(time.time())  # when the tests were collected; some of them run half an hour later
DAY_S = 86_400
RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
ED_KEY = ed25519.Ed25519PrivateKey.generate()
OTHER_KEY = ed25519.Ed25519PrivateKey.generate()


def pem(key: Any) -> bytes:
    return key.public_key().public_bytes(  # type: ignore[no-any-return]
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def jwk(key: Any, **more: str) -> dict[str, Any]:
    algorithms: dict[type, Any] = {
        rsa.RSAPrivateKey: jwt.algorithms.RSAAlgorithm,
        ec.EllipticCurvePrivateKey: jwt.algorithms.ECAlgorithm,
        ed25519.Ed25519PrivateKey: jwt.algorithms.OKPAlgorithm,
    }
    (algorithm,) = [one for kind, one in algorithms.items() if isinstance(key, kind)]
    return {**json.loads(algorithm.to_jwk(key.public_key())), **more}


def claims(**changes: Any) -> dict[str, Any]:
    whole = {"sub": "7", "aud": "reelway", "iss": "https://id", "exp": NOW + DAY_S, **changes}
    return {name: value for name, value in whole.items() if value is not None}


def token(key: Any = ED_KEY, algorithm: str = "EdDSA", headers: dict[str, Any] | None = None, **changes: Any) -> str:
    return jwt.encode(claims(**changes), key, algorithm=algorithm, headers=headers)


def bearer(text: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"x"), (b"authorization", b"Bearer " + text.encode())]


Verify = Callable[[str], int]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": [jwk(ED_KEY, kid="ed"), jwk(RSA_KEY, kid="rsa"), jwk(EC_KEY, kid="ec")]}))
    return path


def verifier(keys: Path, **options: Any) -> JwtVerifier:
    return JwtVerifier(JwtOptions(keys_file=keys, audience="reelway", issuer="https://id", **options), lambda: None)


def reason(keys: Path, text: str, **options: Any) -> str:
    with pytest.raises(UnauthenticatedError) as refused:
        asyncio.run(verifier(keys, **options).verify(bearer(text)))
    assert refused.value.headers["WWW-Authenticate"].startswith('Bearer realm="reelway"')
    return refused.value.reason


@pytest.mark.parametrize(("key", "algorithm"), [(ED_KEY, "EdDSA"), (RSA_KEY, "RS256"), (EC_KEY, "ES256")])
def test_token_of_each_default_algorithm_is_accepted(keys: Path, key: Any, algorithm: str) -> None:
    assert asyncio.run(verifier(keys).verify(bearer(token(key, algorithm)))) == 7


def _unsigned(header: dict[str, Any], body: dict[str, Any], signature: bytes = b"") -> str:
    parts = [json.dumps(header).encode(), json.dumps(body).encode(), signature]
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"exp": NOW - 60}, "expired"),
        ({"exp": None}, "claims"),
        ({"exp": "soon"}, "malformed"),
        ({"nbf": NOW + DAY_S}, "not_yet_valid"),
        ({"iat": NOW + DAY_S}, "not_yet_valid"),
        ({"aud": "other"}, "audience"),
        ({"aud": None}, "claims"),
        ({"iss": "https://evil"}, "issuer"),
        ({"iss": None}, "claims"),
        ({"sub": None}, "claims"),
        ({"sub": "alice"}, "subject"),
        ({"sub": "007"}, "subject"),
        ({"sub": "٣"}, "subject"),
        ({"sub": "-1"}, "subject"),
        ({"sub": str(MAX_ID + 1)}, "subject"),
        ({"sub": True}, "subject"),
        ({"sub": 7.0}, "subject"),
        ({"sub": ["7"]}, "subject"),
    ],
)
def test_token_with_a_wrong_claim_is_refused(keys: Path, changes: dict[str, Any], expected: str) -> None:
    text = _signed(claims(**changes))
    assert reason(keys, text) == expected


def _signed(body: dict[str, Any], key: ed25519.Ed25519PrivateKey = ED_KEY) -> str:
    """Signs any claims; PyJWT refuses to write some of them."""
    head = _unsigned({"alg": "EdDSA", "kid": "ed"}, body).rsplit(".", 1)[0]
    return head + "." + base64.urlsafe_b64encode(key.sign(head.encode())).rstrip(b"=").decode()


def test_token_without_a_signature_is_refused(keys: Path) -> None:
    assert reason(keys, _unsigned({"alg": "none"}, claims())) == "algorithm"
    assert reason(keys, _unsigned({"alg": "None", "kid": "ed"}, claims())) == "algorithm"
    assert reason(keys, _unsigned({"alg": "EdDSA", "kid": "ed"}, claims())) == "signature"


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
def test_public_key_is_no_secret_of_a_mac(keys: Path, algorithm: str) -> None:
    """The attacker signs with the published key as the secret of an HMAC (RFC 8725, section 2.1)."""
    digest = {"HS256": hashlib.sha256, "HS384": hashlib.sha384, "HS512": hashlib.sha512}[algorithm]
    head = _unsigned({"alg": algorithm, "kid": "rsa"}, claims()).rsplit(".", 1)[0]
    signature = hmac.new(pem(RSA_KEY), head.encode(), digest).digest()
    text = head + "." + base64.urlsafe_b64encode(signature).rstrip(b"=").decode()
    assert reason(keys, text) == "algorithm"
    with pytest.raises(ValueError, match="algorithms"):
        JwtOptions(keys_file=keys, audience="reelway", algorithms=(algorithm,))  # type: ignore[arg-type]


def test_token_of_another_algorithm_than_its_key_is_refused(keys: Path) -> None:
    head = _unsigned({"alg": "RS256", "kid": "ed"}, claims()).rsplit(".", 1)[0]
    text = head + "." + base64.urlsafe_b64encode(ED_KEY.sign(head.encode())).rstrip(b"=").decode()
    assert reason(keys, text) == "unknown_key"


def test_token_of_another_key_is_refused(keys: Path) -> None:
    assert reason(keys, token(OTHER_KEY)) == "signature"
    assert reason(keys, token(OTHER_KEY, headers={"kid": "ed"})) == "signature"
    assert reason(keys, token(OTHER_KEY, headers={"kid": "other"})) == "unknown_key"


@pytest.mark.parametrize("text", ["", "x", "a.b.c", "..", "\xe9.a.b", "é" * 50, "A" * 9000, token() + "x"])
def test_text_that_is_no_token_is_refused(keys: Path, text: str) -> None:
    assert reason(keys, text) in {"malformed", "signature"}


@pytest.mark.parametrize("header", [{"crit": ["x"]}, {"kid": 5}])
def test_token_with_an_unusable_header_is_refused(keys: Path, header: dict[str, Any]) -> None:
    head = _unsigned({"alg": "EdDSA", **header}, claims()).rsplit(".", 1)[0]
    text = head + "." + base64.urlsafe_b64encode(ED_KEY.sign(head.encode())).rstrip(b"=").decode()
    assert reason(keys, text) == "malformed"


@pytest.mark.parametrize(
    "headers",
    [[], [(b"authorization", b"Basic eDp5")], [*bearer(token()), *bearer(token())], [(b"authorization", b"Bearer")]],
)
def test_request_without_one_bearer_token_is_refused(keys: Path, headers: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(UnauthenticatedError) as refused:
        asyncio.run(verifier(keys).verify(headers))
    assert refused.value.reason == ("missing" if not headers else "malformed")
    challenge = refused.value.headers["WWW-Authenticate"]
    assert challenge == ('Bearer realm="reelway"' if not headers else 'Bearer realm="reelway", error="invalid_token"')


def test_another_claim_may_have_the_viewer_id(keys: Path) -> None:
    text = token(sub="alice", viewer=9)
    assert asyncio.run(verifier(keys, viewer_claim="viewer").verify(bearer(text))) == 9


def test_remembered_token_expires(keys: Path) -> None:
    remembering, expires = verifier(keys, leeway_s=0), int(time.time()) + 2
    text = token(exp=expires)

    async def ask() -> None:
        assert await remembering.verify(bearer(text)) == 7
        assert await remembering.verify(bearer(text)) == 7
        while time.time() < expires:
            await asyncio.sleep(0.05)
        with pytest.raises(UnauthenticatedError, match="expired"):
            await remembering.verify(bearer(text))

    asyncio.run(ask())


def test_short_rsa_key_and_encryption_key_are_left_out() -> None:
    short = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    secret = {"kty": "oct", "k": "c2VjcmV0", "kid": "mac", "alg": "HS256"}
    entries = [
        jwk(short),
        jwk(ED_KEY, use="enc"),
        secret,
        "x",
        {"kty": "RSA"},
        {"kty": "OKP", "crv": "X25519", "x": "AA"},
    ]
    with pytest.raises(ConfigError, match="none of 6 keys is a public key for EdDSA, RS256"):
        parse_keys(json.dumps({"keys": entries}).encode(), ["EdDSA", "RS256"], "keys")
    assert len(parse_keys(json.dumps({"keys": [*entries, jwk(ED_KEY)]}).encode(), ["EdDSA"], "keys")) == 1


def test_pem_file_may_have_several_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.pem"
    path.write_bytes(pem(OTHER_KEY) + pem(ED_KEY) + pem(RSA_KEY))
    assert asyncio.run(verifier(path).verify(bearer(token(headers={"kid": "any"})))) == 7
    assert asyncio.run(verifier(path).verify(bearer(token(RSA_KEY, "RS256")))) == 7


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b'{"keys": 5}', b'{"keys": []}', b"-----BEGIN X-----", b"\xff"])
def test_file_without_keys_is_refused_by_name(text: bytes) -> None:
    with pytest.raises(ConfigError, match=r"^keys\.json: "):
        parse_keys(text, ["EdDSA"], "keys.json")


class KeyServer:
    """A real HTTP server that publishes keys."""

    def __init__(self) -> None:
        self.keys: list[dict[str, Any]] = [jwk(ED_KEY, kid="a")]
        self.status = 200
        self.delay_s = 0.0
        self.requests = 0

    async def answer(self, _: Request) -> JSONResponse:
        self.requests += 1
        await asyncio.sleep(self.delay_s)
        return JSONResponse({"keys": self.keys}, self.status)


@contextmanager
def key_server() -> Iterator[tuple[KeyServer, str]]:
    server = KeyServer()
    with serve_in_thread(Starlette(routes=[Route("/jwks", server.answer)]), "127.0.0.1", 0) as url:
        yield server, f"{url}/jwks"


class RemoteKeys:
    """A verifier that reads the keys of a server; its clock is virtual."""

    def __init__(self, url: str) -> None:
        self.faults = 0
        options = JwtOptions(jwks_url=url, audience="reelway", issuer="https://id", refresh_s=300)
        self.verifier = JwtVerifier(options, self.fault)
        self.now = 0.0
        self.verifier._keys._clock = lambda: self.now

    def fault(self) -> None:
        self.faults += 1

    async def reason(self, text: str) -> str:
        with pytest.raises(UnauthenticatedError) as refused:
            await self.verifier.verify(bearer(text))
        return refused.value.reason

    async def settled(self) -> None:
        reading = self.verifier._keys._reading
        if reading is not None:
            await reading


@pytest.mark.parametrize("prepared", [True, False])
def test_keys_are_fetched_once(prepared: bool) -> None:
    with key_server() as (server, url):

        async def ask() -> None:
            remote = RemoteKeys(url)
            if prepared:
                await remote.verifier.prepare()
                assert server.requests == 1
            texts = [token(headers={"kid": "a"}, sub=str(viewer)) for viewer in range(20)]
            assert await asyncio.gather(*(remote.verifier.verify(bearer(text)) for text in texts)) == list(range(20))

        asyncio.run(ask())
        assert server.requests == 1


def test_unknown_key_id_fetches_the_keys_at_a_bounded_rate() -> None:
    with key_server() as (server, url):

        async def ask() -> None:
            remote = RemoteKeys(url)
            await remote.verifier.verify(bearer(token(headers={"kid": "a"})))
            server.keys.append(jwk(OTHER_KEY, kid="b"))
            for _ in range(50):
                assert await remote.reason(token(OTHER_KEY, headers={"kid": "b"})) == "unknown_key"
            assert server.requests == 1  # the keys were read just before
            remote.now += MIN_INTERVAL_S
            assert await remote.verifier.verify(bearer(token(OTHER_KEY, headers={"kid": "b"}))) == 7
            for number in range(50):
                assert await remote.reason(token(OTHER_KEY, headers={"kid": f"{number}"})) == "unknown_key"
            assert server.requests == 2

        asyncio.run(ask())


def test_failed_refresh_keeps_the_keys() -> None:
    with key_server() as (server, url):

        async def ask() -> None:
            remote = RemoteKeys(url)
            text = token(headers={"kid": "a"})
            await remote.verifier.verify(bearer(text))
            for status, keys in ((500, server.keys), (200, [])):
                server.status, server.keys = status, keys
                remote.now += 1000
                assert await remote.verifier.verify(bearer(text)) == 7
                await remote.settled()
                assert await remote.verifier.verify(bearer(text)) == 7
            assert (server.requests, remote.faults) == (3, 2)

        asyncio.run(ask())


def test_withdrawn_key_verifies_no_remembered_token() -> None:
    with key_server() as (server, url):

        async def ask() -> None:
            remote = RemoteKeys(url)
            text = token(headers={"kid": "a"})
            await remote.verifier.verify(bearer(text))
            server.keys = [jwk(OTHER_KEY, kid="b")]
            remote.now += 1000
            await remote.verifier.verify(bearer(text))  # does not wait for the new keys
            await remote.settled()
            assert await remote.reason(text) == "unknown_key"

        asyncio.run(ask())


def test_slow_key_server_does_not_hold_the_event_loop() -> None:
    with key_server() as (server, url):

        async def ask() -> float:
            remote = RemoteKeys(url)
            server.delay_s = 0.5
            waiting = asyncio.create_task(remote.verifier.verify(bearer(token(headers={"kid": "a"}))))
            longest_s = 0.0
            while not waiting.done():
                before = time.perf_counter()
                await asyncio.sleep(0.005)
                longest_s = max(longest_s, time.perf_counter() - before)
            assert await waiting == 7
            return longest_s

        assert asyncio.run(ask()) < 0.4


def test_service_without_keys_is_unavailable(tmp_path: Path) -> None:
    async def ask() -> None:
        remote = RemoteKeys("http://127.0.0.1:9/jwks")
        with pytest.raises(KeysUnavailableError) as refused:
            await remote.verifier.verify(bearer(token()))
        assert (refused.value.status, remote.faults) == (503, 1)

    asyncio.run(ask())
    path = tmp_path / "keys.json"

    async def appears() -> None:
        missing = verifier(path)
        missing._keys._min_interval_s = 0.0
        with pytest.raises(KeysUnavailableError):
            await missing.verify(bearer(token()))
        path.write_text(json.dumps({"keys": [jwk(ED_KEY)]}))
        assert await missing.verify(bearer(token())) == 7

    asyncio.run(appears())


def test_own_tokens_are_accepted(tmp_path: Path) -> None:
    private = tmp_path / "viewers.pem"
    public = create_viewer_key(private)
    assert private.stat().st_mode & 0o077 == 0
    signer = ViewerTokenSigner(read_viewer_key(private), audience="reelway", issuer="https://id", lifetime_s=60)
    assert asyncio.run(verifier(public).verify(bearer(signer.sign(5)))) == 5
    assert reason(public, signer.sign(5, time.time() - 120)) == "expired"
    with pytest.raises(ConfigError, match="exists already"):
        create_viewer_key(private)
    with pytest.raises(ConfigError, match="not a private key in PEM format"):
        read_viewer_key(public)


GATEWAY_SECRET = b"a secret of the gateway"


class Gateway:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "gateway.keys"
        self.path.write_bytes(b"another secret, in use before\n" + GATEWAY_SECRET + b"\n")
        self.verifier = GatewayVerifier(GatewayOptions(keys_file=self.path), lambda: None, clock=lambda: float(NOW))

    def verify(self, *values: bytes) -> int:
        return asyncio.run(self.verifier.verify([(b"reelway-viewer", value) for value in values]))

    def reason(self, *values: bytes) -> str:
        with pytest.raises(UnauthenticatedError) as refused:
            self.verify(*values)
        assert refused.value.headers["WWW-Authenticate"].startswith('Reelway-Viewer realm="reelway"')
        return refused.value.reason


@pytest.fixture
def gateway(tmp_path: Path) -> Gateway:
    return Gateway(tmp_path)


@pytest.mark.parametrize("age_s", [-29, 0, 60, 89])
def test_header_of_the_gateway_is_accepted(gateway: Gateway, age_s: int) -> None:
    assert gateway.verify(gateway_header(GATEWAY_SECRET, 12, NOW - age_s).encode()) == 12


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (gateway_header(GATEWAY_SECRET, 12, NOW - 91), "expired"),
        (gateway_header(GATEWAY_SECRET, 12, NOW + 31), "not_yet_valid"),
        (gateway_header(b"not the secret of the gateway", 12, NOW), "signature"),
        (gateway_header(GATEWAY_SECRET, 12, NOW).replace("12.", "13.", 1), "signature"),
        (gateway_header(GATEWAY_SECRET, MAX_ID + 1, NOW), "subject"),
        (f"12.{NOW}", "malformed"),
        (f"12.{NOW}.", "signature"),
        ("12", "malformed"),
        (f"12.-5.{'0' * 64}", "malformed"),
        ("", "malformed"),
    ],
    ids=range(10),
)
def test_header_that_the_gateway_did_not_sign_is_refused(gateway: Gateway, value: str, expected: str) -> None:
    assert gateway.reason(value.encode()) == expected


def test_gateway_header_is_needed_once(gateway: Gateway) -> None:
    assert gateway.reason() == "missing"
    valid = gateway_header(GATEWAY_SECRET, 12, NOW).encode()
    assert gateway.reason(valid, valid) == "malformed"
