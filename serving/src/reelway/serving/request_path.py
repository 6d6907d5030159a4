"""The request path of one release: ``RequestPath.run`` goes from the request to the slate. Imports no Ray and no HTTP.

::

    request ─ viewer row ─► ViewerQuery ─ retrieve ─► Candidates ─ rank ─► values ─ rerank ─► Slate ─► response

    stage          degradation      fallback
    viewer row     no_viewer_row    the request's context only
    retrieval      no_retrieval     the release's popular list
    ranking        no_ranker        the order of retrieval
    re-ranking     no_reranker      the order of value

Videos of the viewer's memory are left out by retrieval and by the popular list. If nearly everything was shown, videos
are shown again in the order of ``completing_rows``, and counted.

``StageRunner`` runs each stage within its budget. If a stage fails or is late, ``StageRunner`` uses the stage's
fallback, counts it and lists it in ``degraded``: a viewer always gets a slate.

Two objects that are passed in decide where a path runs:

- ``Stages``: the three stages. ``LocalStages`` calls them in this process, ``StageHandles`` over Ray Serve handles.
- ``PathExecutor``: ``InlineExecutor`` runs the path in the caller's event loop, ``SingleThreadExecutor`` on a thread.

Viewers of the arm ``holdout`` get the popular list, the baseline that models are compared with; no stage is called.
A mirrored request (arm ``shadow``) runs the same stages, but has no response: no token and no impression.
"""

from __future__ import annotations

from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Protocol, TypeVar

from reelway.platform.contracts.api import Degradation, RecommendedVideo, RecommendRequest, RecommendResponse
from reelway.platform.contracts.blend import RetrievalSettings
from reelway.platform.contracts.events import Arm
from reelway.platform.contracts.ids import short_id
from reelway.platform.errors import ServingError
from reelway.platform.features.viewer_memory import NO_MEMORY, ViewerMemoryState
from reelway.platform.tokens import TokenSigner
from reelway.serving.circuit_breaker import CircuitBreaker
from reelway.serving.live_lists import CurrentLists
from reelway.serving.metrics import IngressMetrics, timed
from reelway.serving.outcomes.exposures import SlateExposure
from reelway.serving.parity_sample import ParitySampler
from reelway.serving.slates import NO_ROLLOUT, ImpressionContext, RolloutArm, build_videos, exposure_of, new_ids
from reelway.serving.stage_runner import RANKING, RERANKING, RETRIEVAL, VIEWER_QUERY, StageRunner
from reelway.serving.stages.arrays import F32, SOURCES, Candidates, RankingInput, ScoredCandidates, Slate, ViewerQuery
from reelway.serving.stages.filtering import allowed_candidates
from reelway.serving.stages.ranking import Ranking
from reelway.serving.stages.reranking import Reranking
from reelway.serving.stages.retrieval import Retrieval
from reelway.serving.video_table import VideoTable
from reelway.serving.viewer_query import exclusions_of, is_cold_start, viewer_query

T = TypeVar("T")


class Stages(Protocol):
    """The three stages of a release, in any process. Each takes one value and returns one value."""

    @property
    def budgets(self) -> Mapping[str, CircuitBreaker]:
        """Stage name -> time budget; a stage that is missing has no budget of its own."""
        ...

    async def retrieve(self, query: ViewerQuery) -> Candidates: ...

    async def rank(self, ranking_input: RankingInput) -> F32: ...

    async def rerank(self, candidates: ScoredCandidates) -> Slate: ...


class PathExecutor(Protocol):
    """Where the path of a release runs."""

    async def run(self, path: RequestPath, call: PathCall) -> PathResult:
        """Returns the result of ``path.run(call)``, with the fallbacks of all stages if the path is late."""
        ...


class InlineExecutor:
    """Runs a path in the caller's event loop."""

    async def run(self, path: RequestPath, call: PathCall) -> PathResult:
        return await path.run(call)


@dataclass(frozen=True)
class RouterRelease:
    """The parts of a release that the router itself needs: to build responses, and as the fallback of all stages."""

    release_id: str
    table: VideoTable
    lists: CurrentLists
    videos_as_of_s: float | None = None  # the time that the release's video features describe
    policy: RetrievalSettings = field(default_factory=RetrievalSettings)  # how long shown videos are left out


@dataclass(frozen=True, slots=True)
class PathCall:
    """One request with the state it is answered from."""

    request: RecommendRequest
    viewer_row: Mapping[str, Any] | None  # None: the online store could not be read
    now_s: float
    request_id: int  # also the seed of every random choice
    shown_at_s: float | None = None
    mirrored: bool = False
    memory: ViewerMemoryState = NO_MEMORY
    authenticated: bool = False  # the viewer proved its identity


@dataclass(frozen=True, slots=True)
class PathResult:
    """The slate of one call. A mirrored call has no exposure and no videos."""

    slate: Slate
    degraded: list[Degradation]
    exposure: SlateExposure | None = None
    videos: list[RecommendedVideo] = field(default_factory=list)
    repeated: int = 0  # videos that the viewer was shown before


@dataclass(frozen=True, slots=True)
class Recommendation:
    """A response with the arrays it was built from."""

    response: RecommendResponse
    slate: Slate
    exposure: SlateExposure


class RequestPath:
    """The path of one release for one arm of the rollout."""

    def __init__(
        self,
        router_release: RouterRelease,
        stages: Stages,
        signer: TokenSigner,
        metrics: IngressMetrics,
        rollout_arm: RolloutArm = NO_ROLLOUT,
        sample: ParitySampler | None = None,
        executor: PathExecutor | None = None,
    ) -> None:
        self._release = router_release
        self._stages = stages
        self._runner = StageRunner(metrics, router_release.release_id, stages.budgets)
        self._signer = signer
        self._metrics = metrics
        self._rollout_arm = rollout_arm
        self._sample = sample
        self._executor = executor or InlineExecutor()
        self._labels = (short_id(router_release.release_id), rollout_arm.arm.value)
        metrics.empty_slates.labels(
            *self._labels
        )  # export 0 from the start: no line on a dashboard would mean "no data"

    async def run(self, call: PathCall, stages: Stages | None = None) -> PathResult:
        """Goes from the request to the slate, stage by stage.

        Args:
            stages: used instead of the path's own stages.
        """
        release, count, stages = self._release, call.request.count, stages or self._stages
        run = partial(self._runner.run, is_timed=not isinstance(stages, UnavailableStages))
        degraded: list[Degradation] = []

        query = await self._viewer_query(call, degraded)
        lists = release.lists.current()
        popular = partial(lists.candidates, query)
        if self._rollout_arm.arm is Arm.HOLDOUT:
            candidates = popular()
            slate = candidates.to_slate(count)
        else:
            candidates = await run(RETRIEVAL, stages.retrieve, query, popular, degraded)
            in_order = candidates.values_by_position
            if len(candidates) and RETRIEVAL.degradation not in degraded:
                value = await run(RANKING, stages.rank, RankingInput.of(query, candidates), in_order, degraded)
            else:
                value = in_order()
            scored = ScoredCandidates.of(query, candidates, value, count)
            slate = await run(RERANKING, stages.rerank, scored, scored.top_by_value, degraded)
        slate = self._last_check(slate)

        if call.mirrored:
            return PathResult(slate, degraded)
        exposure = exposure_of(slate, self._showing(call, query), release.table)
        videos = build_videos(slate, exposure, release.table, lists, self._signer)
        return PathResult(slate, degraded, exposure, videos, self._count_repeated(slate, query, candidates))

    async def recommend(
        self,
        request: RecommendRequest,
        viewer_row: Mapping[str, Any] | None,
        now_s: float,
        shown_at_s: float | None = None,
        memory: ViewerMemoryState = NO_MEMORY,
        *,
        authenticated: bool = False,
    ) -> Recommendation:
        """Returns a slate for the viewer, whichever stages fail.

        Args:
            viewer_row: field name -> value; empty for an unknown viewer; ``None`` if the store could not be read.
            now_s: Unix seconds of the request.
            shown_at_s: Unix seconds of the clock, if the request states a time of its own.
            memory: what the viewer was shown, watched and blocked.
            authenticated: whether the viewer proved its identity; recorded with the exposure.
        """
        release, (request_id,) = self._release, new_ids(1)
        call = PathCall(request, viewer_row, now_s, request_id, shown_at_s, memory=memory, authenticated=authenticated)
        with timed(self._metrics.latency.labels(*self._labels)):
            result = await self._executor.run(self, call)
        slate = result.slate
        self._record_slate(slate, result.degraded, memory)
        if result.repeated:
            self._metrics.videos_repeated.labels(*self._labels).inc(result.repeated)
        self._record_sources(slate)
        if self._sample and viewer_row is not None:
            self._sample.offer(
                request_id, request, release.release_id, release.videos_as_of_s, viewer_row, release.table, slate.rows,
                now_s, now_s if shown_at_s is None else shown_at_s,
            )  # fmt: skip
        response = RecommendResponse.model_construct(
            request_id=request_id,
            viewer_id=request.viewer_id,
            release=release.release_id,
            arm=self._rollout_arm.arm,
            degraded=result.degraded,
            videos=result.videos,
        )
        if result.exposure is None:
            raise ServingError("the path of a request that is not mirrored returned no exposure")
        return Recommendation(response, slate, result.exposure)

    async def mirror(
        self,
        request: RecommendRequest,
        viewer_row: Mapping[str, Any] | None,
        now_s: float,
        seed: int,
        shown_at_s: float | None = None,
        memory: ViewerMemoryState = NO_MEMORY,
    ) -> tuple[list[int], F32]:
        """Returns the video ids and scores that would have been shown. Latency and slate are recorded as usual.

        Nothing is remembered of the slate.

        Args:
            seed: request id of the response that the slate will be compared with.
        """
        with timed(self._metrics.latency.labels(*self._labels)):
            call = PathCall(request, viewer_row, now_s, seed, shown_at_s, mirrored=True, memory=memory)
            result = await self._executor.run(self, call)
        self._record_slate(result.slate, result.degraded, memory)
        return self._release.table.video_id[result.slate.rows].tolist(), result.slate.score

    def count_failed(self) -> None:
        """Counts a request that got no slate at all."""
        self._metrics.requests.labels(*self._labels, "failed").inc()

    async def _viewer_query(self, call: PathCall, degraded: list[Degradation]) -> ViewerQuery:
        """Returns the viewer as arrays. Fallback: the request's context and the viewer's memory only."""
        table, clock_s = self._release.table, call.now_s if call.shown_at_s is None else call.shown_at_s
        exclusions = exclusions_of(call.memory, self._release.policy, clock_s, table)

        def build(viewer_row: Mapping[str, Any]) -> ViewerQuery:
            request, seed = call.request, call.request_id
            followed = call.memory.followed_creators
            return viewer_query(
                viewer_row, request.context, call.now_s, table, seed, exclusions, request.count, followed
            )

        async def known(viewer_row: Mapping[str, Any]) -> ViewerQuery:
            return build(viewer_row)

        if call.viewer_row is None:
            degraded.append(VIEWER_QUERY.degradation)
            return build({})
        fallback = partial(build, {})
        query = await self._runner.run(VIEWER_QUERY, known, call.viewer_row, fallback, degraded, is_timed=False)
        if not degraded and is_cold_start(call.viewer_row):
            self._metrics.cold_viewers.labels(*self._labels).inc()
        return query

    def _last_check(self, slate: Slate) -> Slate:
        """Returns the slate without videos that were taken down, replaced, or that this process does not know yet."""
        servable = self._release.table.servable_rows(slate.rows) == slate.rows
        if servable.all():
            return slate
        self._metrics.withheld.labels(*self._labels).inc(int((~servable).sum()))
        return slate.where(servable)

    def _showing(self, call: PathCall, query: ViewerQuery) -> ImpressionContext:
        return ImpressionContext(
            call.request_id, call.request.viewer_id, self._release.release_id, self._rollout_arm, query.region,
            call.now_s, call.now_s if call.shown_at_s is None else call.shown_at_s,
            call.viewer_row is not None and is_cold_start(call.viewer_row), call.request.context.device,
            call.request.context.language, call.authenticated,
        )  # fmt: skip

    def _count_repeated(self, slate: Slate, query: ViewerQuery, candidates: Candidates) -> int:
        if len(candidates) > query.count:  # nothing was needed to complete the slate
            return 0
        _, counts = allowed_candidates(slate.rows, query, self._release.table)
        return counts["shown"] + counts["watched"]

    def _record_slate(self, slate: Slate, degraded: list[Degradation], memory: ViewerMemoryState) -> None:
        metrics, labels = self._metrics, self._labels
        metrics.requests.labels(*labels, request_outcome(degraded)).inc()
        for degradation in degraded:
            metrics.degraded.labels(*labels, degradation).inc()
        metrics.slate.labels(*labels).observe(len(slate))
        if not len(slate):
            # Who blocks everything gets nothing. That is no fault of the release, and must not roll it back.
            by_choice = len(memory.blocked_topics) or len(memory.blocked_creators)
            (metrics.emptied_slates if by_choice else metrics.empty_slates).labels(*labels).inc()

    def _record_sources(self, slate: Slate) -> None:
        for code in set(slate.source.tolist()):
            self._metrics.videos_shown.labels(*self._labels, SOURCES[code]).inc(int((slate.source == code).sum()))


def request_outcome(degraded: Sequence[Degradation]) -> str:
    """Returns ``ok``, ``context_only`` (only the viewer row was missing) or ``degraded`` for a request with a slate."""
    if not degraded:
        return "ok"
    return "context_only" if set(degraded) == {"no_viewer_row"} else "degraded"


NO_BUDGETS: Final[Mapping[str, CircuitBreaker]] = {}


@dataclass(frozen=True)
class LocalStages:
    """The stages in this process. No call ever waits, so a stage cannot be interrupted and has no budget."""

    retrieval: Retrieval
    ranking: Ranking
    reranking: Reranking

    @property
    def budgets(self) -> Mapping[str, CircuitBreaker]:
        return NO_BUDGETS

    async def retrieve(self, query: ViewerQuery) -> Candidates:
        return self.retrieval.retrieve(query)

    async def rank(self, ranking_input: RankingInput) -> F32:
        return await self.ranking.rank(ranking_input)

    async def rerank(self, candidates: ScoredCandidates) -> Slate:
        return self.reranking.rerank(candidates)


class UnavailableStages:
    """Stages that are all late: a path run with them returns the popular list."""

    budgets: Mapping[str, CircuitBreaker] = NO_BUDGETS

    async def retrieve(self, query: ViewerQuery) -> Candidates:  # noqa: ARG002
        raise TimeoutError("the whole path is late")

    async def rank(self, ranking_input: RankingInput) -> F32:  # noqa: ARG002
        raise TimeoutError("the whole path is late")

    async def rerank(self, candidates: ScoredCandidates) -> Slate:  # noqa: ARG002
        raise TimeoutError("the whole path is late")


def run_without_waiting(work: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine that never waits, without an event loop, and returns its result.

    Raises:
        RuntimeError: if the coroutine waits for something.
    """
    try:
        work.send(None)
    except StopIteration as done:
        value: T = done.value
        return value
    work.close()
    raise RuntimeError("a stage of an in-process path waited for something; use stages that only compute")
