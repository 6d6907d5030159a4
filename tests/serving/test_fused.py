"""Stages in the router's own process: the same slates, a loop that is free, and a slow release that slows no other."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry, generate_latest
from tests.release_files import NOW_S, make_release_folder

from reelway.platform.contracts.api import RecommendRequest
from reelway.platform.errors import OverloadedError
from reelway.platform.rollout.traffic.routing import Routing
from reelway.platform.tokens import TokenSigner
from reelway.serving.fused import OwnThread, open_fused
from reelway.serving.graph import RequestPath
from reelway.serving.http_api import build_http_api
from reelway.serving.metrics import IngressMetrics
from reelway.serving.open_releases import CALM_S, STANDS_S, OpenRelease
from reelway.serving.release_loader import ReleaseLoader
from reelway.serving.router import Router, RouterParts

SIGNER = TokenSigner(b"a secret of the tests, long enough")
REQUEST = RecommendRequest(viewer_id=1, count=20)


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> ReleaseLoader:
    folder = tmp_path_factory.mktemp("release")
    make_release_folder(folder)
    return ReleaseLoader(folder)


class Gated:
    """Work that a test lets go on, and that says when it began."""

    def __init__(self) -> None:
        self.began, self.may_end = threading.Event(), threading.Event()

    async def work(self) -> str:
        self.began.set()
        assert self.may_end.wait(10)
        return "done"


def a_path(release: OpenRelease, registry: CollectorRegistry) -> RequestPath:
    return RequestPath(release.edge, release.stages, SIGNER, IngressMetrics(registry), place=release.place)


def test_the_slate_is_the_one_that_the_same_stages_make_anywhere(loader: ReleaseLoader) -> None:
    async def ask() -> Any:
        release = open_fused(loader, budget_ms=5_000)
        answered = await a_path(release, CollectorRegistry()).answer(REQUEST, {}, NOW_S)
        await release.close_when_idle()
        return answered.response

    response = asyncio.run(ask())
    expected = loader.graph(SIGNER).recommend(REQUEST, {}, NOW_S)
    assert [video.video_id for video in response.videos] == [video.video_id for video in expected.videos]
    assert response.degraded == []


def test_the_loop_goes_on_while_a_path_is_worked_on() -> None:
    async def main() -> str:
        place, gated = OwnThread(budget_ms=10_000), Gated()
        asked = asyncio.create_task(place(gated.work))
        while not gated.began.is_set():
            await asyncio.sleep(0)
        gated.may_end.set()  # by the loop, which therefore was not held up
        return await asked

    assert asyncio.run(main()) == "done"


def test_a_late_path_is_answered_from_the_lists_and_what_has_not_begun_never_begins(loader: ReleaseLoader) -> None:
    registry = CollectorRegistry()

    async def main() -> tuple[Any, bool]:
        release = open_fused(loader, budget_ms=50)
        first, second = Gated(), Gated()
        busy = asyncio.create_task(release.place(first.work))
        waiting = asyncio.create_task(release.place(second.work))
        assert await asyncio.to_thread(first.began.wait, 5)
        answered = await a_path(release, registry).answer(REQUEST, {}, NOW_S)
        assert await asyncio.gather(busy, waiting, return_exceptions=True) != ["done", "done"]
        first.may_end.set()
        await release.close_when_idle()
        await asyncio.to_thread(release.place._thread.shutdown)  # type: ignore[attr-defined]
        return answered.response, second.began.is_set()

    response, second_began = asyncio.run(main())
    assert response.degraded == ["no_retrieval", "no_reranker"]
    assert {video.source for video in response.videos} == {"popular"}
    assert not second_began
    assert 'kind="timeout"' in generate_latest(registry).decode()


def test_a_release_that_is_stuck_does_not_hold_up_the_one_beside_it(loader: ReleaseLoader) -> None:
    async def main() -> Any:
        stuck, fine = open_fused(loader, budget_ms=10_000), open_fused(loader, budget_ms=10_000)
        gated = Gated()
        asked = asyncio.create_task(stuck.place(gated.work))
        answered = await a_path(fine, CollectorRegistry()).answer(REQUEST, {}, NOW_S)
        assert not asked.done()
        gated.may_end.set()
        await asked
        return answered.response

    assert asyncio.run(main()).degraded == []


def a_router(loader: ReleaseLoader, at_once: int, **options: Any) -> tuple[Router, OpenRelease]:
    clock = {"clock": options.pop("clock")} if "clock" in options else {}
    release = OpenRelease(loader.edge(), loader.stages(), **clock)

    async def open_release(_: str) -> OpenRelease:
        return release

    return Router(open_release, RouterParts(SIGNER, CollectorRegistry(), at_once=at_once, **options)), release


def test_more_than_a_release_takes_at_once_is_sent_away_and_the_next_one_is_welcome(loader: ReleaseLoader) -> None:
    router, release = a_router(loader, at_once=2)

    async def main() -> int:
        await router.reconfigure(Routing.whole(release.edge.release_id).model_dump(mode="json"))
        with release.in_use(), release.in_use(), pytest.raises(OverloadedError, match="answers 2 requests now"):
            await router.recommend(REQUEST)
        return len((await router.recommend(REQUEST)).response.videos)

    assert asyncio.run(main()) == 20
    text = generate_latest(router._parts.registry).decode()
    assert 'reelway_ingress_shed_total{arm="stable"' in text
    assert 'outcome="failed"' not in text  # nobody's release is to blame


def test_a_burst_is_answered_and_a_queue_that_stands_is_kept_short(loader: ReleaseLoader) -> None:
    now_s = [100.0]
    router, release = a_router(loader, at_once=4, standing=2, clock=lambda: now_s[0])

    async def welcome() -> bool:
        try:
            await router.recommend(REQUEST)
        except OverloadedError:
            return False
        return True

    async def main() -> None:
        await router.reconfigure(Routing.whole(release.edge.release_id).model_dump(mode="json"))
        with release.in_use():
            with release.in_use(), release.in_use():
                now_s[0] += 0.9 * STANDS_S
                assert await welcome()  # three are under way, and a moment ago there was nobody
                now_s[0] += 0.2 * STANDS_S
                assert not await welcome()  # three have stood here for too long
            assert await welcome()  # the queue stands still, but it is short
        with release.in_use(), release.in_use(), release.in_use():
            assert not await welcome()  # it was empty a moment ago, and somebody was sent away a moment ago, too
        now_s[0] += 1.1 * CALM_S
        with release.in_use(), release.in_use(), release.in_use():
            assert await welcome()  # nobody was for a while: a burst again
            with release.in_use():
                assert not await welcome()  # four are too many at any moment

    asyncio.run(main())


def test_who_is_sent_away_is_told_when_to_come_back(loader: ReleaseLoader) -> None:
    router, release = a_router(loader, at_once=1)
    asyncio.run(router.reconfigure(Routing.whole(release.edge.release_id).model_dump(mode="json")))
    client = TestClient(build_http_api(router))
    with release.in_use():
        answer = client.post("/v1/recommend", json={"viewer_id": 1, "count": 5})
        assert answer.status_code == 429
        assert answer.headers["Retry-After"] == "1"
        assert "try again" in answer.json()["error"]
        # Not even read: there is no time for what is wrong with it.
        assert client.post("/v1/recommend", content=b"{").status_code == 429
        assert client.get("/healthz").status_code == 200
    assert "429" in client.get("/openapi.json").json()["paths"]["/v1/recommend"]["post"]["responses"]
    assert client.post("/v1/recommend", json={"viewer_id": 1, "count": 5}).status_code == 200


def test_what_is_opened_has_been_tried(loader: ReleaseLoader, tmp_path: Path) -> None:
    for file in loader.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "ranker.onnx").write_bytes(b"not a graph")
    with pytest.raises(Exception, match=r"ranker\.onnx"):
        open_fused(ReleaseLoader(tmp_path), budget_ms=50)
