"""The request path in one process: a viewer always gets a slate, and every fallback is listed and counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from tests.support.release_files import NOW_S, make_release_folder

from reelway.platform.contracts.api import RecommendRequest, RecommendResponse, RequestContext
from reelway.platform.contracts.blend import Blend, RerankingSettings, RetrievalSettings
from reelway.platform.contracts.events import Arm
from reelway.platform.features.viewer_memory_local import LocalViewerMemory
from reelway.platform.tokens import TokenSigner
from reelway.serving.circuit_breaker import CircuitBreaker
from reelway.serving.in_process import InProcessRecommender
from reelway.serving.metrics import SHORT_RELEASE, IngressMetrics
from reelway.serving.release_loader import ReleaseLoader
from reelway.serving.request_path import LocalStages, run_without_waiting
from reelway.serving.stages.arrays import F32, SOURCES, Candidates, RankingInput, ScoredCandidates, Slate, ViewerQuery
from reelway.serving.viewer_query import viewer_query

VIDEOS = 300
CAP = 2
SIGNER = TokenSigner(b"a secret of the tests, long enough")


@dataclass
class Release:
    """A small release whose stages are loaded once."""

    loader: ReleaseLoader
    stages: LocalStages
    watched: list[int]

    @property
    def row(self) -> dict[str, Any]:
        """A viewer who liked some videos and disliked the last one."""
        return {
            "region": "eu",
            "language": "en",
            "history_videos": self.watched,
            "history_weights": [1.0] * (len(self.watched) - 1) + [-2.0],
            "history_times_s": [NOW_S - 3600.0 * (len(self.watched) - i) for i in range(len(self.watched))],
        }


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    folder = tmp_path_factory.mktemp("release")
    blend = Blend(retrieval=RetrievalSettings(candidates=100), reranking=RerankingSettings(max_per_creator=CAP))
    make_release_folder(folder, videos=VIDEOS, blend=blend)
    loader = ReleaseLoader(folder)
    return Release(loader, loader.stages(), loader.table().video_id[5:25].tolist())


class BrokenStages:
    """The real stages, some of which raise."""

    def __init__(self, stages: LocalStages, *broken: str) -> None:
        self._stages, self._broken = stages, broken
        self.budgets: dict[str, CircuitBreaker] = {}

    def _break(self, stage: str) -> None:
        if stage in self._broken:
            raise RuntimeError(f"{stage} is broken")

    async def retrieve(self, query: ViewerQuery) -> Candidates:
        self._break("retrieve")
        return await self._stages.retrieve(query)

    async def rank(self, ranking_input: RankingInput) -> F32:
        self._break("rank")
        return await self._stages.rank(ranking_input)

    async def rerank(self, candidates: ScoredCandidates) -> Slate:
        self._break("rerank")
        return await self._stages.rerank(candidates)


def recommend(
    release: Release, *broken: str, row: Any = "own", count: int = 20, blocked: Sequence[int] = (), **context: Any
) -> tuple[Any, Any]:
    """Returns a response and the registry with its metrics."""
    registry = CollectorRegistry()
    memory = LocalViewerMemory(lambda: NOW_S)
    memory.block(7, topics=blocked)
    recommender = InProcessRecommender(
        release.loader.router_release(), BrokenStages(release.stages, *broken), SIGNER, IngressMetrics(registry), memory
    )
    request = RecommendRequest(viewer_id=7, count=count, context=RequestContext(**context))
    return recommender.recommend(request, release.row if row == "own" else row, NOW_S), registry


def counted(registry: CollectorRegistry, name: str, release: Release, **labels: str) -> float:
    release_id = release.loader.release_id()[:SHORT_RELEASE]
    return registry.get_sample_value(name, {"release": release_id, **labels}) or 0.0


@pytest.mark.parametrize(
    ("broken", "degraded", "stage"),
    [
        (("retrieve",), ["no_retrieval"], "retrieval"),
        (("rank",), ["no_ranker"], "ranking"),
        (("rerank",), ["no_reranker"], "reranking"),
        (("rank", "rerank"), ["no_ranker", "no_reranker"], "ranking"),
        (("retrieve", "rank", "rerank"), ["no_retrieval", "no_reranker"], "reranking"),
    ],
)
def test_broken_stage_degrades_the_slate(
    release: Release, broken: tuple[str, ...], degraded: list[str], stage: str
) -> None:
    answer, registry = recommend(release, *broken)
    assert answer.degraded == degraded
    assert len(answer.videos) == 20
    assert not {video.video_id for video in answer.videos} & set(release.watched)
    for degradation in degraded:
        assert counted(registry, "reelway_ingress_degraded_total", release, arm="stable", rung=degradation) == 1
    assert counted(registry, "reelway_ingress_faults_total", release, stage=stage, kind="unexpected") == 1
    assert counted(registry, "reelway_ingress_requests_total", release, arm="stable", outcome="degraded") == 1


def test_viewer_who_blocked_everything_is_no_empty_slate(release: Release) -> None:
    """Otherwise one viewer's requests would roll back a release that has no fault."""
    answer, registry = recommend(release, blocked=np.unique(release.loader.table().topic).tolist())
    assert answer.videos == []
    assert counted(registry, "reelway_ingress_empty_slates_total", release, arm="stable") == 0
    assert counted(registry, "reelway_ingress_emptied_slates_total", release, arm="stable") == 1


def test_healthy_path_is_not_degraded(release: Release) -> None:
    answer, registry = recommend(release)
    assert answer.degraded == []
    assert counted(registry, "reelway_ingress_requests_total", release, arm="stable", outcome="ok") == 1


def test_slate_equals_the_stages_composed_by_hand(release: Release) -> None:
    """The path adds nothing to the stages: same videos, scores and order for the same inputs."""
    stages, table = release.stages, release.loader.table()
    answer, _ = recommend(release)
    query = viewer_query(release.row, RequestContext(), NOW_S, table, seed=answer.request_id)
    candidates = stages.retrieval.retrieve(query)
    value = run_without_waiting(stages.ranking.rank(RankingInput.of(query, candidates)))
    slate = stages.reranking.rerank(ScoredCandidates.of(query, candidates, value, 20))
    assert [video.video_id for video in answer.videos] == table.video_id[slate.rows].tolist()
    assert [video.score for video in answer.videos] == slate.score.tolist()
    assert [video.source for video in answer.videos] == [SOURCES[code] for code in slate.source.tolist()]


def test_broken_retrieval_gives_the_popular_list_in_order(release: Release) -> None:
    answer, _ = recommend(release, "retrieve", "rerank", row={})
    router_release = release.loader.router_release()
    assert [video.video_id for video in answer.videos] == router_release.table.video_id[
        router_release.lists.current().popular[:20]
    ].tolist()
    assert {video.source for video in answer.videos} == {"popular"}
    assert {video.reason for video in answer.videos} == {"popular now"}


def test_broken_ranker_gives_the_order_of_retrieval(release: Release) -> None:
    answer, _ = recommend(release, "rank", "rerank", row={})
    other, _ = recommend(release, "rank", "rerank", row={})
    scores = [video.score for video in answer.videos]
    assert scores == sorted(scores, reverse=True)
    assert len({video.source for video in answer.videos[:20]}) >= 3  # blending interleaves the sources
    assert [video.video_id for video in answer.videos] == [video.video_id for video in other.videos]


def test_broken_reranker_gives_the_order_of_value(release: Release) -> None:
    answer, _ = recommend(release, "rerank")
    full, _ = recommend(release)
    scores = [video.score for video in answer.videos]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == full.videos[0].score


def test_failed_store_leaves_the_context_only(release: Release) -> None:
    answer, registry = recommend(release, row=None)
    assert answer.degraded == ["no_viewer_row"]
    assert len(answer.videos) == 20
    assert counted(registry, "reelway_ingress_degraded_total", release, arm="stable", rung="no_viewer_row") == 1
    assert counted(registry, "reelway_ingress_requests_total", release, arm="stable", outcome="context_only") == 1


def test_malformed_viewer_row_degrades_to_context_only(release: Release) -> None:
    answer, _ = recommend(release, row={"history_videos": [1, 2, 3], "history_weights": [1.0], "history_times_s": "x"})
    assert answer.degraded == ["no_viewer_row"]
    assert len(answer.videos) == 20


@pytest.mark.parametrize("row", [{}, {"region": None, "history_videos": None}])
def test_unknown_viewer_gets_a_slate_that_is_not_degraded(release: Release, row: Any) -> None:
    answer, registry = recommend(release, row=row)
    assert answer.degraded == []
    assert len(answer.videos) == 20
    assert not any("because" in video.reason for video in answer.videos)
    assert counted(registry, "reelway_ingress_cold_viewers_total", release, arm="stable") == 1


def test_request_region_is_used_if_the_row_has_none(release: Release) -> None:
    answer, _ = recommend(release, "rank", "rerank", row={}, region="us", count=50)
    assert "rising in us" in {video.reason for video in answer.videos if video.source == "trending"}


def test_reasons_name_liked_videos_only(release: Release) -> None:
    answer, _ = recommend(release, count=50)
    reasons = [video.reason for video in answer.videos if video.reason.startswith("because you watched ")]
    liked = {f"because you watched Video {video}" for video in release.watched[:-1]}
    assert reasons
    assert set(reasons) <= liked


def test_tokens_match_the_videos_of_the_response(release: Release) -> None:
    answer, _ = recommend(release)
    assert isinstance(answer, RecommendResponse)
    tokens = [SIGNER.read(video.token) for video in answer.videos]
    assert [token.video_id for token in tokens] == [video.video_id for video in answer.videos]
    assert [token.position for token in tokens] == list(range(20)) == [video.position for video in answer.videos]
    assert [token.source for token in tokens] == [video.source for video in answer.videos]
    assert {(t.request_id, t.viewer_id, t.release, t.arm, t.propensity, t.issued_at_s) for t in tokens} == {
        (answer.request_id, 7, release.loader.release_id(), Arm.STABLE, 1.0, NOW_S)
    }
    assert len({token.impression_id for token in tokens}) == 20


def test_response_validates_against_its_model(release: Release) -> None:
    answer, _ = recommend(release)
    assert RecommendResponse.model_validate_json(answer.model_dump_json()) == answer


@given(
    st.lists(st.integers(0, VIDEOS - 1), max_size=50, unique=True),
    st.lists(st.sampled_from([-3.0, -0.5, 0.0, 1.0, 5.0]), min_size=50, max_size=50),
    st.integers(1, 100),
    st.sampled_from([(), ("retrieve",), ("rank",), ("rerank",)]),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_slate_is_full_of_unseen_distinct_videos(
    release: Release, watched: list[int], weights: list[float], count: int, broken: tuple[str, ...]
) -> None:
    table = release.loader.table()
    row = {
        "history_videos": table.video_id[watched].tolist(),
        "history_weights": weights[: len(watched)],
        "history_times_s": [NOW_S - 60.0 * i for i in range(len(watched))][::-1],
    }
    answer, _ = recommend(release, *broken, row=row, count=count)
    videos = [video.video_id for video in answer.videos]
    assert len(set(videos)) == len(videos) == count
    assert not set(videos) & set(row["history_videos"])


def test_creator_has_no_more_positions_than_the_cap(release: Release) -> None:
    answer, _ = recommend(release, count=30)
    _, positions = np.unique([video.creator_id for video in answer.videos], return_counts=True)
    assert positions.max() <= CAP


def test_request_time_decides_which_videos_are_fresh(release: Release) -> None:
    later = datetime.fromtimestamp(NOW_S + 90 * 86_400, UTC).timestamp()
    recommender = InProcessRecommender(
        release.loader.router_release(), BrokenStages(release.stages, "rank", "rerank"), SIGNER
    )
    request = RecommendRequest(viewer_id=1, count=100)
    now, then = (recommender.recommend(request, {}, at_s) for at_s in (NOW_S, later))
    assert "fresh" in {video.source for video in now.videos}
    assert "fresh" not in {video.source for video in then.videos}


def test_in_process_path_rejects_a_stage_that_waits() -> None:
    async def waits() -> None:
        import asyncio

        await asyncio.sleep(0)

    with pytest.raises(RuntimeError, match="waited"):
        run_without_waiting(waits())
