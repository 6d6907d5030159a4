"""Composition ``fused``: equal slates, a free event loop, isolation between releases, and load shedding."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry, generate_latest
from tests.support.release_files import NOW_S, make_release_folder
from tests.support.serving.caller_access import INTERNAL, open_access

from reelway.platform.contracts.api import RecommendRequest
from reelway.platform.errors import OverloadedError
from reelway.platform.rollout.traffic.routing import Routing
from reelway.platform.tokens import TokenSigner
from reelway.serving.fused import SingleThreadExecutor, open_fused
from reelway.serving.http_api import build_http_api
from reelway.serving.metrics import IngressMetrics
from reelway.serving.release_loader import ReleaseLoader
from reelway.serving.release_pool import OVERLOAD_COOLDOWN_S, STANDING_QUEUE_S, OpenRelease
from reelway.serving.request_path import LocalStages, PathCall, RequestPath, Stages
from reelway.serving.router import Router, RouterDependencies
from reelway.serving.stages.arrays import Candidates, ViewerQuery

SIGNER = TokenSigner(b"a secret of the tests, long enough")
REQUEST = RecommendRequest(viewer_id=1, count=20)
CALL = PathCall(REQUEST, {}, NOW_S, request_id=1)


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> ReleaseLoader:
    folder = tmp_path_factory.mktemp("release")
    make_release_folder(folder)
    return ReleaseLoader(folder)


class GatedStages(LocalStages):
    """Stages whose retrieval blocks until a test opens the gate."""

    def __init__(self, stages: LocalStages) -> None:
        super().__init__(**vars(stages))
        self.__dict__.update(began=threading.Event(), gate=threading.Event(), threads=set[str]())
        self.began: threading.Event
        self.gate: threading.Event
        self.threads: set[str]

    async def retrieve(self, query: ViewerQuery) -> Candidates:
        self.threads.add(threading.current_thread().name)
        self.began.set()
        assert self.gate.wait(10)
        return await super().retrieve(query)


def path_of(release: OpenRelease, registry: CollectorRegistry, stages: Stages | None = None) -> RequestPath:
    metrics = IngressMetrics(registry)
    return RequestPath(release.router_release, stages or release.stages, SIGNER, metrics, executor=release.executor)


def test_fused_slate_equals_the_in_process_slate(loader: ReleaseLoader) -> None:
    async def recommend() -> Any:
        release = open_fused(loader, budget_ms=5_000)
        recommendation = await path_of(release, CollectorRegistry()).recommend(REQUEST, {}, NOW_S)
        await release.close_when_idle()
        return recommendation.response

    response = asyncio.run(recommend())
    expected = loader.in_process_recommender(SIGNER).recommend(REQUEST, {}, NOW_S)
    assert [video.video_id for video in response.videos] == [video.video_id for video in expected.videos]
    assert [video.score for video in response.videos] == [video.score for video in expected.videos]
    assert response.degraded == []


def test_event_loop_stays_free_while_a_path_runs(loader: ReleaseLoader) -> None:
    async def main() -> list[str]:
        release = OpenRelease(loader.router_release(), loader.stages(), executor=SingleThreadExecutor(budget_ms=10_000))
        stages = GatedStages(loader.stages())
        path = path_of(release, CollectorRegistry(), stages)
        running = asyncio.create_task(release.executor.run(path, CALL))
        while not stages.began.is_set():
            await asyncio.sleep(0)
        stages.gate.set()  # the event loop does this, so the path does not block it
        result = await running
        assert threading.current_thread().name not in stages.threads
        return result.degraded

    assert asyncio.run(main()) == []


def test_late_path_is_answered_from_the_popular_list(loader: ReleaseLoader) -> None:
    """A call whose run has not started when it is late is never started."""
    registry = CollectorRegistry()

    async def main() -> tuple[Any, bool]:
        release = open_fused(loader, budget_ms=50)
        first, second = GatedStages(loader.stages()), GatedStages(loader.stages())
        running = asyncio.create_task(release.executor.run(path_of(release, CollectorRegistry(), first), CALL))
        waiting = asyncio.create_task(release.executor.run(path_of(release, CollectorRegistry(), second), CALL))
        assert await asyncio.to_thread(first.began.wait, 5)
        recommendation = await path_of(release, registry).recommend(REQUEST, {}, NOW_S)
        for result in await asyncio.gather(running, waiting):
            assert result.degraded == ["no_retrieval", "no_reranker"]
        first.gate.set()
        await release.close_when_idle()
        await asyncio.to_thread(release.executor._thread.shutdown)  # type: ignore[attr-defined]
        return recommendation.response, second.began.is_set()

    response, second_began = asyncio.run(main())
    assert response.degraded == ["no_retrieval", "no_reranker"]
    assert {video.source for video in response.videos} == {"popular"}
    assert not second_began
    assert 'kind="timeout"' in generate_latest(registry).decode()


def test_blocked_release_does_not_delay_another_release(loader: ReleaseLoader) -> None:
    async def main() -> Any:
        blocked, healthy = open_fused(loader, budget_ms=10_000), open_fused(loader, budget_ms=10_000)
        stages = GatedStages(loader.stages())
        running = asyncio.create_task(blocked.executor.run(path_of(blocked, CollectorRegistry(), stages), CALL))
        recommendation = await path_of(healthy, CollectorRegistry()).recommend(REQUEST, {}, NOW_S)
        assert not running.done()
        stages.gate.set()
        await running
        return recommendation.response

    assert asyncio.run(main()).degraded == []


def router_of(loader: ReleaseLoader, max_ongoing_requests: int, **options: Any) -> tuple[Router, OpenRelease]:
    clock = {"clock": options.pop("clock")} if "clock" in options else {}
    release = OpenRelease(loader.router_release(), loader.stages(), **clock)

    async def open_release(_: str) -> OpenRelease:
        return release

    dependencies = RouterDependencies(SIGNER, CollectorRegistry(), max_ongoing_requests=max_ongoing_requests, **options)
    return Router(open_release, dependencies), release


def test_router_sheds_requests_beyond_the_limit(loader: ReleaseLoader) -> None:
    router, release = router_of(loader, max_ongoing_requests=2)

    async def main() -> int:
        await router.reconfigure(Routing.single_release(release.release_id).model_dump(mode="json"))
        with (
            release.track_request(),
            release.track_request(),
            pytest.raises(OverloadedError, match="2 requests are in flight"),
        ):
            await router.recommend(REQUEST)
        return len((await router.recommend(REQUEST)).response.videos)

    assert asyncio.run(main()) == 20
    text = generate_latest(router._dependencies.registry).decode()
    assert 'reelway_ingress_shed_total{arm="stable"' in text
    assert 'outcome="failed"' not in text  # load shedding is not a failure of the release


def test_standing_queue_has_a_lower_limit_than_a_burst(loader: ReleaseLoader) -> None:
    now_s = [100.0]
    router, release = router_of(loader, max_ongoing_requests=4, max_ongoing_sustained=2, clock=lambda: now_s[0])

    async def admitted() -> bool:
        try:
            await router.recommend(REQUEST)
        except OverloadedError:
            return False
        return True

    async def main() -> None:
        await router.reconfigure(Routing.single_release(release.release_id).model_dump(mode="json"))
        with release.track_request():
            with release.track_request(), release.track_request():
                now_s[0] += 0.9 * STANDING_QUEUE_S
                assert await admitted()  # three in flight in a queue that was empty a moment ago
                now_s[0] += 0.2 * STANDING_QUEUE_S
                assert not await admitted()  # three in flight in a standing queue
            assert await admitted()  # the queue is standing, but within the lower limit
        with release.track_request(), release.track_request(), release.track_request():
            assert not await admitted()  # empty a moment ago, but a request was rejected a moment ago as well
        now_s[0] += 1.1 * OVERLOAD_COOLDOWN_S
        with release.track_request(), release.track_request(), release.track_request():
            assert await admitted()  # no request was rejected for a while: a burst again
            with release.track_request():
                assert not await admitted()  # four in flight are over the limit of a burst

    asyncio.run(main())


def test_rejected_request_gets_429_with_retry_after(loader: ReleaseLoader) -> None:
    router, release = router_of(loader, max_ongoing_requests=1)
    asyncio.run(router.reconfigure(Routing.single_release(release.release_id).model_dump(mode="json")))
    client = TestClient(build_http_api(router, open_access()))
    with release.track_request():
        response = client.post("/v1/recommend", json={"viewer_id": 1, "count": 5})
        assert response.status_code == 429
        assert response.headers["Retry-After"] == "1"
        assert "try again" in response.json()["error"]
        # The request is rejected before it is read, so an invalid body makes no difference.
        assert client.post("/v1/recommend", content=b"{").status_code == 429
        assert client.get("/healthz").status_code == 200
    assert "429" in client.get("/openapi.json", headers=INTERNAL).json()["paths"]["/v1/recommend"]["post"]["responses"]
    assert client.post("/v1/recommend", json={"viewer_id": 1, "count": 5}).status_code == 200


def test_open_fused_fails_for_a_broken_release(loader: ReleaseLoader, tmp_path: Path) -> None:
    for file in loader.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "ranker.onnx").write_bytes(b"not a graph")
    with pytest.raises(Exception, match=r"ranker\.onnx"):
        open_fused(ReleaseLoader(tmp_path), budget_ms=50)
