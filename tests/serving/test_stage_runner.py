"""``StageRunner``: budgets, fallbacks and their metrics; and the size of the containers that stages exchange."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from tests.support.release_files import NOW_S, make_release_folder

from reelway.platform.contracts.api import Degradation, RequestContext
from reelway.platform.contracts.blend import Blend, RetrievalSettings
from reelway.platform.errors import FeatureError
from reelway.serving.circuit_breaker import TRIP_AFTER_TIMEOUTS, CircuitBreaker
from reelway.serving.metrics import IngressMetrics
from reelway.serving.release_loader import ReleaseLoader
from reelway.serving.request_path import run_without_waiting
from reelway.serving.stage_runner import RANKING, RETRIEVAL, VIEWER_ROW, StageRunner
from reelway.serving.stages.arrays import RankingInput, ScoredCandidates
from reelway.serving.viewer_query import viewer_query

RELEASE = "0123456789abcdef"
MAX_CONTAINER_BYTES = 16_000


class FakeStage:
    """A stage that doubles its input, raises or hangs."""

    def __init__(self, *, raises: Exception | None = None, hangs: bool = False) -> None:
        self.raises, self.hangs, self.calls = raises, hangs, 0

    async def __call__(self, value: int) -> int:
        self.calls += 1
        if self.raises:
            raise self.raises
        if self.hangs:
            await asyncio.Event().wait()
        return 2 * value


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metric(registry: CollectorRegistry) -> Callable[..., float]:
    def value(name: str, **labels: str) -> float:
        return registry.get_sample_value(name, {"release": RELEASE[:12], **labels}) or 0.0

    return value


def test_result_of_a_healthy_stage_is_returned(registry: CollectorRegistry, metric: Callable[..., float]) -> None:
    degraded: list[Degradation] = []
    runner = StageRunner(IngressMetrics(registry), RELEASE, {})
    assert run_without_waiting(runner.run(RANKING, FakeStage(), 21, lambda: -1, degraded)) == 42
    assert degraded == []
    assert metric("reelway_ingress_stage_latency_seconds_count", stage="ranking") == 1
    assert metric("reelway_ingress_faults_total", stage="ranking", kind="error") == 0


def test_failed_stage_is_replaced_by_its_fallback(registry: CollectorRegistry, metric: Callable[..., float]) -> None:
    degraded: list[Degradation] = ["no_viewer_row"]
    runner = StageRunner(IngressMetrics(registry), RELEASE, {})
    stage = FakeStage(raises=ValueError("a bug"))
    assert run_without_waiting(runner.run(RETRIEVAL, stage, 21, lambda: -1, degraded)) == -1
    assert degraded == ["no_viewer_row", "no_retrieval"]
    assert metric("reelway_ingress_stage_latency_seconds_count", stage="retrieval") == 1
    assert metric("reelway_ingress_faults_total", stage="retrieval", kind="unexpected") == 1


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (FeatureError("the store is down"), "error"),
        (TimeoutError("late"), "timeout"),
        (KeyError("a bug"), "unexpected"),
    ],
)
def test_bug_is_counted_apart_from_an_outage(
    registry: CollectorRegistry, metric: Callable[..., float], raised: Exception, kind: str
) -> None:
    runner = StageRunner(IngressMetrics(registry), RELEASE, {})
    assert run_without_waiting(runner.run(VIEWER_ROW, FakeStage(raises=raised), 21, lambda: -1, [])) == -1
    for other in ("error", "timeout", "unexpected"):
        assert metric("reelway_ingress_faults_total", stage="viewer_row", kind=other) == (other == kind)


def test_late_stage_is_replaced_by_its_fallback(registry: CollectorRegistry, metric: Callable[..., float]) -> None:
    """After ``TRIP_AFTER_TIMEOUTS`` timeouts the budget's breaker is open, and the stage is not called."""
    stage, degraded = FakeStage(hangs=True), list[Degradation]()

    async def run() -> list[int]:
        runner = StageRunner(IngressMetrics(registry), RELEASE, {"ranking": CircuitBreaker(5, clock=lambda: 0.0)})
        return [await runner.run(RANKING, stage, 21, lambda: -1, degraded) for _ in range(TRIP_AFTER_TIMEOUTS + 3)]

    assert asyncio.run(run()) == [-1] * (TRIP_AFTER_TIMEOUTS + 3)
    assert stage.calls == TRIP_AFTER_TIMEOUTS
    assert degraded == ["no_ranker"] * (TRIP_AFTER_TIMEOUTS + 3)
    assert metric("reelway_ingress_faults_total", stage="ranking", kind="timeout") == TRIP_AFTER_TIMEOUTS + 3


def test_cancelled_stage_is_not_a_fallback(registry: CollectorRegistry) -> None:
    """A caller that gives up the request gets no slate."""

    async def run() -> None:
        runner = StageRunner(IngressMetrics(registry), RELEASE, {})
        async with asyncio.timeout(0.01):
            await runner.run(RANKING, FakeStage(hangs=True), 21, lambda: -1, [])

    with pytest.raises(TimeoutError):
        asyncio.run(run())


def test_containers_of_500_candidates_stay_compact(tmp_path: Path) -> None:
    make_release_folder(tmp_path, videos=1000, blend=Blend(retrieval=RetrievalSettings(candidates=500)))
    loader = ReleaseLoader(tmp_path)
    row = {
        "history_videos": loader.table().video_id[:50].tolist(),
        "history_weights": [1.0] * 50,
        "history_times_s": [NOW_S - 60.0 * i for i in range(50)],
    }
    query = viewer_query(row, RequestContext(), NOW_S, loader.table(), seed=1)
    candidates = loader.retrieval().retrieve(query)
    assert len(candidates) == 500
    ranking_input = RankingInput.of(query, candidates)
    value = run_without_waiting(loader.ranking().rank(ranking_input))
    scored = ScoredCandidates.of(query, candidates, value, 20)
    slate = loader.reranking().rerank(scored)
    for container in (query, candidates, ranking_input, scored, slate):
        assert len(pickle.dumps(container, protocol=5)) < MAX_CONTAINER_BYTES, type(container).__name__
        copy = pickle.loads(pickle.dumps(container, protocol=5))
        assert type(copy) is type(container)
