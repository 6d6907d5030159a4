"""Why: to see what a release would answer before anybody is shown it. Asked after the answer went out, never before.

Its answers are thrown away: no token, no impression, no exposure. It may cost nothing but idle time, so few mirrored
requests are under way at once and the rest are dropped and counted; whatever it raises ends here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from reelway.platform.contracts.api import RecommendRequest
from reelway.platform.rollout.traffic.bucketing import bucket_of
from reelway.serving.graph import Answered, RequestPath
from reelway.serving.metrics import SHORT, ShadowMetrics
from reelway.serving.open_releases import OpenRelease
from reelway.serving.stages.arrays import F32

log = logging.getLogger(__name__)

AT_ONCE: Final = 4
"""Mirrored requests under way in one router; at 50 ms each that is 80 a second."""
WITHIN_S: Final = 2.0


def is_mirrored(viewer_id: int, salt: str, weight_bp: int) -> bool:
    """Whether the viewer's requests are mirrored. Buckets of their own: the canary's first viewers are others."""
    return bucket_of(viewer_id, f"{salt}/shadow") < weight_bp


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it was answered: with this row, at this moment."""

    request: RecommendRequest
    viewer_row: Mapping[str, Any] | None
    now_s: float


class ShadowMirror:
    """Asks a release what it would have shown, and compares."""

    def __init__(self, metrics: ShadowMetrics, at_once: int = AT_ONCE, within_s: float = WITHIN_S) -> None:
        self._metrics = metrics
        self._at_once = at_once
        self._within_s = within_s
        self._under_way: set[asyncio.Task[None]] = set()

    def offer(self, release: OpenRelease, path: RequestPath, asked: Asked, answered: Answered) -> None:
        """Start a mirrored request, unless too many are under way."""
        name = release.edge.release_id[:SHORT]
        if len(self._under_way) >= self._at_once:
            self._metrics.requests.labels(name, "dropped").inc()
            return
        task = asyncio.get_running_loop().create_task(self._ask(release, path, asked, answered))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _ask(self, release: OpenRelease, path: RequestPath, asked: Asked, answered: Answered) -> None:
        name = release.edge.release_id[:SHORT]
        try:
            with release.in_use():
                async with asyncio.timeout(self._within_s):
                    ids, scores = await path.mirror(
                        asked.request, asked.viewer_row, asked.now_s, answered.response.request_id
                    )
        except Exception as fault:  # a shadow's fault is a number, nothing else
            log.warning("mirrored request to %s failed: %s: %s", name, type(fault).__name__, fault)
            path.count_failed()
            self._metrics.requests.labels(name, "failed").inc()
            return
        self._metrics.overlap.labels(name).observe(overlap_ratio(answered.video_ids, ids))
        drift = score_drift_ratio(answered.slate.score, scores)
        if drift is not None:
            self._metrics.drift.labels(name).observe(drift)
        self._metrics.requests.labels(name, "compared").inc()


def overlap_ratio(shown: Sequence[int], mirrored: Sequence[int]) -> float:
    """Share of the shown slate that the mirrored one has too, in whatever order; two empty slates are the same."""
    if not shown:
        return 0.0 if mirrored else 1.0
    return len(set(shown) & set(mirrored)) / len(shown)


def score_drift_ratio(shown: F32, mirrored: F32) -> float | None:
    """``|mean mirrored / mean shown - 1|``; None where there is no mean to divide by."""
    if not len(shown) or not len(mirrored) or not (base := float(shown.mean())):
        return None
    return abs(float(mirrored.mean()) / base - 1.0)
