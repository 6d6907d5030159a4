"""Why: what was seen of a rollout, with a word for how far it can be trusted. A telemetry fault is not a canary fault.

Types and pure functions from scraped counters to evidence; refuses to fetch anything and to judge anything. The four
states: ``ok`` (can be judged), ``bad`` (judged, and harmful or broken; only ``assessment`` says so of an outcome),
``insufficient`` (the telemetry works and there is too little of it), ``telemetry_down`` (nobody knows).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from reelway.platform.contracts.events import Arm
from reelway.platform.rollout.policy import Slice


class EvidenceState(StrEnum):
    """See the module's docstring. ``worst`` orders them for a summary."""

    OK = "ok"
    BAD = "bad"
    INSUFFICIENT = "insufficient"
    TELEMETRY_DOWN = "telemetry_down"


@dataclass(frozen=True, slots=True)
class ArmStatistics:
    """Cumulative sums over the viewers an arm has had since the rollout began; never reset at a step.

    Viewer i has totals ``x_i`` (impressions, each times ``statistics.overlap_weight`` of the weights it was served
    with) and ``y_i`` (what is measured, times the same weight); for a ``mean`` metric ``x_i`` is 1. A viewer who comes
    back changes its own terms, never adds a second one. ``viewers`` and ``impressions`` are plain counts.
    """

    viewers: float = 0.0
    impressions: float = 0.0
    sum_x: float = 0.0
    sum_y: float = 0.0
    sum_xx: float = 0.0
    sum_yy: float = 0.0
    sum_xy: float = 0.0

    @property
    def possible(self) -> bool:
        """Finite, non-negative and consistent with *some* set of viewers (Cauchy-Schwarz)."""
        values = (self.viewers, self.impressions, self.sum_x, self.sum_xx, self.sum_yy)
        if not all(math.isfinite(v) and v >= 0 for v in (*values,)):
            return False
        if not (math.isfinite(self.sum_y) and math.isfinite(self.sum_xy)):
            return False
        slack = 1.0 + 1e-9
        return (
            self.sum_x**2 <= self.viewers * self.sum_xx * slack + 1e-9
            and self.sum_y**2 <= self.viewers * self.sum_yy * slack + 1e-9
            and self.sum_xy**2 <= self.sum_xx * self.sum_yy * slack + 1e-9
        )


@dataclass(frozen=True, slots=True)
class MetricEvidence:
    """One outcome metric on one slice, both arms."""

    state: EvidenceState
    stable: ArmStatistics = ArmStatistics()
    canary: ArmStatistics = ArmStatistics()
    detail: str = ""


GuardrailName = Literal["error_ratio", "empty_slate_ratio", "p99_ms", "parity_mismatches"]


@dataclass(frozen=True, slots=True)
class GuardrailReading:
    """The canary's side of one guardrail over the last window, and stable's where it matters.

    ``events`` of ``trials`` for the ratios and the mismatches (checked rows are the trials); ``value`` and
    ``stable_value`` in milliseconds for p99, with ``trials`` requests.
    """

    state: EvidenceState
    events: float = 0.0
    trials: float = 0.0
    value: float | None = None
    stable_value: float | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class FiringAlert:
    """An alert that fires and carries a release."""

    name: str
    release: str
    starts_at: float
    detail: str = ""


@dataclass(frozen=True, slots=True)
class EvidenceSnapshot:
    """Everything that was seen at one moment of one rollout.

    ``weights`` are those the traffic backend reports, basis points by arm; None when it could not be asked.
    ``canary_ready`` is None when nobody knows. A metric or guardrail that is absent counts as ``telemetry_down``.
    """

    time: float
    release: str
    metrics: Mapping[tuple[str, Slice], MetricEvidence] = field(default_factory=dict)
    guardrails: Mapping[GuardrailName, GuardrailReading] = field(default_factory=dict)
    alerts: tuple[FiringAlert, ...] = ()
    weights: Mapping[Arm, int] | None = None
    canary_ready: bool | None = None
    canary_gave_up: str = ""
    """Why the canary will never be ready, in the backend's words; empty while it may be."""
    shadow_requests: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One scraped value of a series; ``value`` may be NaN (a stale marker is a NaN, too)."""

    time: float
    value: float


@dataclass(frozen=True, slots=True)
class CounterReading:
    """How much a counter rose over a window, how many resets that took, and whether it can be believed."""

    state: EvidenceState
    increase: float = 0.0
    resets: int = 0
    detail: str = ""


def counter_increase(
    samples: Sequence[Sample] | None, *, now: float, max_age_s: float, origin: bool = False
) -> CounterReading:
    """The rise of one counter over ``samples``, as Prometheus' ``increase`` counts it but without extrapolation.

    A fall is a reset: the process restarted and counts from 0. NaN samples are no samples. Samples out of order are put
    in order; of two at one time the higher counts.

    Args:
        origin: the counter is known to have started at 0 with the first sample's process (a release deployed for this
            rollout), so the first value counts in full.

    Returns:
        ``telemetry_down`` when the series is absent, has no finite sample, has a negative one, or its last finite
        sample is older than ``max_age_s`` (or NaN was scraped after it); ``insufficient`` when one sample without an
        origin is all there is; else ``ok``.
    """
    if not samples:
        return CounterReading(EvidenceState.TELEMETRY_DOWN, detail="the series is absent")
    ordered = sorted(samples, key=lambda s: (s.time, s.value if math.isfinite(s.value) else -math.inf))
    finite = [s for s in ordered if math.isfinite(s.value)]
    if not finite:
        return CounterReading(EvidenceState.TELEMETRY_DOWN, detail=f"all {len(ordered)} samples are NaN or infinite")
    if (lowest := min(s.value for s in finite)) < 0:
        return CounterReading(EvidenceState.TELEMETRY_DOWN, detail=f"a counter of {lowest:g}, expected 0 or more")
    if (age := now - finite[-1].time) > max_age_s:
        return CounterReading(
            EvidenceState.TELEMETRY_DOWN, detail=f"the last sample is {age:.0f} s old, allowed {max_age_s:.0f} s"
        )
    if ordered[-1].time > finite[-1].time:
        return CounterReading(EvidenceState.TELEMETRY_DOWN, detail="the series went stale: its last sample is NaN")
    last_of: dict[float, float] = {s.time: s.value for s in finite}
    values = list(last_of.values())
    increase, resets = (values[0] if origin else 0.0), 0
    for before, after in itertools.pairwise(values):
        resets += after < before
        increase += after if after < before else after - before
    if len(values) == 1 and not origin:
        return CounterReading(EvidenceState.INSUFFICIENT, detail="one sample, expected at least two")
    return CounterReading(EvidenceState.OK, increase, resets)


def sum_counters(readings: Iterable[CounterReading]) -> CounterReading:
    """One counter over several replicas. A replica nobody can hear makes the sum unknown, not small."""
    parts = list(readings)
    if not parts:
        return CounterReading(EvidenceState.TELEMETRY_DOWN, detail="no replica reports the series")
    for state in (EvidenceState.TELEMETRY_DOWN, EvidenceState.INSUFFICIENT):
        silent = [p for p in parts if p.state is state]
        if silent:
            return CounterReading(state, detail=f"{len(silent)} of {len(parts)} replicas: {silent[0].detail}")
    return CounterReading(EvidenceState.OK, sum(p.increase for p in parts), sum(p.resets for p in parts))


def metric_evidence(
    stable: ArmStatistics | None, canary: ArmStatistics | None, *, minimum_viewers: int
) -> MetricEvidence:
    """An outcome metric from both arms' sums: absent or impossible ones are telemetry's fault, small ones nobody's."""
    for name, arm in (("stable", stable), ("canary", canary)):
        if arm is None:
            return MetricEvidence(EvidenceState.TELEMETRY_DOWN, detail=f"no counters for {name}")
        if not arm.possible:
            return MetricEvidence(
                EvidenceState.TELEMETRY_DOWN, detail=f"{name}'s sums belong to no set of viewers: {arm}"
            )
    assert stable is not None
    assert canary is not None
    for name, arm in (("stable", stable), ("canary", canary)):
        if arm.viewers < minimum_viewers or arm.sum_x <= 0:
            detail = f"{name} has {arm.viewers:.0f} viewers, needs {minimum_viewers}"
            return MetricEvidence(EvidenceState.INSUFFICIENT, stable, canary, detail)
    return MetricEvidence(EvidenceState.OK, stable, canary)


def nothing_heard(release: str, now: float) -> EvidenceSnapshot:
    """The evidence when the metrics backend did not answer at all: every part of it is ``telemetry_down``."""
    return EvidenceSnapshot(time=now, release=release)
