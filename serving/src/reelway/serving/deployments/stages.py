"""The stages of one release as Ray Serve deployments, and ``StageHandles``, which calls them from the router.

Each replica fetches and verifies the release itself, so a node without the release needs no other node. Each stage
takes one array container and returns one (``serving.stages.arrays``); a call carries 2 to 10 kB.

The methods of the stages are coroutines although they only compute: Ray Serve runs a coroutine in the replica's event
loop, and hands a plain function to a thread, which costs two thread switches per call.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from prometheus_client import CollectorRegistry
from ray.serve.handle import DeploymentHandle

from reelway.platform.rollout.traffic.serving_options import BudgetsMs, ReleaseArgs
from reelway.serving import metrics
from reelway.serving.circuit_breaker import CircuitBreaker
from reelway.serving.deployments.replica_logging import log_to_replica_file
from reelway.serving.fused import load_and_warm_up
from reelway.serving.open_inference.client import RemoteRanker, server_address
from reelway.serving.release_loader import open_trusted
from reelway.serving.request_path import run_without_waiting
from reelway.serving.stages.arrays import F32, Candidates, RankingInput, ScoredCandidates, Slate, ViewerQuery
from reelway.serving.takedown_follower import follow_takedowns
from reelway.serving.viewer_query import cold_start_query, warm_up_input

RETRIEVAL: Final = "Retrieval"
RANKING: Final = "Ranking"
RERANKING: Final = "Reranking"
FUSED_RELEASE: Final = "Release"


class RetrievalStage:
    """Replica of the retrieval stage: viewer tower, index and lists of one release."""

    def __init__(self, source: ReleaseArgs) -> None:
        log_to_replica_file()
        registry = CollectorRegistry()
        takedowns = follow_takedowns(source.events, registry) if source.events else None
        loader = open_trusted(source, takedowns)
        self._stage = loader.retrieval()
        self._metrics = metrics.RetrievalMetrics(registry, loader.release_id())
        self._stage.retrieve(cold_start_query(loader.table()))  # the first call includes deferred initialisation

    async def retrieve(self, query: ViewerQuery) -> Candidates:
        with metrics.timed(self._metrics.latency):
            candidates = self._stage.retrieve(query)
        self._metrics.count(candidates)
        return candidates


class RankingStage:
    """Replica of the ranking stage: ranker and video table of one release.

    With ``ranker_address`` the model runs in another process. The replica starts without waiting for that process.
    """

    def __init__(self, source: ReleaseArgs) -> None:
        log_to_replica_file()
        loader = open_trusted(source)
        registry = CollectorRegistry()
        self._metrics = metrics.RankingMetrics(registry, loader.release_id())
        if source.ranker_address:
            address = server_address(source.ranker_address, source.release)
            counts = metrics.RemoteRankerMetrics(registry, source.release)
            self._stage = loader.ranking(RemoteRanker(address, source.release, counts))
            return
        self._stage = loader.ranking()
        table = loader.table()
        run_without_waiting(self._stage.rank(warm_up_input(cold_start_query(table), table)))

    async def rank(self, ranking_input: RankingInput) -> F32:
        with metrics.timed(self._metrics.latency):
            value = await self._stage.rank(ranking_input)
        self._metrics.candidates.inc(len(ranking_input))
        return value


class RerankingStage:
    """Replica of the re-ranking stage: video table of one release.

    This deployment is the root of the release's application. It is bound to the other two so that all three are
    deployed and deleted together; the router calls each of them directly.
    """

    def __init__(self, source: ReleaseArgs, retrieval: Any, ranking: Any) -> None:
        log_to_replica_file()
        loader = open_trusted(source)
        self._stage = loader.reranking()
        self._metrics = metrics.RerankingMetrics(CollectorRegistry(), loader.release_id())
        self._bound = (retrieval, ranking)

    async def rerank(self, candidates: ScoredCandidates) -> Slate:
        with metrics.timed(self._metrics.latency):
            slate = self._stage.rerank(candidates)
        self._metrics.count(slate)
        return slate


class FusedRelease:
    """Fetches, verifies and tries a release whose stages run in the routers (composition ``fused``).

    This deployment is the only one of the release's application. It reports a release that cannot be served on this
    node before a router opens the release.
    """

    def __init__(self, source: ReleaseArgs) -> None:
        log_to_replica_file()
        loader = open_trusted(source)
        load_and_warm_up(loader)
        self._use = loader.use  # the release stays in the node's cache while it is deployed


class StageHandles:
    """The three stages of one release, called over Ray Serve handles."""

    def __init__(self, application: str, budgets: BudgetsMs) -> None:
        # A handle does not check that its deployment exists, so nothing waits and the deployments may start later.
        self._handles = [DeploymentHandle(stage, application) for stage in (RETRIEVAL, RANKING, RERANKING)]
        self._retrieve = self._handles[0].retrieve
        self._rank = self._handles[1].rank
        self._rerank = self._handles[2].rerank
        self.budgets = {
            stage: CircuitBreaker(ms) for stage, ms in budgets.model_dump().items() if stage != "viewer_row"
        }

    async def close(self) -> None:
        """Closes the connections."""
        for handle in self._handles:
            await handle.shutdown_async()

    async def retrieve(self, query: ViewerQuery) -> Candidates:
        candidates: Candidates = await self._retrieve.remote(query)
        return candidates

    async def rank(self, ranking_input: RankingInput) -> F32:
        value: F32 = await self._rank.remote(replace(ranking_input, timeout_s=self.budgets["ranking"].budget_s))
        return value

    async def rerank(self, candidates: ScoredCandidates) -> Slate:
        slate: Slate = await self._rerank.remote(candidates)
        return slate
