"""The collector's counts in Prometheus' text format, with the names and labels of ``rollout.metric_names``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from reelway.platform.contracts.ids import short_id
from reelway.platform.rollout import metric_names
from reelway.serving.outcomes.exposures import ArmKey
from reelway.serving.outcomes.ledger import Snapshot
from reelway.serving.outcomes.outcome_store import ReceivedKey
from reelway.serving.outcomes.viewer_sums import METRICS, SLICES


@dataclass
class LogReading:
    """How far a topic is read.

    Args:
        started_us: start of the collector.
        read_to_us: no unread record is older (``ReadBatch.watermark_us``); 0 before the first read.
    """

    started_us: int
    read_to_us: int = 0
    unreadable: int = 0  # records skipped since the start


def prometheus_text(snapshot: Snapshot, readings: Mapping[str, LogReading], faults: int, now: float) -> bytes:
    """All series of all arms, zeros included, and the age of each topic's reading at ``now`` (Unix seconds)."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_SnapshotCollector(snapshot, readings, faults, now))
    return generate_latest(registry)


_ARM_LABELS: Final = ("rollout", "release", "arm")


def _values(arm: ArmKey) -> list[str]:
    """The values of ``_ARM_LABELS``."""
    return [arm.rollout, short_id(arm.release), arm.arm.value]


class _SnapshotCollector(Collector):
    def __init__(self, snapshot: Snapshot, readings: Mapping[str, LogReading], faults: int, now: float) -> None:
        self._snapshot, self._readings, self._faults, self._now = snapshot, readings, faults, now

    def collect(self) -> Iterator[Metric]:
        yield from self._sum_families()
        yield from self._audience_families()
        yield self._received_family()
        yield CounterMetricFamily(
            metric_names.LATE_SLATES,
            "Slates of rollouts that were logged too late to be counted.",
            value=self._snapshot.late_slates,
        )
        yield CounterMetricFamily(
            metric_names.UNAUTHENTICATED_SLATES,
            "Slates of rollouts whose viewer did not prove its identity, although the service requires it.",
            value=self._snapshot.unauthenticated_slates,
        )
        yield CounterMetricFamily(
            metric_names.BOUNDED_WATCHES,
            "Watches that counted less than reported, because they are longer than twice their video.",
            value=self._snapshot.bounded_watches,
        )
        yield CounterMetricFamily(
            metric_names.DROPPED_ARMS,
            "Arms of rollouts that are no longer counted, because too many others exist.",
            value=self._snapshot.dropped_arms,
        )
        yield CounterMetricFamily(
            metric_names.COLLECTOR_FAULTS,
            "Reads of the event log, or transactions of the sums, that failed.",
            value=self._faults,
        )
        yield from self._log_families()

    def _sum_families(self) -> Iterator[Metric]:
        labels = [*_ARM_LABELS, "slice"]
        exposure = GaugeMetricFamily(
            metric_names.EXPOSURE, "Viewers that are evidence, and their impressions.", labels=[*labels, "statistic"]
        )
        statistic = GaugeMetricFamily(
            metric_names.STATISTIC, "Sums over viewers of an outcome metric.", labels=[*labels, "metric", "statistic"]
        )
        for arm, sums_SK in self._snapshot.sums.items():
            for slice_, row in zip(SLICES, sums_SK.tolist(), strict=True):
                values = iter(row)
                for name in metric_names.EXPOSURE_STATISTICS:
                    exposure.add_metric([*_values(arm), slice_.value, name], next(values))
                for metric in METRICS:
                    for name in metric_names.METRIC_STATISTICS:
                        statistic.add_metric([*_values(arm), slice_.value, metric, name], next(values))
        yield exposure
        yield statistic

    def _audience_families(self) -> Iterator[Metric]:
        count = CounterMetricFamily(
            metric_names.AUDIENCE, "Viewers of an arm and what they did.", labels=[*_ARM_LABELS, "statistic"]
        )
        weight = GaugeMetricFamily(
            metric_names.AUDIENCE_WEIGHT,
            "Overlap weights of the first impressions of an arm's viewers.",
            labels=[*_ARM_LABELS, "kind", "statistic"],
        )
        for arm, audience in self._snapshot.audience.items():
            for name, value in zip(metric_names.AUDIENCE_STATISTICS, audience.tolist(), strict=True):
                if isinstance(name, str):
                    count.add_metric([*_values(arm), name], value)
                else:
                    weight.add_metric([*_values(arm), *name], value)
        yield count
        yield weight

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

    def _log_families(self) -> Iterator[Metric]:
        age = GaugeMetricFamily(metric_names.LOG_AGE, "Time since which records may be unread.", labels=["source"])
        unreadable = CounterMetricFamily(
            metric_names.UNREADABLE, "Records of the event log that were skipped.", labels=["source"]
        )
        for topic, reading in self._readings.items():
            since_us = reading.read_to_us or reading.started_us
            age.add_metric([topic], max(self._now - since_us / 1e6, 0.0))
            unreadable.add_metric([topic], reading.unreadable)
        yield age
        yield unreadable
