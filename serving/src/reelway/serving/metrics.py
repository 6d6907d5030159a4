"""What the stages count. Every process of a node writes its own files; whoever is asked adds them up.

Prometheus' multiprocess mode: each process keeps its counts in memory-mapped files of one folder, so the router's
``/metrics`` shows retrieval, ranking and re-ranking of its node too, and the counts of a replica that died are not
lost. The folder belongs to one start of the service. Labels never name a viewer or a video.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from reelway.platform.rollout import series
from reelway.platform.telemetry import counter, gauge, histogram
from reelway.serving.stages.arrays import SOURCES, Candidates, Slate

FOLDER_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"
SLATE_BUCKETS: Final = (0, 1, 5, 10, 20, 50, 100)
SHORT: Final = series.SHORT_RELEASE
"""A release's label: as much of its id as people type."""
OVERLAP_BUCKETS: Final = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
DRIFT_BUCKETS: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class RetrievalMetrics:
    """Counted where retrieval runs."""

    def __init__(self, registry: CollectorRegistry, release: str) -> None:
        release = release[:SHORT]
        self.latency = histogram(
            "reelway_retrieval_latency_seconds", "Time in the retrieval stage.", ["release"], registry
        ).labels(release)
        found = counter("reelway_retrieval_candidates_total", "Candidates by source.", ["release", "source"], registry)
        self._found = [found.labels(release, source) for source in SOURCES]
        self._left = counter(
            "reelway_retrieval_filtered_total", "Proposals that left, by reason.", ["release", "kind"], registry
        )
        self._release = release

    def count(self, candidates: Candidates) -> None:
        """Add one request's candidates, and what left on the way."""
        for code in set(candidates.source.tolist()):
            self._found[code].inc(int((candidates.source == code).sum()))
        for kind, videos in candidates.filtered_counts.items():
            self._left.labels(self._release, kind).inc(videos)


class RankingMetrics:
    """Counted where ranking runs."""

    def __init__(self, registry: CollectorRegistry, release: str) -> None:
        release = release[:SHORT]
        self.latency = histogram(
            "reelway_ranking_latency_seconds", "Time in the ranking stage.", ["release"], registry
        ).labels(release)
        self.candidates = counter(
            "reelway_ranking_candidates_total", "Candidates given a value.", ["release"], registry
        ).labels(release)


class RankServerMetrics:
    """Counted where a ranker is served to graphs of other processes. All of one release."""

    def __init__(self, registry: CollectorRegistry, release: str) -> None:
        self._release = release[:SHORT]
        only = [self._release]
        self._requests = counter(
            "reelway_ranking_server_requests_total", "Requests by how they ended.", ["release", "outcome"], registry
        )
        self._latency = histogram(
            "reelway_ranking_server_latency_seconds", "From a request to its answer, its wait included.",
            ["release"], registry,
        ).labels(*only)  # fmt: skip
        self.candidates = counter(
            "reelway_ranking_server_candidates_total", "Candidates scored.", ["release"], registry
        ).labels(*only)
        self.under_way = gauge(
            "reelway_ranking_server_under_way_requests", "Requests that wait or are worked out.", ["release"], registry
        ).labels(*only)
        self.ready = gauge(
            "reelway_ranking_server_ready_ratio", "1 while requests should come here.", ["release"], registry
        ).labels(*only)

    def count(self, outcome: str, seconds: float) -> None:
        """Add one request: ``ok``, ``refused``, ``busy``, ``late``, ``not_ready`` or ``failed``."""
        self._requests.labels(self._release, outcome).inc()
        if outcome == "ok":
            self._latency.observe(seconds)


class RemoteRankerMetrics:
    """Counted where a graph asks a ranker of another process."""

    def __init__(self, registry: CollectorRegistry, release: str) -> None:
        self._release = release[:SHORT]
        self._faults = counter(
            "reelway_ranking_remote_faults_total", "Calls of the ranker's server without an answer, by kind of fault.",
            ["release", "kind"], registry,
        )  # fmt: skip

    def count_fault(self, kind: str) -> None:
        """Add one: ``late``, ``gone``, ``busy``, ``refused`` or ``wrong`` (an answer that cannot be used)."""
        self._faults.labels(self._release, kind).inc()


class RerankingMetrics:
    """Counted where re-ranking runs."""

    def __init__(self, registry: CollectorRegistry, release: str) -> None:
        release = release[:SHORT]
        self.latency = histogram(
            "reelway_reranking_latency_seconds", "Time in the re-ranking stage.", ["release"], registry
        ).labels(release)
        self._cap_violations = counter(
            "reelway_reranking_relaxed_total", "Places that broke the per-creator cap.", ["release"], registry
        ).labels(release)
        self._explored = counter(
            "reelway_reranking_explored_total", "Places that were left to chance.", ["release"], registry
        ).labels(release)

    def count(self, slate: Slate) -> None:
        """Add one slate."""
        if slate.cap_violations:
            self._cap_violations.inc(slate.cap_violations)
        if explored := int((slate.propensity < 1).sum()):
            self._explored.inc(explored)


class IngressMetrics:
    """Counted where requests come in: the viewer's side of everything. One for all releases of a router."""

    def __init__(self, registry: CollectorRegistry) -> None:
        both = ["release", "arm"]
        self.requests = counter(series.REQUESTS, "Requests by how they ended.", [*both, "outcome"], registry)
        self.refused = counter("reelway_ingress_refused_total", "Invalid requests, answered 422.", [], registry)
        self.shed = counter(
            "reelway_ingress_shed_total", "Requests sent away, answered 429, because too many were under way.", both,
            registry,
        )  # fmt: skip
        self.latency = histogram(series.LATENCY, "From a valid request to its answer.", both, registry)
        self.stage_latency = histogram(
            "reelway_ingress_stage_latency_seconds", "A stage as the router sees it, hop included.",
            ["release", "stage"], registry,
        )  # fmt: skip
        self.degraded = counter(
            "reelway_ingress_degraded_total", "Answers that stepped down, by rung.", [*both, "rung"], registry
        )
        self.faults = counter(
            "reelway_ingress_faults_total", "Stage calls that failed, by kind of fault.",
            ["release", "stage", "kind"], registry,
        )  # fmt: skip
        self.slate = histogram(
            "reelway_ingress_slate_videos", "Videos in an answer.", both, registry, buckets=SLATE_BUCKETS
        )
        self.empty = counter(series.EMPTY_SLATES, "Answers without a video.", both, registry)
        self.cold = counter("reelway_ingress_cold_viewers_total", "Viewers without a known past.", both, registry)
        self.exposures_lost = counter(
            "reelway_ingress_exposures_lost_total", "Impressions that could not be kept for counting.", [], registry
        )
        self.shown = counter("reelway_ingress_videos_total", "Videos shown, by source.", [*both, "source"], registry)


class ShadowMetrics:
    """Counted where requests are mirrored: how a release's answers differ from what was shown."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = counter(
            series.SHADOW_REQUESTS, "Mirrored requests by how they ended.", ["release", "outcome"], registry
        )
        self.overlap = histogram(
            series.SHADOW_OVERLAP, "Share of the shown slate that the mirrored one has too.", ["release"], registry,
            buckets=OVERLAP_BUCKETS,
        )  # fmt: skip
        self.drift = histogram(
            series.SHADOW_DRIFT, "Mean score against the shown slate's: |ratio - 1|.", ["release"], registry,
            buckets=DRIFT_BUCKETS,
        )  # fmt: skip


@contextmanager
def timed(latency: Histogram) -> Iterator[None]:
    """Observe how long the block took, however it ended."""
    start = time.perf_counter()
    try:
        yield
    finally:
        latency.observe(time.perf_counter() - start)


def scrape(folder: Path | None, own: CollectorRegistry) -> bytes:
    """All metrics of the node in Prometheus' text format; this process's own ones where no folder is shared."""
    if folder is None:
        return generate_latest(own)
    _forget_gauges_of_the_dead(folder)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(folder))  # type: ignore[no-untyped-call]
    return generate_latest(registry)


def shared_folder() -> Path | None:
    """The folder of this start of the service, when there is one."""
    name = os.environ.get(FOLDER_VARIABLE)
    return Path(name) if name else None


def _forget_gauges_of_the_dead(folder: Path) -> None:
    """A counter of a dead process still counts; a level it once had does not."""
    for file in folder.glob("gauge_live*_*.db"):
        pid = file.stem.rpartition("_")[2]
        if pid.isdigit() and not Path("/proc", pid).exists():
            file.unlink(missing_ok=True)
