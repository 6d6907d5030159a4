"""Mirrored requests: compared with the shown slate, invisible to the viewer, without delay for responses."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from tests.support.release_files import make_release_folder

from reelway.platform.contracts.api import RecommendRequest, RecommendResponse
from reelway.platform.contracts.events import Arm
from reelway.platform.eventlog.exposure_events import decode_exposures
from reelway.platform.eventlog.sqlite_log import SqliteLog
from reelway.platform.features.viewer_rows import StoredViewer
from reelway.platform.rollout import metric_names
from reelway.platform.rollout.traffic.bucketing import BUCKETS
from reelway.platform.rollout.traffic.routing import ArmRoute, Routing, ShadowRoute
from reelway.platform.tokens import TokenSigner
from reelway.serving.outcomes import ExposureWriter
from reelway.serving.release_loader import ReleaseLoader
from reelway.serving.release_pool import OpenRelease
from reelway.serving.request_path import LocalStages
from reelway.serving.router import Router, RouterDependencies
from reelway.serving.shadow import MAX_IN_FLIGHT, is_mirrored, overlap_ratio, score_drift_ratio
from reelway.serving.stages.arrays import Candidates, ViewerQuery


class SlowStages(LocalStages):
    """The real stages, which can wait for a gate or raise."""

    gate: asyncio.Event | None = None
    breaks = False

    async def retrieve(self, query: ViewerQuery) -> Candidates:
        if self.gate:
            await self.gate.wait()
        if self.breaks:
            raise asyncio.InvalidStateError("the mirrored release is broken")
        return await super().retrieve(query)


class ShadowFixture:
    """A router with a stable release and a shadow release that gets mirrored requests."""

    def __init__(self, store_folder: Path, ids: tuple[str, str], weight_bp: int = BUCKETS) -> None:
        self._store_folder = store_folder
        self.stable, self.mirrored = ids
        self.registry = CollectorRegistry()
        self.log = SqliteLog(Path(tempfile.mkdtemp(dir=store_folder)) / "exposures.db")
        self.exposures = ExposureWriter(lambda: self.log, lambda _: None)
        self.shadow_stages: SlowStages | None = None
        signer = TokenSigner(b"a secret of the tests, long enough")
        self.router = Router(
            self._open,
            RouterDependencies(
                signer, self.registry, read_viewer=lambda _: StoredViewer({"region": "eu"}), exposures=self.exposures
            ),
        )
        self.routing = Routing(
            salt="a rollout",
            rollout="r1",
            arms=(ArmRoute(arm=Arm.STABLE, release=self.stable, weight_bp=BUCKETS),),
            shadow=ShadowRoute(release=self.mirrored, weight_bp=weight_bp),
        )

    async def start(self) -> None:
        await self.router.reconfigure(self.routing.model_dump(mode="json"))
        await until(lambda: self.router.current_releases().routing.shadow is not None)

    async def _open(self, release: str) -> OpenRelease:
        loader = ReleaseLoader(self._store_folder / release)
        stages = SlowStages(**vars(loader.stages()))
        if release == self.mirrored:
            self.shadow_stages = stages
        return OpenRelease(loader.router_release(), stages)

    async def recommend(self, viewer: int = 1) -> RecommendResponse:
        """Requests a slate and runs the task that follows the response."""
        answer = await self.router.recommend(RecommendRequest(viewer_id=viewer, count=5))
        assert answer.background
        await answer.background()
        return answer.response

    def counted(self, name: str, **labels: Any) -> float:
        return sum(
            sample.value
            for family in self.registry.collect()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def mirrored_as(self, outcome: str) -> float:
        return self.counted(metric_names.SHADOW_REQUESTS, release=self.mirrored[:12], outcome=outcome)


@pytest.fixture(scope="module")
def store_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("releases")


@pytest.fixture(scope="module")
def ids(store_folder: Path) -> tuple[str, str]:
    ids = []
    for seed in range(2):
        ids.append(make_release_folder(store_folder / str(seed), seed=seed).release_id)
        (store_folder / str(seed)).rename(store_folder / ids[-1])
    return ids[0], ids[1]


@pytest.fixture
def world(store_folder: Path, ids: tuple[str, str]) -> ShadowFixture:
    return ShadowFixture(store_folder, ids)


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        await asyncio.sleep(0.005)


def check(work: Awaitable[None]) -> None:
    async def run() -> None:
        await work

    asyncio.run(run())


def test_mirrored_request_leaves_no_impression(world: ShadowFixture) -> None:
    async def scenario() -> None:
        await world.start()
        answer = await world.recommend()
        assert answer.release == world.stable
        await until(lambda: world.mirrored_as("compared") == 1)

    check(scenario())
    label = world.mirrored[:12]
    assert world.counted(metric_names.SHADOW_OVERLAP + "_count", release=label) == 1
    assert world.counted(metric_names.SHADOW_DRIFT + "_count", release=label) == 1
    assert world.counted(metric_names.REQUESTS, release=label, arm="shadow", outcome="ok") == 1
    assert world.counted(metric_names.LATENCY + "_count", release=label, arm="shadow") == 1
    assert world.counted("reelway_ingress_videos_total", release=label) == 0
    world.exposures.close()
    (record,) = SqliteLog(Path(world.log.name)).read({}, limit=10).records
    exposures = decode_exposures(record.payload)
    assert (exposures.num_rows, set(exposures["release"].to_pylist())) == (5, {world.stable})


def test_hanging_mirrored_release_delays_no_response(world: ShadowFixture) -> None:
    async def scenario() -> None:
        await world.start()
        assert world.shadow_stages
        object.__setattr__(world.shadow_stages, "gate", asyncio.Event())
        start = time.monotonic()
        answers = [await world.recommend(viewer) for viewer in range(MAX_IN_FLIGHT + 3)]
        assert time.monotonic() - start < 1.0
        assert all(len(answer.videos) == 5 and not answer.degraded for answer in answers)
        assert world.mirrored_as("dropped") == 3
        assert world.shadow_stages.gate
        world.shadow_stages.gate.set()
        await until(lambda: world.mirrored_as("compared") == MAX_IN_FLIGHT)
        await world.recommend()
        await until(
            lambda: world.mirrored_as("compared") == MAX_IN_FLIGHT + 1
        )  # the limit admits a mirrored request again

    check(scenario())


def test_broken_mirrored_release_changes_no_response(world: ShadowFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        await world.start()
        assert world.shadow_stages
        object.__setattr__(world.shadow_stages, "breaks", True)
        answer = await world.recommend()
        assert answer.degraded == []
        label = world.mirrored[:12]
        await until(lambda: world.counted(metric_names.REQUESTS, release=label, arm="shadow", outcome="degraded") == 1)
        monkeypatch.setattr("reelway.serving.request_path.RequestPath._viewer_query", lambda *_: 1 / 0)
        arm_path = world.router._arm_paths[Arm.STABLE]
        monkeypatch.setattr(arm_path.path, "_viewer_query", lambda *a: real_query(arm_path.path, *a))
        assert (await world.recommend()).degraded == []
        await until(lambda: world.mirrored_as("failed") == 1)
        assert world.counted(metric_names.REQUESTS, release=label, arm="shadow", outcome="failed") == 1
        assert world.counted(metric_names.REQUESTS, arm="stable", outcome="failed") == 0

    from reelway.serving.request_path import RequestPath

    real_query = RequestPath._viewer_query
    check(scenario())


def test_mirrored_viewers_are_independent_of_the_canary() -> None:
    routing = Routing(
        salt="a rollout",
        arms=(
            ArmRoute(arm=Arm.CANARY, release="c", weight_bp=2000),
            ArmRoute(arm=Arm.STABLE, release="s", weight_bp=8000),
        ),
    )
    viewers = range(5000)
    mirrored = [viewer for viewer in viewers if is_mirrored(viewer, routing.salt, 2000)]
    assert 850 < len(mirrored) < 1150
    both = sum(routing.route_of(viewer).arm is Arm.CANARY for viewer in mirrored)
    assert both / len(mirrored) == pytest.approx(0.2, abs=0.05)  # as for independent draws
    assert not any(is_mirrored(viewer, routing.salt, 0) for viewer in viewers)


@pytest.mark.parametrize(
    ("shown", "mirrored", "ratio"),
    [([1, 2, 3, 4], [4, 3, 9, 8], 0.5), ([1, 2], [2, 1], 1.0), ([1], [], 0.0), ([], [], 1.0), ([], [1], 0.0)],
)
def test_overlap_is_the_share_of_common_videos(shown: list[int], mirrored: list[int], ratio: float) -> None:
    assert overlap_ratio(shown, mirrored) == ratio


def test_score_drift_is_relative_to_the_shown_slate() -> None:
    shown, mirrored, nothing = np.full(3, 0.5, np.float32), np.full(2, 0.6, np.float32), np.zeros(0, np.float32)
    assert score_drift_ratio(shown, mirrored) == pytest.approx(0.2)
    assert score_drift_ratio(mirrored, shown) == pytest.approx(1 / 6)
    assert score_drift_ratio(shown, nothing) is None
    assert score_drift_ratio(nothing, shown) is None
    assert score_drift_ratio(np.zeros(2, np.float32), shown) is None
