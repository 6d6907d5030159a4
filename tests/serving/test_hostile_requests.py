"""Malformed and hostile requests to a router: documented 4xx bodies, counted, without an exception in the log."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing
from functools import partial

import httpx
import pytest
from prometheus_client import CollectorRegistry
from tests.support.hostile_requests import (
    REQUESTS,
    Endpoint,
    HostileRequest,
    assert_no_failure,
    check_hostile,
)
from tests.support.release_files import make_release_folder
from tests.support.serving.caller_access import open_access
from tests.support.serving.hostile_serving_requests import LIKE, OUTCOME, RECOMMEND, VIEWER, check_error

from reelway.platform.eventlog.topics import Topic, open_topic
from reelway.platform.rollout.control.webhook import serve_in_thread
from reelway.platform.rollout.traffic.routing import Routing
from reelway.platform.tokens import TokenSigner
from reelway.serving.fused import open_fused
from reelway.serving.http_api import OUTCOMES, build_http_api
from reelway.serving.http_api import RECOMMEND as RECOMMEND_PATH
from reelway.serving.metrics import IntakeMetrics
from reelway.serving.outcomes import EventLogWriter, OutcomeIntake
from reelway.serving.release_loader import ReleaseLoader
from reelway.serving.release_pool import OpenRelease
from reelway.serving.router import Router, RouterDependencies


@pytest.fixture(scope="module")
def router_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, CollectorRegistry]]:
    """A router with a release and an event log, behind the HTTP server that Ray Serve uses."""
    folder, events = tmp_path_factory.mktemp("release"), tmp_path_factory.mktemp("events")
    make_release_folder(folder)
    loader, registry = ReleaseLoader(folder), CollectorRegistry()

    async def open_release(_: str) -> OpenRelease:
        return open_fused(loader, budget_ms=5_000)

    signer = TokenSigner(b"a secret of the tests, long enough")
    intake = OutcomeIntake(signer, EventLogWriter(partial(open_topic, events, Topic.OUTCOMES)), IntakeMetrics(registry))
    router = Router(open_release, RouterDependencies(signer=signer, registry=registry, outcomes=intake))
    asyncio.run(router.reconfigure(Routing.single_release("a" * 64).model_dump(mode="json")))
    with closing(router), serve_in_thread(build_http_api(router, open_access()), "127.0.0.1", 0) as url:
        yield int(url.rsplit(":", 1)[1]), registry


def endpoint(router_port: tuple[int, CollectorRegistry], path: str, valid: bytes) -> Endpoint:
    port, registry = router_port
    return Endpoint(port, path, valid, 422, partial(rejected, registry), check_error)


def rejected(registry: CollectorRegistry) -> float:
    (family,) = [metric for metric in registry.collect() if metric.name == "reelway_ingress_refused"]
    return sum(sample.value for sample in family.samples if sample.name.endswith("_total"))


@pytest.mark.parametrize("request_", [*REQUESTS, *RECOMMEND], ids=lambda one: one.name)
def test_hostile_recommend_request_gets_a_documented_4xx(
    router_port: tuple[int, CollectorRegistry], caplog: pytest.LogCaptureFixture, request_: HostileRequest
) -> None:
    check_hostile(endpoint(router_port, RECOMMEND_PATH, VIEWER), request_, caplog)


@pytest.mark.parametrize("request_", [*REQUESTS, *OUTCOME], ids=lambda one: one.name)
def test_hostile_outcomes_request_gets_a_documented_4xx(
    router_port: tuple[int, CollectorRegistry], caplog: pytest.LogCaptureFixture, request_: HostileRequest
) -> None:
    check_hostile(endpoint(router_port, OUTCOMES, LIKE), request_, caplog)


@pytest.mark.parametrize(
    "token", ["", "t", "\0", "é" * 10, "\U0001f600", "=" * 200, "a" * 1_000_000, "-" * 171, "A" * 171, "A" * 172]
)
def test_hostile_token_is_refused_by_its_index(
    router_port: tuple[int, CollectorRegistry], caplog: pytest.LogCaptureFixture, token: str
) -> None:
    outcomes = {"outcomes": [{"token": token, "type": "like"}]}
    answer = httpx.post(f"http://127.0.0.1:{router_port[0]}{OUTCOMES}", json=outcomes)
    assert answer.status_code == 200
    assert answer.json()["accepted"] == 0
    assert [one["index"] for one in answer.json()["refused"]] == [0]
    assert len(answer.content) < 1_000
    assert_no_failure(caplog)


@pytest.mark.parametrize(
    "context",
    [
        {"time": "0001-01-01T00:00:00+23:59"}, {"time": "9999-12-31T23:59:59-23:59"}, {"time": -1e11},
        {"time": "1969-12-31T23:59:59Z"}, {"region": "\0"}, {"region": ""}, {"device": "\U0001f600" * 64},
    ],
)  # fmt: skip
def test_extreme_context_gets_a_slate(
    router_port: tuple[int, CollectorRegistry], caplog: pytest.LogCaptureFixture, context: dict[str, object]
) -> None:
    answer = httpx.post(f"http://127.0.0.1:{router_port[0]}{RECOMMEND_PATH}", json={"viewer_id": 1, "context": context})
    assert answer.status_code == 200
    assert answer.json()["videos"]
    assert answer.json()["degraded"] == ["no_viewer_row"]
    assert_no_failure(caplog)


def test_honest_outcome_is_accepted_after_hostile_requests(router_port: tuple[int, CollectorRegistry]) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{router_port[0]}") as client:
        slate = client.post(RECOMMEND_PATH, content=VIEWER, headers={"Content-Type": "application/json"}).json()
        outcome = {"token": slate["videos"][0]["token"], "type": "like"}
        assert client.post(OUTCOMES, json={"outcomes": [outcome]}).json() == {"accepted": 1, "refused": []}
