"""Malformed and hostile requests to the catalogue's API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing

import httpx
import pytest
from tests.support.dimensions import DIMENSIONS
from tests.support.hostile_requests import REQUESTS, Endpoint, HostileRequest, check_hostile, error_only, send, too_long

from reelway.platform.cli.catalogue.catalogue_api import BODY_LIMIT, CATALOGUE_PATH, MAX_CHANGES, catalogue_application
from reelway.platform.eventlog.catalogue_log import CataloguePublisher
from reelway.platform.rollout.control.webhook import serve_in_thread

TOKEN = "catalogue-token-of-the-tests"
TAKEDOWN = {"op": "takedown", "video_id": 1, "reason": "x"}
CHANGES = [
    *too_long(BODY_LIMIT.max_bytes),
    HostileRequest("changes in an object", body=b'{"changes": {}}'),
    HostileRequest("too many changes", body=b'{"changes": [%b{}]}' % (b"{}," * MAX_CHANGES)),
    HostileRequest("no token", 401, b"{}", {"Authorization": None}),
    HostileRequest("a token beyond ASCII", 401, b"{}", {"Authorization": "Bearer \xe9\xff"}),
]


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with (
        closing(CataloguePublisher(tmp_path_factory.mktemp("run") / "events")) as publisher,
        serve_in_thread(catalogue_application(publisher, TOKEN, DIMENSIONS), "127.0.0.1", 0) as url,
    ):

        def counted() -> float:
            lines = httpx.get(f"{url}/metrics").text.splitlines()
            return sum(
                float(one.split()[-1]) for one in lines if one.startswith("reelway_catalogue_rejected_requests_total{")
            )

        port, valid = int(url.rsplit(":", 1)[1]), json.dumps({"changes": [TAKEDOWN]}).encode()
        yield Endpoint(port, CATALOGUE_PATH, valid, 422, counted, error_only, {"Authorization": f"Bearer {TOKEN}"})


@pytest.mark.parametrize(
    "hostile", [*(one for one in REQUESTS if one.status != 408), *CHANGES], ids=lambda one: one.name
)
def test_hostile_request_gets_a_documented_4xx(
    endpoint: Endpoint, caplog: pytest.LogCaptureFixture, hostile: HostileRequest
) -> None:
    check_hostile(endpoint, hostile, caplog)


@pytest.mark.parametrize(
    "change",
    [
        b"1", b"[]", b"null", b'"\\u0000"', b"9" * 4_300, b"1e999", b"[" * 150 + b"]" * 150, b'{"op": 1}',
        b'{"op": {}}',
        json.dumps({f"k{i}": 1 for i in range(100_000)}).encode(), json.dumps(TAKEDOWN | {"k" * 100_000: 1}).encode(),
        json.dumps({"op": "upsert", "visual": ["a"] * 1_000_000}).encode(),
        json.dumps(TAKEDOWN | {"video_id": "9" * 100_000}).encode(),
        b'{"op": "takedown", "video_id": 1e999, "reason": "x"}', json.dumps(TAKEDOWN | {"version": 2**70}).encode(),
    ],
    ids=range(15),
)  # fmt: skip
def test_hostile_change_is_refused_without_its_neighbour(endpoint: Endpoint, change: bytes) -> None:
    body = b'{"changes": [%b, %b]}' % (change, json.dumps(TAKEDOWN).encode())
    status, response = send(endpoint, HostileRequest("a hostile change", 200, body))
    answer = json.loads(response)
    assert (status, answer["accepted"], [one["line"] for one in answer["refused"]]) == (200, 1, [0])
    assert len(response) < 1_000
