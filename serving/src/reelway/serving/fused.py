"""Why: a hop costs more than a stage's arithmetic, so a service of one size may want all stages where requests come in.

The same stages and the same metrics, in the router's own process. What is given up is said where it is chosen
(``composition.Composition``). It knows no Ray.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from prometheus_client import CollectorRegistry

from reelway.serving import metrics
from reelway.serving.graph import LocalStages, run_to_end
from reelway.serving.open_releases import OpenRelease
from reelway.serving.release_loader import ReleaseLoader
from reelway.serving.stages.arrays import F32, Candidates, Slate, ViewerQuery
from reelway.serving.time_budget import TimeBudget
from reelway.serving.viewers import first_ranking, nobody

T = TypeVar("T")

GIL_TURN_S: Final = 0.0005
"""How long a path may hold the interpreter while the event loop wants it.

At Python's 5 ms the loop, which needs it for moments, waits for a path several times a request. On 2 cores at 8
connections, one run after the other: throughput 163 -> 173 requests/s, p99 in the open loop 96 -> 81 ms.
"""


def share_the_interpreter() -> None:
    """Let the event loop have it soon. For the whole process, so it is for whoever owns the process to call."""
    sys.setswitchinterval(GIL_TURN_S)


class OwnThread:
    """A place for one release's path: a thread of its own, one request after another.

    The event loop is never held up, and a release that is slow fills its own queue and not that of the one beside it.
    What is late and not begun is never begun.
    """

    def __init__(self, budget_ms: float) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="path")
        self._within = TimeBudget(budget_ms)

    async def __call__(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        loop = asyncio.get_running_loop()
        return await self._within(lambda: loop.run_in_executor(self._thread, lambda: run_to_end(work())))

    async def close(self) -> None:
        """Give up the thread."""
        self._thread.shutdown(wait=False)


class MeasuredStages:
    """The stages in this process, counted as they are counted in processes of their own."""

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

    async def rank(self, query: ViewerQuery, candidates: Candidates) -> F32:
        with metrics.timed(self._ranking.latency):
            value = await self._stages.rank(query, candidates)
        self._ranking.candidates.inc(len(candidates))
        return value

    async def rerank(self, query: ViewerQuery, candidates: Candidates, value: F32, count: int) -> Slate:
        with metrics.timed(self._reranking.latency):
            slate = await self._stages.rerank(query, candidates, value, count)
        self._reranking.count(slate)
        return slate


def load_warm(loader: ReleaseLoader) -> LocalStages:
    """All stages of a release after a first call, which pays for what is set up late.

    Raises:
        IncompatibleReleaseError: a file is not what its format says.
        ServingError: it cannot rank.
    """
    stages, table = loader.stages(), loader.table()
    query = nobody(table)
    stages.retrieval.retrieve(query)
    run_to_end(stages.ranking.rank(*first_ranking(query, table)))
    return stages


def open_fused(loader: ReleaseLoader, budget_ms: float) -> OpenRelease:
    """A release that is answered by this process. Blocks while it is loaded.

    Args:
        budget_ms: of the whole path; what is later is answered from the lists.
    """
    place = OwnThread(budget_ms)
    stages = MeasuredStages(load_warm(loader), loader.release_id())
    return OpenRelease(loader.edge(), stages, place.close, place)
