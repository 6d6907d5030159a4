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

from reelway.pipelines.simulation.live_arms import ArmLedger
from reelway.pipelines.simulation.live_viewers import Reaction

EXAMPLES: Final = 10
PERCENTILES: Final = (50, 95, 99)


@dataclass
class ArmTally:
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
        seen = self.looked_at or None
        return {
            "requests": self.requests,
            "viewers": len(self.viewers),
            "latency_ms": percentiles(self.latency_ms),
            "degraded": dict(self.degraded),
            "videos_looked_at": self.looked_at,
            "long_watch_rate": seen and self.long_watches / seen,
            "watch_s_per_impression": seen and self.watch_s / seen,
        }


@dataclass
class TrafficTally:
    """Statistics of one run of live traffic."""

    url: str
    rate: float
    started_at: float = field(default_factory=time.time)
    failed: int = 0
    failures: list[str] = field(default_factory=list)
    held_back: int = 0
    by_release: dict[tuple[str, str], ArmTally] = field(default_factory=dict)
    outcomes_sent: int = 0
    outcomes_answered: Counter[str] = field(default_factory=Counter)
    outcome_posts: int = 0
    outcome_posts_failed: int = 0
    arms: ArmLedger = field(default_factory=ArmLedger)
    _clock: float = field(default_factory=time.monotonic)
    _cpu: float = field(default_factory=time.process_time)

    @property
    def requests(self) -> int:
        """Completed and failed requests."""
        return self.failed + sum(arm.requests for arm in self.by_release.values())

    def answered(
        self, release: str, arm: str, viewer_id: int, degraded: list[str], sent_s: float, took_ms: float
    ) -> ArmTally:
        """Records a slate."""
        tally = self.by_release.setdefault((release, arm), ArmTally())
        tally.requests += 1
        tally.viewers.add(viewer_id)
        tally.latency_ms.append(took_ms)
        tally.degraded.update(degraded)
        self.arms.answered(viewer_id, release, arm, sent_s)
        return tally

    def reacted(self, tally: ArmTally, reaction: Reaction) -> None:
        """Records a viewer's reaction to a slate."""
        tally.looked_at += reaction.looked_at
        tally.long_watches += reaction.long_watches
        tally.watch_s += reaction.watch_s

    def fault(self, what: str) -> None:
        """Records a failed request."""
        self.failed += 1
        self.example(what)

    def example(self, what: str) -> None:
        """Keeps the message if it is one of the first ``EXAMPLES`` failures."""
        if len(self.failures) < EXAMPLES:
            self.failures.append(f"{time.time() - self.started_at:.1f} s: {what}"[:500])

    def report(self, *, running: bool) -> dict[str, Any]:
        """Returns the report as JSON-serialisable values."""
        by_arm: dict[str, array[float]] = {}
        for (_, arm), tally in self.by_release.items():
            by_arm.setdefault(arm, array("d")).extend(tally.latency_ms)
        viewers: set[int] = set().union(*(tally.viewers for tally in self.by_release.values()))
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
                {"release": release, "arm": arm, **tally.summary()} for (release, arm), tally in self.by_release.items()
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
    found = np.percentile(np.frombuffer(values_ms), PERCENTILES)
    return {f"p{p}": round(float(value), 2) for p, value in zip(PERCENTILES, found, strict=True)}
