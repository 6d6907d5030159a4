"""Statistics of live traffic from the client's side, and the report of ``reelway traffic``.

The report is complete at any time and can be compared with the service's metrics.
"""

from __future__ import annotations

import time
from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from reelway.pipelines.simulation.arm_stickiness import ArmStickinessCheck
from reelway.pipelines.simulation.live_viewers import Reaction

EXAMPLES: Final = 10
PERCENTILES: Final = (50, 95, 99)


@dataclass
class ArmTraffic:
    """Statistics of one release on one arm."""

    requests: int = 0
    viewers: set[int] = field(default_factory=set)
    latency_ms: array[float] = field(default_factory=lambda: array("d"))
    degraded: Counter[str] = field(default_factory=Counter)
    looked_at: int = 0
    long_watches: int = 0
    watch_s: float = 0.0

    def summary(self) -> dict[str, Any]:
        """Returns the report entry. Watch statistics are per examined video; None before the first one."""
        examined = self.looked_at or None
        return {
            "requests": self.requests,
            "viewers": len(self.viewers),
            "latency_ms": percentiles(self.latency_ms),
            "degraded": dict(self.degraded),
            "videos_looked_at": self.looked_at,
            "long_watch_rate": examined and self.long_watches / examined,
            "watch_s_per_impression": examined and self.watch_s / examined,
        }


@dataclass
class TrafficStatistics:
    """Statistics of one run of live traffic."""

    url: str
    rate: float
    started_at: float = field(default_factory=time.time)
    failed: int = 0
    failures: list[str] = field(default_factory=list)
    held_back: int = 0
    by_release: dict[tuple[str, str], ArmTraffic] = field(default_factory=dict)
    outcomes_sent: int = 0
    outcomes_answered: Counter[str] = field(default_factory=Counter)
    outcome_posts: int = 0
    outcome_posts_failed: int = 0
    arms: ArmStickinessCheck = field(default_factory=ArmStickinessCheck)
    _clock: float = field(default_factory=time.monotonic)
    _cpu: float = field(default_factory=time.process_time)

    @property
    def requests(self) -> int:
        """Completed and failed requests."""
        return self.failed + sum(arm.requests for arm in self.by_release.values())

    def record_response(
        self, release: str, arm: str, viewer_id: int, degraded: list[str], sent_s: float, took_ms: float
    ) -> ArmTraffic:
        """Records a slate."""
        statistics = self.by_release.setdefault((release, arm), ArmTraffic())
        statistics.requests += 1
        statistics.viewers.add(viewer_id)
        statistics.latency_ms.append(took_ms)
        statistics.degraded.update(degraded)
        self.arms.record_response(viewer_id, release, arm, sent_s)
        return statistics

    def record_reaction(self, statistics: ArmTraffic, reaction: Reaction) -> None:
        """Records a viewer's reaction to a slate."""
        statistics.looked_at += reaction.looked_at
        statistics.long_watches += reaction.long_watches
        statistics.watch_s += reaction.watch_s

    def record_failure(self, message: str) -> None:
        """Records a failed request."""
        self.failed += 1
        self.record_example(message)

    def record_example(self, message: str) -> None:
        """Keeps the message if it is one of the first ``EXAMPLES`` failures."""
        if len(self.failures) < EXAMPLES:
            self.failures.append(f"{time.time() - self.started_at:.1f} s: {message}"[:500])

    def report(self, *, running: bool) -> dict[str, Any]:
        """Returns the report as JSON-serialisable values."""
        by_arm: dict[str, array[float]] = {}
        for (_, arm), statistics in self.by_release.items():
            by_arm.setdefault(arm, array("d")).extend(statistics.latency_ms)
        viewers: set[int] = set().union(*(statistics.viewers for statistics in self.by_release.values()))
        elapsed_s = time.monotonic() - self._clock
        return {
            "url": self.url,
            "running": running,
            "started_at": self.started_at,
            "elapsed_s": round(elapsed_s, 3),
            "rate": self.rate,
            "rate_seen": round(self.requests / max(elapsed_s, 1e-9), 2),
            "requests": self.requests,
            "failed": self.failed,
            "failures": self.failures,
            "held_back": self.held_back,
            "viewers": len(viewers),
            "latency_ms": {arm: percentiles(values) for arm, values in sorted(by_arm.items())},
            "releases": [
                {"release": release, "arm": arm, **statistics.summary()}
                for (release, arm), statistics in self.by_release.items()
            ],
            "outcomes": {
                "sent": self.outcomes_sent,
                "answered": dict(self.outcomes_answered),
                "posts": self.outcome_posts,
                "posts_failed": self.outcome_posts_failed,
            },
            "arm_changes": self.arms.changes,
            "arm_change_examples": self.arms.examples,
            "cpu_ms_per_request": round(1000 * (time.process_time() - self._cpu) / max(self.requests, 1), 3),
        }


def percentiles(values_ms: array[float]) -> dict[str, float | None]:
    """Returns ``{"p50": ..., "p95": ..., "p99": ...}`` in milliseconds; None without values."""
    if not values_ms:
        return {f"p{p}": None for p in PERCENTILES}
    values = np.percentile(np.frombuffer(values_ms), PERCENTILES)
    return {f"p{p}": round(float(value), 2) for p, value in zip(PERCENTILES, values, strict=True)}
