"""Mirrors requests to a release that serves no traffic and compares its slates with those that were shown.

A request is mirrored after its response was sent. The mirrored slate is discarded: it gets no token, no impression and
no exposure. Mirroring must use idle time only, so few mirrored requests are in flight and the rest are dropped and
counted. An exception of the mirrored release affects no viewer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from reelway.platform.contracts.api import RecommendRequest
from reelway.platform.contracts.ids import short_id
from reelway.platform.features.viewer_memory import ViewerMemoryState
from reelway.platform.rollout.traffic.bucketing import bucket_of
from reelway.platform.supervised_thread import supervise_task
from reelway.serving.metrics import ShadowMetrics
from reelway.serving.release_pool import OpenRelease
from reelway.serving.request_path import Recommendation, RequestPath
from reelway.serving.stages.arrays import F32

log = logging.getLogger(__name__)

MAX_IN_FLIGHT: Final = 4
"""Mirrored requests in flight in one router; at 50 ms each, 80 per second."""
TIMEOUT_S: Final = 2.0
"""Timeout of one mirrored request in seconds."""


def is_mirrored(viewer_id: int, salt: str, weight_bp: int) -> bool:
    """Whether the viewer's requests are mirrored.

    The salt differs from the rollout's, so mirrored viewers are independent of the canary's viewers.
    """
    return bucket_of(viewer_id, f"{salt}/shadow") < weight_bp


@dataclass(frozen=True, slots=True)
class MirroredRequest:
    """A request with the viewer row, the memory and the times it was answered with."""

    request: RecommendRequest
    viewer_row: Mapping[str, Any] | None
    now_s: float
    shown_at_s: float
    memory: ViewerMemoryState


class ShadowMirror:
    """Sends mirrored requests to a release and records how its slates differ."""

    def __init__(self, metrics: ShadowMetrics, max_in_flight: int = MAX_IN_FLIGHT, within_s: float = TIMEOUT_S) -> None:
        self._metrics = metrics
        self._max_in_flight = max_in_flight
        self._within_s = within_s
        self._in_flight: set[asyncio.Task[None]] = set()

    def mirror(
        self, release: OpenRelease, path: RequestPath, mirrored_request: MirroredRequest, recommendation: Recommendation
    ) -> None:
        """Starts a mirrored request, unless too many are in flight."""
        name = short_id(release.release_id)
        if len(self._in_flight) >= self._max_in_flight:
            self._metrics.requests.labels(name, "dropped").inc()
            return
        task = asyncio.get_running_loop().create_task(self._mirror(release, path, mirrored_request, recommendation))
        supervise_task(task, "shadow")
        self._in_flight.add(task)
        task.add_done_callback(self._in_flight.discard)

    async def _mirror(
        self, release: OpenRelease, path: RequestPath, mirrored_request: MirroredRequest, recommendation: Recommendation
    ) -> None:
        name = short_id(release.release_id)
        try:
            with release.track_request():
                async with asyncio.timeout(self._within_s):
                    ids, scores = await path.mirror(
                        mirrored_request.request,
                        mirrored_request.viewer_row,
                        mirrored_request.now_s,
                        recommendation.response.request_id,
                        mirrored_request.shown_at_s,
                        mirrored_request.memory,
                    )
        except Exception as fault:  # a failure of a mirrored release is only counted
            log.warning("mirrored request to %s failed: %s: %s", name, type(fault).__name__, fault)
            path.count_failed()
            self._metrics.requests.labels(name, "failed").inc()
            return
        self._metrics.overlap.labels(name).observe(overlap_ratio(recommendation.exposure.video_id.tolist(), ids))
        drift = score_drift_ratio(recommendation.slate.score, scores)
        if drift is not None:
            self._metrics.drift.labels(name).observe(drift)
        self._metrics.requests.labels(name, "compared").inc()


def overlap_ratio(shown: Sequence[int], mirrored: Sequence[int]) -> float:
    """Returns the share of the shown videos that are in the mirrored slate too; 1 if both slates are empty."""
    if not shown:
        return 0.0 if mirrored else 1.0
    return len(set(shown) & set(mirrored)) / len(shown)


def score_drift_ratio(shown: F32, mirrored: F32) -> float | None:
    """Returns ``|mean mirrored / mean shown - 1|``; None if a slate is empty or the shown mean is 0."""
    if not len(shown) or not len(mirrored) or not (base := float(shown.mean())):
        return None
    return abs(float(mirrored.mean()) / base - 1.0)
