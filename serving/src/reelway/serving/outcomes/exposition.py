"""The collector's counts in Prometheus' text format, with the names and labels of ``rollout.metric_names``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from reelway.platform.contracts.ids import short_id
from reelway.platform.rollout import metric_names
from reelway.serving.outcomes.ledger import Snapshot
from reelway.serving.outcomes.outcome_store import ReceivedKey
from reelway.serving.outcomes.viewer_sums import METRICS, SLICES


def prometheus_text(snapshot: Snapshot, refused: int) -> bytes:
    """All series of all arms, zeros included, so that an arm without viewers differs from an unknown arm."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_SnapshotCollector(snapshot, refused))
    return generate_latest(registry)


class _SnapshotCollector(Collector):
    def __init__(self, snapshot: Snapshot, refused: int) -> None:
        self._snapshot, self._refused = snapshot, refused

    def collect(self) -> Iterator[CounterMetricFamily]:
        arm_labels = ["rollout", "release", "arm", "slice"]
        exposure = CounterMetricFamily(
            metric_names.EXPOSURE, "Viewers and impressions of a rollout's arm.", labels=[*arm_labels, "statistic"]
        )
        statistic = CounterMetricFamily(
            metric_names.STATISTIC,
            "Sums over viewers of an outcome metric.",
            labels=[*arm_labels, "metric", "statistic"],
        )
        for arm, sums_SK in self._snapshot.sums.items():
            for slice_, row in zip(SLICES, sums_SK.tolist(), strict=True):
                labels = [arm.rollout, short_id(arm.release), arm.arm.value, slice_.value]
                values = iter(row)
                for name in metric_names.EXPOSURE_STATISTICS:
                    exposure.add_metric([*labels, name], next(values))
                for metric in METRICS:
                    for name in metric_names.METRIC_STATISTICS:
                        statistic.add_metric([*labels, metric, name], next(values))
        yield exposure
        yield statistic
        yield self._received_family()
        yield CounterMetricFamily(
            metric_names.REFUSED, "Reported outcomes with an invalid token or value.", value=self._refused
        )

    def _received_family(self) -> CounterMetricFamily:
        family = CounterMetricFamily(
            metric_names.RECEIVED, "Reported outcomes by status.", labels=["release", "arm", "kind", "outcome"]
        )
        short: Counter[ReceivedKey] = Counter()
        for (release, arm, kind, outcome), count in self._snapshot.received.items():
            short[short_id(release), arm, kind, outcome] += count
        for key, count in short.items():
            family.add_metric(list(key), count)
        return family
