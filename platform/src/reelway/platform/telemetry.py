"""Prometheus metrics and logging with one naming scheme: ``reelway_<stage>_<thing>_<unit>``.

Labels come from ``ALLOWED_LABELS``. Viewer and video ids are no labels, because their number has no bound. A metric
with another name or label raises when it is created.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence
from typing import Final, Literal, TextIO

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

ALLOWED_LABELS: Final = frozenset(
    {
        "release", "arm", "stage", "source", "outcome", "result", "rung", "kind", "view", "rollout", "slice", "metric",
        "statistic", "topic", "partition", "thread",
    }
)  # fmt: skip
_NAME = re.compile(r"^reelway_[a-z]+(_[a-z0-9]+)+$")

LATENCY_BUCKETS_S: Final = (
    0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
)  # fmt: skip


def _check_name(name: str, labels: Sequence[str]) -> tuple[str, ...]:
    if not _NAME.match(name):
        raise ValueError(f"metric {name!r} does not have the form reelway_<stage>_<thing>_<unit>; rename it")
    if unknown := set(labels) - ALLOWED_LABELS:
        raise ValueError(f"metric {name}: labels {sorted(unknown)} are not among {sorted(ALLOWED_LABELS)}")
    return tuple(labels)


def counter(name: str, help_text: str, labels: Sequence[str], registry: CollectorRegistry | None) -> Counter:
    """Creates a counter; its name ends in ``_total``. Without a registry it is exported by metric files alone."""
    return Counter(name, help_text, _check_name(name, labels), registry=registry)


def gauge(
    name: str,
    help_text: str,
    labels: Sequence[str],
    registry: CollectorRegistry,
    mode: Literal["livesum", "livemax"] = "livesum",
) -> Gauge:
    """Creates a gauge: the sum over the live processes of a node, or their largest value, such as the largest age."""
    return Gauge(name, help_text, _check_name(name, labels), registry=registry, multiprocess_mode=mode)


def age_gauge(name: str, help_text: str, labels: Sequence[str], registry: CollectorRegistry) -> Gauge:
    """Creates a gauge whose value on a node is the largest of the node's live processes."""
    return Gauge(name, help_text, _check_name(name, labels), registry=registry, multiprocess_mode="livemax")


def histogram(
    name: str,
    help_text: str,
    labels: Sequence[str],
    registry: CollectorRegistry,
    buckets: Sequence[float] = LATENCY_BUCKETS_S,
) -> Histogram:
    """Creates a histogram, in seconds unless the name has another unit."""
    return Histogram(name, help_text, _check_name(name, labels), registry=registry, buckets=tuple(buckets))


def configure_logging(level: str = "INFO") -> None:
    """Logs to standard error, one line per record. Programs call it once; libraries never do."""
    logging.basicConfig(
        level=level, handlers=[_StderrHandler()], format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to the present ``sys.stderr``, also after it was replaced and the former one was closed."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr
