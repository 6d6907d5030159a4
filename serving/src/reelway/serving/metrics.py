"""The metrics of the request path, in the multiprocess mode of ``prometheus_client``.

Each process of a node writes its counts to memory-mapped files in one directory. The router's ``/metrics`` adds them
up, so it includes retrieval, ranking and re-ranking of its node, and the counts of replicas that have died. The
directory belongs to one start of the service. Labels never contain a viewer id or a video id.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from reelway.platform.contracts.ids import short_id
from reelway.platform.rollout import metric_names
from reelway.platform.telemetry import age_gauge, counter, gauge, histogram
from reelway.serving.metric_files import NodeCollector, merge_dead_files
from reelway.serving.stages.arrays import SOURCES, Candidates, Slate

FOLDER_VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"
SLATE_BUCKETS: Final = (0, 1, 5, 10, 20, 50, 100)
SHORT_RELEASE: Final = metric_names.SHORT_RELEASE
"""Length of the label ``release``: the prefix of the id that commands accept."""
OVERLAP_BUCKETS: Final = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
DRIFT_BUCKETS: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class RetrievalMetrics:
    """Metrics of the process that runs retrieval."""

    def __init__(self, registry: CollectorRegistry, release: str) -> None:
        release = short_id(release)
        self.latency = histogram(
            "reelway_retrieval_latency_seconds", "Time in the retrieval stage.", ["release"], registry
        ).labels(release)
        candidates = counter(
            "reelway_retrieval_candidates_total", "Candidates by source.", ["release", "source"], registry
        )
        self._candidates = [candidates.labels(release, source) for source in SOURCES]
        self._filtered = counter(
            "reelway_retrieval_filtered_total",
            "Proposals that were filtered out, by reason.",
            ["release", "kind"],
            registry,
        )
        self._release = release

    def count(self, candidates: Candidates) -> None:
        """Adds the candidates and the filtered proposals of one request."""
        for code in set(candidates.source.tolist()):
            self._candidates[code].inc(int((candidates.source == code).sum()))
        for kind, videos in candidates.filtered_counts.items():
            self._filtered.labels(self._release, kind).inc(videos)


class RankingMetrics:
    """Metrics of the process that runs ranking."""

    def __init__(self, registry: CollectorRegistry, release: str) -> None:
        release = short_id(release)
        self.latency = histogram(
            "reelway_ranking_latency_seconds", "Time in the ranking stage.", ["release"], registry
        ).labels(release)
        self.candidates = counter(
            "reelway_ranking_candidates_total", "Candidates that were scored.", ["release"], registry
        ).labels(release)


class RankServerMetrics:
    """Metrics of a rank server, which serves the ranker of one release to other processes."""

    def __init__(self, registry: CollectorRegistry, release: str) -> None:
        self._release = short_id(release)
        only = [self._release]
        self._requests = counter(
            "reelway_ranking_server_requests_total", "Requests by outcome.", ["release", "outcome"], registry
        )
        self._latency = histogram(
            "reelway_ranking_server_latency_seconds", "Time from a request to its response, queueing included.",
            ["release"], registry,
        ).labels(*only)  # fmt: skip
        self.candidates = counter(
            "reelway_ranking_server_candidates_total", "Candidates scored.", ["release"], registry
        ).labels(*only)
        self.in_flight = gauge(
            "reelway_ranking_server_under_way_requests",
            "Requests that are queued or being computed.",
            ["release"],
            registry,
        ).labels(*only)
        self.ready = gauge(
            "reelway_ranking_server_ready_ratio", "1 while the server is ready for requests.", ["release"], registry
        ).labels(*only)

    def count(self, outcome: str, seconds: float) -> None:
        """Adds one request with its outcome: ``ok``, ``refused``, ``busy``, ``late`` or ``failed``."""
        self._requests.labels(self._release, outcome).inc()
        if outcome == "ok":
            self._latency.observe(seconds)


class RemoteRankerMetrics:
    """Metrics of a ranking stage that calls a ranker in another process."""

    def __init__(self, registry: CollectorRegistry, release: str) -> None:
        self._release = short_id(release)
        self._faults = counter(
            "reelway_ranking_remote_faults_total", "Failed calls of the rank server, by kind of failure.",
            ["release", "kind"], registry,
        )  # fmt: skip

    def count_fault(self, kind: str) -> None:
        """Adds one failure: ``late``, ``gone``, ``busy``, ``refused`` or ``wrong`` (an unusable response)."""
        self._faults.labels(self._release, kind).inc()


class RerankingMetrics:
    """Metrics of the process that runs re-ranking."""

    def __init__(self, registry: CollectorRegistry, release: str) -> None:
        release = short_id(release)
        self.latency = histogram(
            "reelway_reranking_latency_seconds", "Time in the re-ranking stage.", ["release"], registry
        ).labels(release)
        self._cap_violations = counter(
            "reelway_reranking_relaxed_total", "Positions that break the per-creator cap.", ["release"], registry
        ).labels(release)
        self._explored = counter(
            "reelway_reranking_explored_total", "Positions that were drawn for exploration.", ["release"], registry
        ).labels(release)

    def count(self, slate: Slate) -> None:
        """Adds one slate."""
        if slate.cap_violations:
            self._cap_violations.inc(slate.cap_violations)
        if explored := int((slate.propensity < 1).sum()):
            self._explored.inc(explored)


class IngressMetrics:
    """Metrics of a router: requests as clients see them. One object counts for all releases of the router."""

    def __init__(self, registry: CollectorRegistry) -> None:
        both = ["release", "arm"]
        self.requests = counter(metric_names.REQUESTS, "Requests by outcome.", [*both, "outcome"], registry)
        self.refused = counter(
            "reelway_ingress_refused_total",
            "Requests rejected, by kind: invalid (422), too_long (413), late (408), encoded (415), cut_off (the client "
            "left), not_found (404 and 405), waiting (503: too many long bodies are arriving).",
            ["kind"], registry,
        )  # fmt: skip
        self.denied = counter(
            "reelway_ingress_denied_total",
            "Requests denied, by kind: address_rate, viewer_rate (429), viewer (403), no_keys (503), others (401).",
            ["kind"], registry,
        )  # fmt: skip
        self.key_faults = counter(
            "reelway_ingress_key_faults_total", "Failed reads of the keys that verify viewers.", [], registry
        )
        self.shed = counter(
            "reelway_ingress_shed_total", "Requests rejected with 429 because too many were in flight.", both,
            registry,
        )  # fmt: skip
        self.latency = histogram(metric_names.LATENCY, "Time from a valid request to its response.", both, registry)
        self.stage_latency = histogram(
            "reelway_ingress_stage_latency_seconds", "Time of a stage as seen by the router, transport included.",
            ["release", "stage"], registry,
        )  # fmt: skip
        self.degraded = counter(
            "reelway_ingress_degraded_total",
            "Responses that used a fallback, by degradation.",
            [*both, "rung"],
            registry,
        )
        self.faults = counter(
            "reelway_ingress_faults_total",
            "Stage calls that failed: timeout, error (reported by the stage) or unexpected (such as a bug).",
            ["release", "stage", "kind"], registry,
        )  # fmt: skip
        self.slate = histogram(
            "reelway_ingress_slate_videos", "Videos in a response.", both, registry, buckets=SLATE_BUCKETS
        )
        self.empty_slates = counter(
            metric_names.EMPTY_SLATES, "Responses without a video, to viewers who blocked nothing.", both, registry
        )
        self.emptied_slates = counter(
            "reelway_ingress_emptied_slates_total",
            "Responses without a video, to viewers who blocked creators or topics.", both, registry,
        )  # fmt: skip
        self.cold_viewers = counter(
            "reelway_ingress_cold_viewers_total", "Requests of viewers without a history.", both, registry
        )
        self.exposures_lost = counter(
            metric_names.EXPOSURES_LOST, "Slates that were served and are not in the event log.", both, registry
        )
        self.parity_samples_lost = counter(
            "reelway_ingress_parity_samples_lost_total",
            "Samples for the parity replay that could not be written.",
            [],
            registry,
        )
        self.foreign_features = counter(
            "reelway_ingress_foreign_features_total",
            "Releases with traffic that were opened although the feature store has other feature services.",
            ["release"],
            registry,
        )
        self.withheld = counter(
            "reelway_ingress_withheld_videos_total",
            "Videos that the last check removed from a slate: taken down, replaced, or not read yet.",
            both,
            registry,
        )
        self.videos_shown = counter(
            "reelway_ingress_videos_total", "Videos shown, by source.", [*both, "source"], registry
        )
        self.videos_repeated = counter(
            "reelway_ingress_repeated_videos_total",
            "Videos shown again because too few others were left for the viewer.",
            both,
            registry,
        )


class ShownMemoryMetrics:
    """Metrics of a router's memory of shown videos."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.faults = counter(
            "reelway_ingress_memory_faults_total", "Failed reads and writes of the viewers' memory, by kind.",
            ["kind"], registry,
        )  # fmt: skip
        self.lost = counter(
            "reelway_ingress_memory_lost_total",
            "Slates that were not remembered because too many waited to be written.",
            [],
            registry,
        )
        for kind in ("read", "write"):
            self.faults.labels(kind)


class IntakeMetrics:
    """Metrics of a router's ``POST /v1/outcomes``."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.refused = counter(
            metric_names.REFUSED, "Reported outcomes with an invalid token or value, and late ones.", [], registry
        )
        self.repeated = counter(
            "reelway_outcomes_repeated_total", "Accepted outcomes that were in the event log already.", [], registry
        )
        self.memory_failures = counter(
            "reelway_outcomes_memory_failures_total",
            "Requests that were answered before their outcomes were in the viewers' memories; the write is repeated.",
            [],
            registry,
        )
        self.memory_lost = counter(
            "reelway_outcomes_memory_lost_total",
            "Requests whose outcomes are in the event log and will not be in the viewers' memories.",
            [],
            registry,
        )


class TakedownMetrics:
    """Metrics of a process that follows the takedowns."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.age = age_gauge(
            "reelway_takedowns_age_seconds", "Time since which takedowns may be unread.", [],
            registry,
        )  # fmt: skip
        self.faults = counter("reelway_takedowns_faults_total", "Reads of the takedowns that failed.", [], registry)
        self.unreadable = counter(
            "reelway_takedowns_unreadable_total", "Records of the takedowns that are malformed.", [], registry
        )


class OverlayMetrics:
    """Metrics of a process that follows the overlay of a release."""

    def __init__(self, registry: CollectorRegistry, release: str) -> None:
        only = [short_id(release)]
        self.age = age_gauge(
            "reelway_overlay_age_seconds", "Time since the overlay was last read.", ["release"], registry
        ).labels(*only)
        self.rows = age_gauge(
            "reelway_overlay_videos", "Rows of uploads and updates that were read.", ["release"], registry
        ).labels(*only)
        self.faults = counter(
            "reelway_overlay_faults_total", "Reads of the overlay that failed.", ["release"], registry
        ).labels(*only)


class ShadowMetrics:
    """Metrics of mirrored requests: how the mirrored slates of a release differ from the shown slates."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = counter(
            metric_names.SHADOW_REQUESTS, "Mirrored requests by outcome.", ["release", "outcome"], registry
        )
        self.overlap = histogram(
            metric_names.SHADOW_OVERLAP, "Share of the shown videos that are in the mirrored slate.", ["release"],
            registry, buckets=OVERLAP_BUCKETS,
        )  # fmt: skip
        self.drift = histogram(
            metric_names.SHADOW_DRIFT, "Mean score relative to the shown slate: |ratio - 1|.", ["release"], registry,
            buckets=DRIFT_BUCKETS,
        )  # fmt: skip


@contextmanager
def timed(latency: Histogram) -> Iterator[None]:
    """Observes the duration of the block, even if the block raises."""
    start = time.perf_counter()
    try:
        yield
    finally:
        latency.observe(time.perf_counter() - start)


def render_metrics(folder: Path | None, process_registry: CollectorRegistry) -> bytes:
    """Returns all metrics of the node in Prometheus' text format.

    Args:
        folder: directory shared by the node's processes; None: only the metrics of this process are returned.
        process_registry: registry of this process.
    """
    if folder is None:
        return generate_latest(process_registry)
    merge_dead_files(folder)
    registry = CollectorRegistry()
    NodeCollector(registry, folder)
    return generate_latest(registry)


def multiprocess_dir() -> Path | None:
    """Returns the metrics directory of this start of the service, if one is configured."""
    name = os.environ.get(FOLDER_VARIABLE)
    return Path(name) if name else None
