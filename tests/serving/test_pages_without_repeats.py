"""Whole routers over a real store: pages repeat nothing, also when the store is slow or cannot be read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from tests.support.release_files import make_release_folder

from reelway.platform.contracts.api import RecommendRequest, RecommendResponse
from reelway.platform.contracts.blend import Blend, RetrievalSettings
from reelway.platform.contracts.events import Arm
from reelway.platform.errors import FeatureError
from reelway.platform.features.viewer_memory import ShownSlate
from reelway.platform.features.viewer_memory_sqlite import SqliteViewerMemory
from reelway.platform.features.viewer_rows import StoredViewer
from reelway.platform.rollout.traffic.bucketing import BUCKETS
from reelway.platform.rollout.traffic.routing import ArmRoute, Routing, ShadowRoute
from reelway.platform.tokens import TokenSigner
from reelway.serving.release_loader import ReleaseLoader
from reelway.serving.release_pool import OpenRelease
from reelway.serving.router import Router, RouterDependencies

SIGNER = TokenSigner(b"a secret of the tests, long enough")
PAGES, COUNT = 20, 10
VIEWERS = range(1, 41)


class SlowMemory(SqliteViewerMemory):
    """A SQLite memory whose calls can be late or fail."""

    write_s = 0.0
    fails_to_read = False

    def remember_slates(self, slates: Sequence[ShownSlate]) -> None:
        time.sleep(self.write_s)
        super().remember_slates(slates)

    def read_viewer(self, viewer_id: int) -> StoredViewer:
        if self.fails_to_read:
            raise FeatureError("the store is down")
        return StoredViewer({"region": "eu"}, self.read(viewer_id))


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ReleaseLoader]:
    folder = tmp_path_factory.mktemp("release")
    blend = Blend(retrieval=RetrievalSettings(candidates=100))
    return make_release_folder(folder, videos=1_500, blend=blend).release_id, ReleaseLoader(folder)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[SlowMemory]:
    store = SlowMemory(tmp_path / "memory.db")
    yield store
    store.close()


class Service:
    """Routers in this process that share a store."""

    def __init__(self, release: tuple[str, ReleaseLoader], memory: SlowMemory) -> None:
        self._release, self._loader = release
        self._stages = self._loader.stages()
        self._memory = memory

    async def router(self, *, holdout: bool = False, shadow: bool = False) -> Router:
        async def open_release(_: str) -> OpenRelease:
            async def close() -> None: ...

            return OpenRelease(self._loader.router_release(), self._stages, close)

        self.registry = CollectorRegistry()
        dependencies = RouterDependencies(
            SIGNER, self.registry, read_viewer=self._memory.read_viewer, memory=self._memory, viewer_row_ms=5_000
        )
        router = Router(open_release, dependencies)
        arms = [ArmRoute(arm=Arm.STABLE, release=self._release, weight_bp=0 if holdout else BUCKETS)]
        if holdout:
            arms.append(ArmRoute(arm=Arm.HOLDOUT, release=self._release, weight_bp=BUCKETS))
        mirrored = ShadowRoute(release=self._release, weight_bp=BUCKETS) if shadow else None
        routing = Routing(salt="s", arms=tuple(arms), shadow=mirrored)
        await router.reconfigure(routing.model_dump(mode="json"))
        return router


@pytest.fixture
def service(release: tuple[str, ReleaseLoader], memory: SlowMemory) -> Service:
    return Service(release, memory)


async def page(router: Router, viewer: int, count: int = COUNT) -> RecommendResponse:
    answer = await router.recommend(RecommendRequest(viewer_id=viewer, count=count))
    if answer.background:
        await answer.background()
    return answer.response


def ids(response: RecommendResponse) -> list[int]:
    return [video.video_id for video in response.videos]


def close(*routers: Router) -> None:
    for router in routers:
        assert router._shown is not None
        router._shown.close()


def repeats(pages: Sequence[Sequence[int]]) -> int:
    videos = [video for videos in pages for video in videos]
    return len(videos) - len(set(videos))


def counted(service: Service, name: str, **labels: str) -> float:
    return sum(
        sample.value
        for family in service.registry.collect()
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


@pytest.mark.parametrize("write_s", [0.0, 0.5])
@pytest.mark.parametrize("holdout", [False, True])
def test_twenty_pages_repeat_nothing(service: Service, memory: SlowMemory, write_s: float, holdout: bool) -> None:
    async def run() -> None:
        router = await service.router(holdout=holdout)
        memory.write_s = write_s
        pages: dict[int, list[list[int]]] = {viewer: [] for viewer in VIEWERS}
        for _ in range(PAGES):
            for viewer, response in zip(
                VIEWERS, await asyncio.gather(*(page(router, viewer) for viewer in VIEWERS)), strict=True
            ):
                pages[viewer].append(ids(response))
        assert all(len(videos) == COUNT for own in pages.values() for videos in own)
        assert {viewer: repeats(own) for viewer, own in pages.items()} == dict.fromkeys(VIEWERS, 0)
        memory.write_s = 0.0
        close(router)

    asyncio.run(run())


def test_pages_of_two_routers_repeat_nothing_after_the_write(service: Service) -> None:
    async def run() -> None:
        routers = [await service.router(), await service.router()]
        pages: dict[int, list[list[int]]] = {viewer: [] for viewer in VIEWERS}
        for number in range(PAGES):
            router = routers[number % 2]
            for viewer in VIEWERS:
                pages[viewer].append(ids(await page(router, viewer)))
            assert router._shown is not None
            assert await asyncio.to_thread(router._shown.flush, 10)
        assert {viewer: repeats(own) for viewer, own in pages.items()} == dict.fromkeys(VIEWERS, 0)
        close(*routers)

    asyncio.run(run())


def test_unreadable_memory_is_counted_and_repeats_nothing(service: Service, memory: SlowMemory) -> None:
    async def run() -> None:
        router = await service.router()
        memory.fails_to_read = True
        responses = [await page(router, 7) for _ in range(PAGES)]
        assert repeats([ids(response) for response in responses]) == 0
        assert all(response.degraded == ["no_viewer_row"] for response in responses)
        assert counted(service, "reelway_ingress_memory_faults_total", kind="read") == PAGES
        close(router)

    asyncio.run(run())


def test_mirrored_request_is_not_remembered(service: Service, memory: SlowMemory) -> None:
    async def run() -> None:
        router = await service.router(shadow=True)
        first = ids(await page(router, 7))
        deadline = time.monotonic() + 10
        while not counted(service, "reelway_shadow_requests_total", outcome="compared"):
            assert time.monotonic() < deadline, "the mirrored request was not compared"
            await asyncio.sleep(0.01)
        close(router)
        assert memory.read(7).shown_ids.tolist() == first

    asyncio.run(run())


def test_blocks_change_the_next_page(service: Service, memory: SlowMemory, release: Any) -> None:
    async def run() -> None:
        router = await service.router()
        table = release[1].table()
        first = await page(router, 7)
        creator = first.videos[0].creator_id
        topic = int(table.topic[table.rows_of([first.videos[1].video_id])][0])
        memory.block(7, creators=[creator], topics=[topic])
        for _ in range(PAGES):
            rows = table.rows_of(ids(await page(router, 7)))
            assert creator not in table.creator_id[rows]
            assert topic not in table.topic[rows]
        close(router)

    asyncio.run(run())


def test_slate_stays_full_when_everything_was_shown(service: Service) -> None:
    async def run() -> None:
        router = await service.router()
        pages = [ids(await page(router, 7, 100)) for _ in range(18)]
        assert all(len(videos) == 100 for videos in pages)
        assert repeats(pages[:15]) == 0
        assert set(pages[15]) == set(pages[0])  # shown longest ago
        assert counted(service, "reelway_ingress_repeated_videos_total", arm="stable") == 300
        close(router)

    asyncio.run(run())


def test_router_that_ends_has_written_its_slates(service: Service, memory: SlowMemory) -> None:
    async def run() -> None:
        memory.write_s = 0.2
        router = await service.router()
        shown = ids(await page(router, 1))
        await asyncio.to_thread(router.close)
        assert memory.read(1).shown_ids.tolist() == shown
        assert router._shown is not None
        assert not router._shown._writer.is_alive()

    asyncio.run(run())
