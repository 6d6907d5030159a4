"""The request path of one release, on one screen. It knows no Ray, no HTTP and no store.

::

    request ─ viewer row ─► viewer_query ─► retrieve ─► rank ─► rerank ─► shown_videos ─► response
                   │                           │          │        │
    rung:    no_viewer_row               no_retrieval no_ranker no_reranker
    then:    context only                popular list  its order  value order

A stage that fails or is late costs its own part of the answer, never the answer: the next rung is taken, listed in
``degraded`` and counted. The stages are awaited, so that the same lines run in one process and over Ray Serve.

Where the path is worked on is its ``Place``: here, unless the release brings one of its own. A place that is late is as
good as stages that are all gone.

On the arm ``holdout`` no stage is asked: it shows the popular list, which is what models have to be worth more than.
A mirrored request (arm ``shadow``) goes the same way and ends before anything is shown: no token, no impression.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import numpy as np
from prometheus_client import CollectorRegistry

from reelway.platform.contracts.api import RecommendedVideo, RecommendRequest, RecommendResponse, Rung
from reelway.platform.contracts.events import Arm
from reelway.platform.tokens import TokenSigner
from reelway.serving.metrics import SHORT, IngressMetrics, timed
from reelway.serving.parity_sample import ParitySample
from reelway.serving.popular import PopularLists
from reelway.serving.slates import EVERYBODY, RolloutSide, Showing, new_ids, shown_videos, slices_of
from reelway.serving.stages.arrays import F32, SOURCES, Candidates, Slate, ViewerQuery
from reelway.serving.stages.ranking import Ranking
from reelway.serving.stages.reranking import Reranking
from reelway.serving.stages.retrieval import Retrieval
from reelway.serving.video_table import VideoTable
from reelway.serving.viewers import is_cold, viewer_query

T = TypeVar("T")
log = logging.getLogger(__name__)

STAGE_OF: Final[dict[Rung, str]] = {
    "no_viewer_row": "ingress",
    "no_retrieval": "retrieval",
    "no_ranker": "ranking",
    "no_reranker": "reranking",
}


class Stages(Protocol):
    """The three stages, wherever they run. Any exception of theirs is a step down the ladder."""

    async def retrieve(self, query: ViewerQuery) -> Candidates: ...

    async def rank(self, query: ViewerQuery, candidates: Candidates) -> F32: ...

    async def rerank(self, query: ViewerQuery, candidates: Candidates, value: F32, count: int) -> Slate: ...


class Place(Protocol):
    """Where a release's path is worked on."""

    async def __call__(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What the work gives.

        Raises:
            TimeoutError: it took too long; nobody waits for it any more.
        """
        ...


async def here(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """The place of stages that are elsewhere: there is nothing to work on but the ends of the path."""
    return await work()


@dataclass(frozen=True)
class ReleaseEdge:
    """What a router holds of a release itself: enough for the ends of the path and for its last rung."""

    release_id: str
    table: VideoTable
    lists: PopularLists
    videos_as_of_s: float | None = None  # the moment that its video features speak of


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer, with the arrays that it was made of."""

    response: RecommendResponse
    slate: Slate
    video_ids: list[int]
    slices: list[int]


@dataclass(frozen=True, slots=True)
class _Made:
    """An answer in the making."""

    slate: Slate
    slices: list[int]
    videos: list[RecommendedVideo]
    degraded: list[Rung]


class RequestPath:
    """The path of one release for one side of the rollout."""

    def __init__(
        self,
        edge: ReleaseEdge,
        stages: Stages,
        signer: TokenSigner,
        metrics: IngressMetrics,
        side: RolloutSide = EVERYBODY,
        sample: ParitySample | None = None,
        place: Place = here,
    ) -> None:
        self._place = place
        self._edge = edge
        self._stages = stages
        self._signer = signer
        self._metrics = metrics
        self._side = side
        self._sample = sample
        self._labels = (edge.release_id[:SHORT], side.arm.value)
        # 0 is said from the start: no line on a dashboard would say that nobody looks.
        metrics.empty.labels(*self._labels)

    async def answer(
        self,
        request: RecommendRequest,
        viewer_row: Mapping[str, Any] | None,
        now_s: float,
        shown_at_s: float | None = None,
    ) -> Answered:
        """A slate for the viewer, whatever fails on the way.

        Args:
            viewer_row: field name -> value; empty for an unknown viewer; ``None`` when the store could not be read.
            now_s: Unix seconds of the request.
            shown_at_s: Unix seconds by the clock, where the request says what time it is.
        """
        edge, (request_id,) = self._edge, new_ids(1)

        async def make(stages: Stages | None) -> _Made:
            return await self._made(stages, request, viewer_row, now_s, shown_at_s, request_id)

        with timed(self._metrics.latency.labels(*self._labels)):
            made = await self._in_its_place(make)
        slate = made.slate
        self._count(slate, made.degraded)
        self._count_sources(slate)
        if self._sample and viewer_row is not None:
            self._sample.offer(
                request_id,
                request,
                edge.release_id,
                edge.videos_as_of_s,
                viewer_row,
                edge.table,
                slate.rows,
                now_s,
            )
        response = RecommendResponse.model_construct(
            request_id=request_id,
            viewer_id=request.viewer_id,
            release=edge.release_id,
            arm=self._side.arm,
            degraded=made.degraded,
            videos=made.videos,
        )
        return Answered(response, slate, [video.video_id for video in made.videos], made.slices)

    async def mirror(
        self, request: RecommendRequest, viewer_row: Mapping[str, Any] | None, now_s: float, seed: int
    ) -> tuple[list[int], F32]:
        """What would have been shown: video ids and scores, timed and counted like an answer.

        Args:
            seed: of the answer that it will be compared with.
        """

        async def make(stages: Stages | None) -> tuple[Slate, list[Rung]]:
            degraded: list[Rung] = []
            query = self._query(request, viewer_row, now_s, seed, degraded)
            return await self._slate(stages, query, request.count, degraded), degraded

        with timed(self._metrics.latency.labels(*self._labels)):
            slate, degraded = await self._in_its_place(make)
        self._count(slate, degraded)
        return self._edge.table.video_id[slate.rows].tolist(), slate.score

    def count_failed(self) -> None:
        """Add a request that got no slate at all."""
        self._metrics.requests.labels(*self._labels, "failed").inc()

    async def _in_its_place(self, make: Callable[[Stages | None], Coroutine[Any, Any, T]]) -> T:
        try:
            return await self._place(lambda: make(self._stages))
        except TimeoutError:
            return await make(None)

    async def _made(
        self,
        stages: Stages | None,
        request: RecommendRequest,
        viewer_row: Mapping[str, Any] | None,
        now_s: float,
        shown_at_s: float | None,
        request_id: int,
    ) -> _Made:
        edge, degraded = self._edge, list[Rung]()
        query = self._query(request, viewer_row, now_s, request_id, degraded)
        slate = await self._slate(stages, query, request.count, degraded)
        showing = Showing(
            request_id, request.viewer_id, edge.release_id, self._side, query.region, now_s,
            now_s if shown_at_s is None else shown_at_s, viewer_row is not None and is_cold(viewer_row),
        )  # fmt: skip
        slices = slices_of(slate.rows, showing, edge.table)
        videos = shown_videos(slate, slices, showing, edge.table, edge.lists, self._signer)
        return _Made(slate, slices, videos, degraded)

    async def _slate(self, stages: Stages | None, query: ViewerQuery, count: int, degraded: list[Rung]) -> Slate:
        if self._side.arm is Arm.HOLDOUT:
            return self._edge.lists.candidates(query).first(count)
        if stages is None:
            for rung in ("no_retrieval", "no_reranker"):
                self._fault(rung, TimeoutError("the whole path is late"), degraded)
            return self._edge.lists.candidates(query).first(count)
        value: F32 | None = None
        candidates = await self._or_next_rung("no_retrieval", stages.retrieve(query), degraded)
        if candidates is None:
            candidates = self._edge.lists.candidates(query)
        elif len(candidates):
            value = await self._or_next_rung("no_ranker", stages.rank(query, candidates), degraded)
        if value is None:  # the order they came in
            value = np.linspace(1.0, 0.0, len(candidates), endpoint=False, dtype=np.float32)
        slate = await self._or_next_rung("no_reranker", stages.rerank(query, candidates, value, count), degraded)
        return slate if slate is not None else in_order_of(value, candidates, count)

    def _query(
        self,
        request: RecommendRequest,
        viewer_row: Mapping[str, Any] | None,
        now_s: float,
        seed: int,
        degraded: list[Rung],
    ) -> ViewerQuery:
        table, context = self._edge.table, request.context
        if viewer_row is not None:
            try:
                query = viewer_query(viewer_row, context, now_s, table, seed)
            except Exception as fault:  # any fault at all is a rung of the ladder
                self._fault("no_viewer_row", fault, degraded)
            else:
                if is_cold(viewer_row):
                    self._metrics.cold.labels(*self._labels).inc()
                return query
        else:
            degraded.append("no_viewer_row")
        return viewer_query({}, context, now_s, table, seed)

    async def _or_next_rung(self, rung: Rung, work: Awaitable[T], degraded: list[Rung]) -> T | None:
        try:
            with timed(self._metrics.stage_latency.labels(self._labels[0], STAGE_OF[rung])):
                return await work
        except Exception as fault:  # any fault at all is a rung of the ladder
            self._fault(rung, fault, degraded)
            return None

    def _fault(self, rung: Rung, fault: Exception, degraded: list[Rung]) -> None:
        kind = "timeout" if isinstance(fault, TimeoutError) else "error"
        self._metrics.faults.labels(self._labels[0], STAGE_OF[rung], kind).inc()
        log.warning("stepped down to %s: %s: %s", rung, type(fault).__name__, fault, exc_info=kind == "error")
        degraded.append(rung)

    def _count(self, slate: Slate, degraded: list[Rung]) -> None:
        metrics, labels = self._metrics, self._labels
        metrics.requests.labels(*labels, outcome_of(degraded)).inc()
        for rung in degraded:
            metrics.degraded.labels(*labels, rung).inc()
        metrics.slate.labels(*labels).observe(len(slate))
        if not len(slate):
            metrics.empty.labels(*labels).inc()

    def _count_sources(self, slate: Slate) -> None:
        for code in set(slate.source.tolist()):
            self._metrics.shown.labels(*self._labels, SOURCES[code]).inc(int((slate.source == code).sum()))


def outcome_of(degraded: Sequence[Rung]) -> str:
    """How a request that got a slate ended: ``ok``, ``context_only`` (the store's fault) or ``degraded``."""
    if not degraded:
        return "ok"
    return "context_only" if set(degraded) == {"no_viewer_row"} else "degraded"


def in_order_of(value: F32, candidates: Candidates, count: int) -> Slate:
    """The best by value alone: what is shown when re-ranking is not there."""
    best = np.argsort(-value, kind="stable")[:count]
    return Slate(
        rows=candidates.rows[best],
        source=candidates.source[best],
        because=candidates.because[best],
        score=value[best],
        propensity=np.ones(len(best), dtype=np.float32),
    )


@dataclass(frozen=True)
class LocalStages:
    """The stages in this very process. None of the awaits below ever waits."""

    retrieval: Retrieval
    ranking: Ranking
    reranking: Reranking

    async def retrieve(self, query: ViewerQuery) -> Candidates:
        return self.retrieval.retrieve(query)

    async def rank(self, query: ViewerQuery, candidates: Candidates) -> F32:
        viewer = query.arrays
        return await self.ranking.rank(
            viewer.viewer_dense, viewer.viewer_categories, candidates.viewer_embedding,
            candidates.rows, candidates.similarity, query.now_s,
        )  # fmt: skip

    async def rerank(self, query: ViewerQuery, candidates: Candidates, value: F32, count: int) -> Slate:
        return self.reranking.rerank(
            candidates.rows, candidates.source, candidates.because, value,
            query.history_rows[query.history_weights > 0], count=count, seed=query.seed,
        )  # fmt: skip


class RecommendationGraph:
    """The whole path in one process: the floor of the benchmark, and what evaluation drives in a closed loop."""

    def __init__(self, edge: ReleaseEdge, stages: Stages, signer: TokenSigner, metrics: IngressMetrics | None = None):
        self._path = RequestPath(edge, stages, signer, metrics or IngressMetrics(CollectorRegistry()))

    def recommend(
        self, request: RecommendRequest, viewer_row: Mapping[str, Any] | None, now_s: float | None = None
    ) -> RecommendResponse:
        """One slate; see ``RequestPath.answer``. ``now_s`` is the clock's when absent."""
        answered = run_to_end(self._path.answer(request, viewer_row, time.time() if now_s is None else now_s))
        return answered.response


def run_to_end(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never waits, without an event loop.

    Raises:
        RuntimeError: it did wait.
    """
    try:
        work.send(None)
    except StopIteration as done:
        value: T = done.value
        return value
    work.close()
    raise RuntimeError("a stage of an in-process graph waited for something; expected stages that compute")
