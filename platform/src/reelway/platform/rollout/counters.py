"""Arithmetic on scraped counters and histograms: increases, sums over replicas, quantiles. Pure functions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from reelway.platform.rollout.evidence import EvidenceState


@dataclass(frozen=True, slots=True)
class Sample:
    """One scraped value of a series; ``value`` may be NaN, which is also Prometheus' marker of a stale series."""

    time: float
    value: float


@dataclass(frozen=True, slots=True)
class CounterReading:
    """A counter's increase over a window, the number of resets in it, and whether the increase can be trusted."""

    state: EvidenceState
    increase: float = 0.0
    resets: int = 0
    detail: str = ""


def counter_increase(
    samples: Sequence[Sample] | None, *, now: float | None = None, max_age_s: float = math.inf, origin: bool = False
) -> CounterReading:
    """Returns the increase of one counter over ``samples``: Prometheus' ``increase`` without its extrapolation.

    A decrease is a reset: the process restarted and counts from 0. NaN samples are ignored. Samples may be out of
    order; of two samples at one time the higher counts.

    Args:
        now: Unix time from which the age of the last sample is measured; by default its age is not checked.
        origin: the counter is known to have started at 0 with the first sample's process (a release deployed for this
            rollout), so the first value counts in full.

    Returns:
        ``telemetry_down`` if the series is absent, has no finite sample, has a negative sample, or its last finite
        sample is older than ``max_age_s`` or followed by a NaN. ``insufficient`` for one sample without an origin. Else
        ``ok``.
    """
    if not samples:
        return CounterReading(EvidenceState.TELEMETRY_DOWN, detail="the series is absent")
    ordered = sorted(samples, key=lambda s: (s.time, s.value if math.isfinite(s.value) else -math.inf))
    finite = [s for s in ordered if math.isfinite(s.value)]
    if not finite:
        return CounterReading(EvidenceState.TELEMETRY_DOWN, detail=f"all {len(ordered)} samples are NaN or infinite")
    if (lowest := min(s.value for s in finite)) < 0:
        return CounterReading(EvidenceState.TELEMETRY_DOWN, detail=f"a counter of {lowest:g}, expected 0 or more")
    if now is not None and (age := now - finite[-1].time) > max_age_s:
        return CounterReading(
            EvidenceState.TELEMETRY_DOWN, detail=f"the last sample is {age:.0f} s old, allowed {max_age_s:.0f} s"
        )
    if ordered[-1].time > finite[-1].time:
        return CounterReading(EvidenceState.TELEMETRY_DOWN, detail="the series went stale: its last sample is NaN")
    values = list({s.time: s.value for s in finite}.values())
    increase, resets = (values[0] if origin else 0.0), 0
    for previous, value in itertools.pairwise(values):
        resets += value < previous
        increase += value if value < previous else value - previous
    if len(values) == 1 and not origin:
        return CounterReading(EvidenceState.INSUFFICIENT, detail="one sample, expected at least two")
    return CounterReading(EvidenceState.OK, increase, resets)


def sum_counters(readings: Iterable[CounterReading]) -> CounterReading:
    """One counter summed over replicas. A replica without telemetry makes the sum unknown, not small."""
    parts = list(readings)
    if not parts:
        return CounterReading(EvidenceState.TELEMETRY_DOWN, detail="no replica reports the series")
    for state in (EvidenceState.TELEMETRY_DOWN, EvidenceState.INSUFFICIENT):
        affected = [part for part in parts if part.state is state]
        if affected:
            return CounterReading(state, detail=f"{len(affected)} of {len(parts)} replicas: {affected[0].detail}")
    return CounterReading(EvidenceState.OK, sum(part.increase for part in parts), sum(part.resets for part in parts))


def histogram_quantile(increases: Mapping[float, float], q: float) -> float:
    """Returns a histogram's quantile, in the buckets' unit; NaN without observations or without an infinite bucket.

    Linear within a bucket, the lowest bucket from 0. A quantile beyond the last finite bound is that bound, as in
    Prometheus' ``histogram_quantile`` (https://prometheus.io/docs/prometheus/latest/querying/functions/).

    Args:
        increases: upper bound -> observations at or below it in the window.
    """
    bounds = sorted(increases)
    # a scrape may catch the buckets at different instants, so that the counts do not rise from bucket to bucket
    counts = list(itertools.accumulate((increases[bound] for bound in bounds), max))
    if len(bounds) < 2 or not math.isinf(bounds[-1]) or not counts[-1] > 0:
        return math.nan
    rank = q * counts[-1]
    i = next(i for i, count in enumerate(counts) if count >= rank)
    if math.isinf(bounds[i]):
        return bounds[i - 1]
    below, start = (counts[i - 1], bounds[i - 1]) if i else (0.0, 0.0)
    if (i == 0 and bounds[0] <= 0) or counts[i] == below:
        return bounds[i]
    return start + (bounds[i] - start) * (rank - below) / (counts[i] - below)
