"""Who may ask, over HTTP: status, challenge, counts, and what a request costs before it is read."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from tests.support.serving.caller_access import CREDENTIAL, INTERNAL, open_access
from tests.support.serving.one_video_service import OneVideoService

from reelway.platform.rollout.traffic.access_options import AccessOptions, GatewayOptions, JwtOptions, RateLimit
from reelway.platform.viewer_assertions import ViewerTokenSigner, create_viewer_key, gateway_header, read_viewer_key
from reelway.serving.access import ViewerAccess, build_viewer_access
from reelway.serving.access.viewer_access import describe_access
from reelway.serving.http_api import build_http_api

WIDE = RateLimit(per_second=1000, burst=100_000)
NARROW = RateLimit(per_second=0.001, burst=3)


class Service:
    """The HTTP API with one video for every viewer, and tokens of its viewers."""

    def __init__(self, folder: Path, **options: Any) -> None:
        public = create_viewer_key(folder / "viewers.pem")
        self.signer = ViewerTokenSigner(read_viewer_key(folder / "viewers.pem"), audience="reelway")
        jwt = JwtOptions(keys_file=public, audience="reelway")
        whole = {"mode": "jwt", "jwt": jwt, "per_address": WIDE, "per_viewer": WIDE, **options}
        access = build_viewer_access(AccessOptions(**whole), CREDENTIAL, lambda: None, behind_haproxy=True)
        self.service = OneVideoService()
        self.client = TestClient(build_http_api(self.service, access), raise_server_exceptions=False)

    def bearer(self, viewer_id: int, **options: Any) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.signer.sign(viewer_id, **options)}"}

    def ask(self, viewer_id: int, headers: dict[str, str]) -> int:
        return self.client.post("/v1/recommend", json={"viewer_id": viewer_id}, headers=headers).status_code


@pytest.fixture
def guarded(tmp_path: Path) -> Service:
    return Service(tmp_path)


def test_viewer_with_a_token_is_answered(guarded: Service) -> None:
    assert guarded.ask(7, guarded.bearer(7)) == 200
    report = {"outcomes": [{"token": "t", "type": "like"}]}
    assert guarded.client.post("/v1/outcomes", json=report, headers=guarded.bearer(7)).status_code == 200
    assert guarded.service.proven == [True, 7]
    assert guarded.client.get("/healthz").json() == {"status": "ok", "authentication": "jwt"}


def test_another_viewer_is_forbidden(guarded: Service) -> None:
    answer = guarded.client.post("/v1/recommend", json={"viewer_id": 8}, headers=guarded.bearer(7))
    assert answer.status_code == 403
    assert answer.json() == {
        "error": "viewer_id 8: the proven identity is another viewer; ask for that viewer", "fields": []
    }  # fmt: skip
    assert (guarded.service.denied, guarded.service.requests) == (["viewer"], [])


@pytest.mark.parametrize("path", ["/v1/recommend", "/v1/outcomes"])
@pytest.mark.parametrize(
    ("headers", "reason", "challenge"),
    [
        (lambda _: {}, "missing", 'Bearer realm="reelway"'),
        (lambda guarded: guarded.bearer(7, now_s=time.time() - 7200), "expired", ', error="invalid_token"'),
        (lambda _: {"Authorization": "Bearer nonsense"}, "malformed", ', error="invalid_token"'),
        (lambda _: {"Reelway-Internal": "0" * 64}, "missing", 'Bearer realm="reelway"'),
    ],
)
def test_unproven_request_is_refused_before_it_is_read(
    guarded: Service, path: str, headers: Callable[[Service], dict[str, str]], reason: str, challenge: str
) -> None:
    """The body is neither JSON nor within the limit, and its errors do not show."""
    answer = guarded.client.post(path, content=b"{" * 2_000_000, headers=headers(guarded))
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"].endswith(challenge)
    assert set(answer.json()) == {"error", "fields"}
    assert guarded.service.denied == [reason]


@pytest.mark.parametrize(
    "path",
    ["/metrics", "/docs", "/redoc", "/docs/oauth2-redirect", "/openapi.json", "/v1/releases/current", "/v1", "/",
     "/v1/recommend/", "//v1/releases/current", "/v1/releases/current/", "/HEALTHZ", "/healthz/"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS"])
def test_internal_path_does_not_exist_for_a_client(tmp_path: Path, path: str, method: str) -> None:
    """Neither without authentication nor with a viewer's proof."""
    guarded = Service(tmp_path)
    open_to_all = TestClient(build_http_api(OneVideoService(), open_access()))
    for client, headers in ((guarded.client, guarded.bearer(7)), (open_to_all, {})):
        answer = client.request(method, path, headers=headers)
        assert answer.status_code == 404
        assert method == "HEAD" or answer.json() == {"error": "Not Found", "fields": []}
        assert "salt" not in answer.text


def test_no_answer_to_a_client_has_the_salt(guarded: Service) -> None:
    current = guarded.client.get("/v1/releases/current", headers=INTERNAL)
    salt = current.json()["salt"]
    answers = [
        guarded.client.post("/v1/recommend", json={"viewer_id": 7}, headers=guarded.bearer(7)),
        guarded.client.get("/healthz"),
    ]
    assert salt
    assert not [answer.text for answer in answers if salt in answer.text]


def test_service_itself_needs_no_proof(guarded: Service) -> None:
    assert guarded.ask(3, INTERNAL) == 200
    assert guarded.service.proven == [False]  # such a slate is no evidence


def test_viewer_above_its_rate_gets_429(tmp_path: Path) -> None:
    guarded = Service(tmp_path, per_viewer=NARROW)
    assert [guarded.ask(7, guarded.bearer(7)) for _ in range(5)] == [200, 200, 200, 429, 429]
    assert guarded.ask(8, guarded.bearer(8)) == 200
    answer = guarded.client.post("/v1/recommend", json={"viewer_id": 7}, headers=guarded.bearer(7))
    assert 1 <= int(answer.headers["Retry-After"]) <= 1000
    assert answer.json()["error"].startswith("more than 0.001 requests per second of this viewer")
    assert guarded.service.denied == ["viewer_rate"] * 3


def test_forged_requests_do_not_use_up_a_viewers_rate(tmp_path: Path) -> None:
    guarded = Service(tmp_path, per_viewer=NARROW)
    for _ in range(10):
        assert guarded.ask(7, {}) == 401
    assert guarded.ask(7, guarded.bearer(7)) == 200


def test_address_above_its_rate_gets_429_before_its_proof_is_verified(tmp_path: Path) -> None:
    guarded = Service(tmp_path, per_address=NARROW)
    here = {"X-Forwarded-For": "6.6.6.6, 9.9.9.9"}
    assert [guarded.ask(7, {**guarded.bearer(7), **here}) for _ in range(4)] == [200, 200, 200, 429]
    assert guarded.ask(7, {**here, "X-Forwarded-For": "1.2.3.4, 9.9.9.9"}) == 429  # an invented entry changes nothing
    assert guarded.ask(7, {**guarded.bearer(7), "X-Forwarded-For": "9.9.9.8"}) == 200
    assert guarded.service.denied == ["address_rate"] * 2


def test_loopback_address_has_no_limit(tmp_path: Path) -> None:
    guarded = Service(tmp_path, per_address=NARROW)
    near = {**guarded.bearer(7), "X-Forwarded-For": "127.0.0.1"}
    assert {guarded.ask(7, near) for _ in range(10)} == {200}


def test_limits_can_be_turned_off(tmp_path: Path) -> None:
    off = RateLimit(per_second=0, burst=1)
    guarded = Service(tmp_path, per_address=off, per_viewer=off)
    assert {guarded.ask(7, {**guarded.bearer(7), "X-Forwarded-For": "9.9.9.9"}) for _ in range(10)} == {200}


def test_gateway_proves_the_viewer(tmp_path: Path) -> None:
    secret = b"a secret of the gateway"
    (tmp_path / "gateway.keys").write_bytes(secret)
    gateway = GatewayOptions(keys_file=tmp_path / "gateway.keys")
    guarded = Service(tmp_path, mode="gateway", jwt=None, gateway=gateway)
    signed = {"Reelway-Viewer": gateway_header(secret, 7, time.time())}
    assert guarded.ask(7, signed) == 200
    assert guarded.ask(8, signed) == 403
    assert guarded.ask(7, {}) == 401
    assert guarded.ask(7, guarded.bearer(7)) == 401


def test_service_without_keys_answers_503(tmp_path: Path) -> None:
    guarded = Service(tmp_path, jwt=JwtOptions(jwks_url="http://127.0.0.1:9/keys", audience="reelway"))
    answer = guarded.client.post("/v1/recommend", json={"viewer_id": 7}, headers=guarded.bearer(7))
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    assert guarded.service.denied == ["no_keys"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (AccessOptions(), "authentication is off: a client may ask for any viewer"),
        (AccessOptions(mode="jwt", jwt=JwtOptions(jwks_url="https://x", audience="a")), "authentication is 'jwt'"),
    ],
)
def test_start_states_who_may_ask(options: AccessOptions, text: str) -> None:
    assert describe_access(options).startswith(text)


def test_access_options_name_what_is_missing() -> None:
    for options, text in (
        ({"mode": "jwt"}, "jwt: missing, and mode is 'jwt'"),
        ({"jwt": {"audience": "a", "jwks_url": "https://x"}}, "jwt: set, and mode is 'off'"),
        ({"mode": "jwt", "jwt": {"audience": "a"}}, "jwks_url, keys_file: exactly one of them is needed"),
    ):
        with pytest.raises(ValueError, match=text):
            AccessOptions.model_validate(options)
    assert AccessOptions.model_validate({"mode": False}).mode == "off"  # YAML reads off as a boolean


def test_open_service_lets_anyone_ask() -> None:
    service = OneVideoService()
    access: ViewerAccess = open_access()
    client = TestClient(build_http_api(service, access))
    assert client.post("/v1/recommend", json={"viewer_id": 5}).status_code == 200
    report = {"outcomes": [{"token": "t", "type": "like"}]}
    assert client.post("/v1/outcomes", json=report).status_code == 200
    assert service.proven == [False, None]
