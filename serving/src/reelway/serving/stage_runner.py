"""Runs the stages of a request within their time budgets and replaces a failed stage by its fallback.

Every stage of every request is run by ``StageRunner.run``. The runner records the stage's latency, counts its failures
by kind (``timeout`` or ``error``) and adds the degradation to the list that the response carries.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext
from typing import Final, NamedTuple, TypeVar

from reelway.platform.contracts.api import Degradation
from reelway.platform.contracts.ids import short_id
from reelway.platform.errors import ReelwayError
from reelway.serving.circuit_breaker import CircuitBreaker
from reelway.serving.metrics import IngressMetrics, timed

T = TypeVar("T")
V = TypeVar("V")
log = logging.getLogger(__name__)


class Stage(NamedTuple):
    """One stage of the request path."""

    name: str  # value of the metrics' label ``stage`` and key of the stage's budget
    degradation: Degradation  # how a response is degraded that used the stage's fallback


VIEWER_ROW: Final = Stage("viewer_row", "no_viewer_row")
VIEWER_QUERY: Final = Stage("ingress", "no_viewer_row")
RETRIEVAL: Final = Stage("retrieval", "no_retrieval")
RANKING: Final = Stage("ranking", "no_ranker")
RERANKING: Final = Stage("reranking", "no_reranker")


FAULT_KINDS: Final = ("timeout", "error", "unexpected")
"""Values of the metric's label: late, a failure that the stage reports, and anything else, such as a bug."""


class StageRunner:
    """Runs the stages of one release.

    Args:
        budgets: stage name -> time budget of one call. A stage without a budget may take any time.
    """

    def __init__(self, metrics: IngressMetrics, release_id: str, budgets: Mapping[str, CircuitBreaker]) -> None:
        self._metrics = metrics
        self._release = short_id(release_id)
        self._budgets = budgets
        for stage in budgets:
            for kind in FAULT_KINDS:
                metrics.faults.labels(self._release, stage, kind)  # 0 from the start: no line would mean "no data"

    async def run(
        self,
        stage: Stage,
        call: Callable[[V], Awaitable[T]],
        value: V,
        fallback: Callable[[], T],
        degraded: list[Degradation],
        *,
        is_timed: bool = True,
    ) -> T:
        """Returns ``call(value)``, or ``fallback()`` if the call raises any exception or exceeds its budget.

        Args:
            degraded: receives the stage's degradation if the fallback was used.
            is_timed: whether the latency is recorded. A stage that is known not to run would distort it.
        """
        budget = self._budgets.get(stage.name)
        try:
            with timed(self._metrics.stage_latency.labels(self._release, stage.name)) if is_timed else nullcontext():
                return await (call(value) if budget is None else budget(lambda: call(value)))
        except Exception as exception:  # a failed stage must never fail the request
            kind = _fault_kind(exception)
            self._metrics.faults.labels(self._release, stage.name, kind).inc()
            log.warning(
                "stage failed, fallback used: stage=%s degradation=%s: %s: %s",
                stage.name, stage.degradation, type(exception).__name__, exception,
                exc_info=kind == "unexpected",
            )  # fmt: skip
            degraded.append(stage.degradation)
            return fallback()


def _fault_kind(exception: Exception) -> str:
    """Returns one of ``FAULT_KINDS``."""
    if isinstance(exception, TimeoutError):
        return "timeout"
    return "error" if isinstance(exception, ReelwayError) else "unexpected"
