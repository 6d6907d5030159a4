"""Runs all stages of a release in the router's process (composition ``fused``). Imports no Ray.

A call between Ray Serve replicas costs more CPU than most stages do, so a service on few cores is faster without it.
``serving_options.Composition`` describes the drawbacks. Stages and metrics are those of the composition ``staged``.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from prometheus_client import CollectorRegistry

from reelway.serving import metrics
from reelway.serving.circuit_breaker import CircuitBreaker
from reelway.serving.release_loader import ReleaseLoader
from reelway.serving.release_pool import OpenRelease
from reelway.serving.request_path import (
    NO_BUDGETS,
    LocalStages,
    PathCall,
    PathResult,
    RequestPath,
    UnavailableStages,
    run_without_waiting,
)
from reelway.serving.stages.arrays import F32, Candidates, RankingInput, ScoredCandidates, Slate, ViewerQuery
from reelway.serving.viewer_query import cold_start_query, warm_up_input

SWITCH_INTERVAL_S: Final = 0.0005
"""Interpreter switch interval in seconds: how long a path may hold the GIL while the event loop waits for it.

The event loop needs the GIL often, for moments. With Python's default of 5 ms it waits for a path several times per
request. Measured one after the other on 2 cores with 8 connections: throughput 163 -> 173 requests/s, p99 under open
load 96 -> 81 ms.
"""


def shorten_switch_interval() -> None:
    """Shortens the interpreter's switch interval for the whole process. Only the owner of the process calls this."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)


class SingleThreadExecutor:
    """Runs the path of one release on one thread, one request at a time.

    The event loop stays free, and the queue of a slow release delays no other release. A late call whose run has not
    started is never started; a late call is answered with the fallbacks of all stages.

    Args:
        budget_ms: time budget of the whole path, the wait for the thread included.
    """

    def __init__(self, budget_ms: float) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="path")
        self._within = CircuitBreaker(budget_ms)
        self._unavailable = UnavailableStages()

    async def run(self, path: RequestPath, call: PathCall) -> PathResult:
        loop = asyncio.get_running_loop()
        try:
            return await self._within(
                lambda: loop.run_in_executor(self._thread, lambda: run_without_waiting(path.run(call)))
            )
        except TimeoutError:
            return await path.run(call, self._unavailable)

    async def close(self) -> None:
        """Shuts the thread down without waiting for its last run."""
        self._thread.shutdown(wait=False)


class InstrumentedStages:
    """``LocalStages`` with the metrics that stages in processes of their own record."""

    budgets: Mapping[str, CircuitBreaker] = NO_BUDGETS

    def __init__(self, stages: LocalStages, release: str) -> None:
        self._stages = stages
        self._retrieval = metrics.RetrievalMetrics(CollectorRegistry(), release)
        self._ranking = metrics.RankingMetrics(CollectorRegistry(), release)
        self._reranking = metrics.RerankingMetrics(CollectorRegistry(), release)

    async def retrieve(self, query: ViewerQuery) -> Candidates:
        with metrics.timed(self._retrieval.latency):
            candidates = await self._stages.retrieve(query)
        self._retrieval.count(candidates)
        return candidates

    async def rank(self, ranking_input: RankingInput) -> F32:
        with metrics.timed(self._ranking.latency):
            value = await self._stages.rank(ranking_input)
        self._ranking.candidates.inc(len(ranking_input))
        return value

    async def rerank(self, candidates: ScoredCandidates) -> Slate:
        with metrics.timed(self._reranking.latency):
            slate = await self._stages.rerank(candidates)
        self._reranking.count(slate)
        return slate


def load_and_warm_up(loader: ReleaseLoader) -> LocalStages:
    """Loads all stages of a release and calls them once, because the first call includes deferred initialisation.

    Raises:
        IncompatibleReleaseError: if a file does not have its format.
        ServingError: if the release cannot rank.
    """
    stages, table = loader.stages(), loader.table()
    query = cold_start_query(table)
    stages.retrieval.retrieve(query)
    run_without_waiting(stages.ranking.rank(warm_up_input(query, table)))
    return stages


def open_fused(loader: ReleaseLoader, budget_ms: float) -> OpenRelease:
    """Opens a release that this process answers with. Blocks while the release is loaded.

    Args:
        budget_ms: time budget of the whole path; a later call is answered from the popular list.
    """
    executor = SingleThreadExecutor(budget_ms)
    stages = InstrumentedStages(load_and_warm_up(loader), loader.release_id())
    return OpenRelease(loader.router_release(), stages, executor.close, executor)
