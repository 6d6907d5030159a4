"""The stages of one release as deployments, and the router's way to them.

Each replica fetches and checks its release itself, so that a node without it needs nothing from another.
"""

from __future__ import annotations

from typing import Any, Final

from prometheus_client import CollectorRegistry
from ray.serve.handle import DeploymentHandle

from reelway.platform.rollout.traffic.serving_options import BudgetsMs, ReleaseArgs
from reelway.serving import metrics
from reelway.serving.fused import load_warm
from reelway.serving.graph import run_to_end
from reelway.serving.open_inference.client import RankerThere, address_of
from reelway.serving.release_loader import open_trusted
from reelway.serving.stages.arrays import F32, Candidates, Codes, Rows, Slate, ViewerQuery
from reelway.serving.time_budget import TimeBudget
from reelway.serving.viewers import first_ranking, nobody

RETRIEVAL: Final = "Retrieval"
RANKING: Final = "Ranking"
RERANKING: Final = "Reranking"
HELD: Final = "Release"


class RetrievalStage:
    """Viewer tower, index and lists of one release."""

    def __init__(self, source: ReleaseArgs) -> None:
        loader = open_trusted(source)
        self._stage = loader.retrieval()
        self._metrics = metrics.RetrievalMetrics(CollectorRegistry(), loader.release_id())
        self._stage.retrieve(nobody(loader.table()))  # the first call pays for what is set up late

    def retrieve(self, query: ViewerQuery) -> Candidates:
        with metrics.timed(self._metrics.latency):
            candidates = self._stage.retrieve(query)
        self._metrics.count(candidates)
        return candidates


class RankingStage:
    """Ranker and video table of one release. A ranker that runs elsewhere is asked, and never waited for to start."""

    def __init__(self, source: ReleaseArgs) -> None:
        loader = open_trusted(source)
        registry = CollectorRegistry()
        self._metrics = metrics.RankingMetrics(registry, loader.release_id())
        if source.ranker_address:
            address = address_of(source.ranker_address, source.release)
            counts = metrics.RemoteRankerMetrics(registry, source.release)
            self._stage = loader.ranking(RankerThere(address, source.release, counts))
            return
        self._stage = loader.ranking()
        table = loader.table()
        run_to_end(self._stage.rank(*first_ranking(nobody(table), table)))

    async def rank(
        self, dense: F32, categories: Any, embedding: F32, rows: Rows, similarity: F32, now_s: float, within_s: float
    ) -> F32:
        with metrics.timed(self._metrics.latency):
            value = await self._stage.rank(dense, categories, embedding, rows, similarity, now_s, within_s)
        self._metrics.candidates.inc(len(rows))
        return value


class RerankingStage:
    """Video table of one release. The root of the release's application: it holds the others so that they come and
    go together; the router calls all three itself."""

    def __init__(self, source: ReleaseArgs, retrieval: Any, ranking: Any) -> None:
        loader = open_trusted(source)
        self._stage = loader.reranking()
        self._metrics = metrics.RerankingMetrics(CollectorRegistry(), loader.release_id())
        self._others = (retrieval, ranking)

    def rerank(self, rows: Rows, source: Codes, because: Rows, value: F32, liked: Rows, count: int, seed: int) -> Slate:
        with metrics.timed(self._metrics.latency):
            slate = self._stage.rerank(rows, source, because, value, liked, count=count, seed=seed)
        self._metrics.count(slate)
        return slate


class HeldRelease:
    """A release whose stages run in the routers: fetched and checked on this node, and tried once.

    The root and only deployment of its application, so that whoever starts and watches releases sees one that cannot
    be served here, before a router opens it.
    """

    def __init__(self, source: ReleaseArgs) -> None:
        load_warm(open_trusted(source))


class RemoteStages:
    """The three stages of one release, in their own processes."""

    def __init__(self, application: str, budgets: BudgetsMs) -> None:
        # Made without asking whether the deployments are there: nothing waits, and they may come later.
        self._handles = [DeploymentHandle(stage, application) for stage in (RETRIEVAL, RANKING, RERANKING)]
        self._retrieve = self._handles[0].retrieve
        self._rank = self._handles[1].rank
        self._rerank = self._handles[2].rerank
        self._within = {stage: TimeBudget(ms) for stage, ms in budgets.model_dump().items()}

    async def close(self) -> None:
        """Give up the connections."""
        for handle in self._handles:
            await handle.shutdown_async()

    async def retrieve(self, query: ViewerQuery) -> Candidates:
        return await self._within["retrieval"](lambda: self._retrieve.remote(query))

    async def rank(self, query: ViewerQuery, candidates: Candidates) -> F32:
        viewer = query.arrays
        return await self._within["ranking"](
            lambda: self._rank.remote(
                viewer.viewer_dense, viewer.viewer_categories, candidates.viewer_embedding,
                candidates.rows, candidates.similarity, query.now_s, self._within["ranking"].budget_s,
            )
        )  # fmt: skip

    async def rerank(self, query: ViewerQuery, candidates: Candidates, value: F32, count: int) -> Slate:
        liked = query.history_rows[query.history_weights > 0]
        return await self._within["reranking"](
            lambda: self._rerank.remote(
                candidates.rows, candidates.source, candidates.because, value, liked, count, query.seed
            )
        )
