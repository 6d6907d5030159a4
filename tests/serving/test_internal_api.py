"""The internal API before a service, over real HTTP."""

from __future__ import annotations

import httpx
import pytest
from tests.support.serving.caller_access import CREDENTIAL, open_access
from tests.support.serving.one_video_service import OneVideoService

from reelway.platform.rollout.control.webhook import serve_in_thread
from reelway.serving.access import InternalCredential
from reelway.serving.free_ports import find_free_port
from reelway.serving.http_api import build_http_api
from reelway.serving.internal_api import FORWARDED, build_internal_api


def test_internal_port_answers_what_the_public_port_hides() -> None:
    service = build_http_api(OneVideoService(), open_access())
    with (
        serve_in_thread(service, "127.0.0.1", 0) as public,
        serve_in_thread(build_internal_api(public, CREDENTIAL), "127.0.0.1", 0) as internal,
        serve_in_thread(build_internal_api(public, InternalCredential([b"another secret"])), "127.0.0.1", 0) as other,
        httpx.Client(trust_env=False) as client,
    ):
        for path in ("/metrics", "/v1/releases/current", "/openapi.json", "/docs"):
            assert client.get(internal + path).status_code == 200, path
            assert client.get(public + path).status_code == 404, path
            assert client.get(other + path).status_code == 404, path
        assert client.get(f"{internal}/metrics").headers["content-type"].startswith("text/plain")
        assert client.get(f"{internal}/v1/releases/current").json()["salt"] == "reelway"
        for path in ("/v1/recommend", "/v1/outcomes", "/", "/v1/../metrics/x"):
            assert client.get(internal + path).status_code == 404, path
        assert client.post(f"{internal}/v1/recommend", json={"viewer_id": 1}).status_code == 404
        assert client.post(f"{internal}/metrics").status_code == 405


@pytest.mark.parametrize("path", FORWARDED)
def test_internal_port_reports_that_the_service_is_down(path: str) -> None:
    nowhere = f"http://127.0.0.1:{find_free_port('127.0.0.1')}"
    with serve_in_thread(build_internal_api(nowhere, CREDENTIAL), "127.0.0.1", 0) as internal:
        answer = httpx.get(internal + path, trust_env=False)
    assert answer.status_code == 502
    assert answer.json()["error"].startswith(f"{nowhere}: no answer: ")
