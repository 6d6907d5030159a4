"""Evidence about a rollout: types, and how far each part can be trusted.

Four states: ``ok`` (can be judged), ``bad`` (judged, and harmful), ``insufficient`` (the telemetry works, but there is
too little data) and ``telemetry_down`` (nothing is known). A telemetry fault is therefore never a canary fault. Only
``assessment`` sets an outcome metric to ``bad``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from reelway.platform.contracts.events import Arm
from reelway.platform.rollout.policy import Slice
from reelway.platform.rollout.suspicion import Audience


class EvidenceState(StrEnum):
    OK = "ok"
    BAD = "bad"
    INSUFFICIENT = "insufficient"
    TELEMETRY_DOWN = "telemetry_down"


@dataclass(frozen=True, slots=True)
class ArmStatistics:
    """Cumulative sums over an arm's viewers since the rollout began. A new step does not reset them.

    Only viewers that are evidence count, with bounded totals (``serving.outcomes.viewer_sums``). Viewer i has totals
    ``x_i`` (impressions, each times ``sequential.overlap_weight`` of the traffic weights at that time) and ``y_i``
    (the measured quantity, times the same weight). For a ``mean`` metric ``x_i`` is 1. A viewer who returns changes
    its own terms and adds no second one. ``viewers`` and ``impressions`` are plain counts. ``idle_x`` and ``idle_xx``
    are the parts of ``sum_x`` and ``sum_xx`` of viewers who report outcomes, but watch nothing (``suspicion``).
    """

    viewers: float = 0.0
    impressions: float = 0.0
    sum_x: float = 0.0
    sum_y: float = 0.0
    sum_xx: float = 0.0
    sum_yy: float = 0.0
    sum_xy: float = 0.0
    idle_x: float = 0.0
    idle_xx: float = 0.0

    @property
    def is_consistent(self) -> bool:
        """Whether the sums are finite, non-negative and possible for some set of viewers (Cauchy-Schwarz)."""
        values = (self.viewers, self.impressions, self.sum_x, self.sum_xx, self.sum_yy, self.idle_x, self.idle_xx)
        if not all(math.isfinite(v) and v >= 0 for v in (*values,)):
            return False
        if not (math.isfinite(self.sum_y) and math.isfinite(self.sum_xy)):
            return False
        tolerance = 1.0 + 1e-9
        return (
            self.sum_x**2 <= self.viewers * self.sum_xx * tolerance + 1e-9
            and self.sum_y**2 <= self.viewers * self.sum_yy * tolerance + 1e-9
            and self.sum_xy**2 <= self.sum_xx * self.sum_yy * tolerance + 1e-9
            and self.idle_x <= self.sum_x * tolerance + 1e-9
            and self.idle_xx <= self.sum_xx * tolerance + 1e-9
        )


@dataclass(frozen=True, slots=True)
class MetricEvidence:
    """One outcome metric on one slice, for both arms."""

    state: EvidenceState
    stable: ArmStatistics = ArmStatistics()
    canary: ArmStatistics = ArmStatistics()
    detail: str = ""


GuardrailName = Literal["error_ratio", "empty_slate_ratio", "p99_ms", "parity_mismatches"]


@dataclass(frozen=True, slots=True)
class GuardrailReading:
    """One guardrail of the canary over the last window, with stable's value where the limit compares the two.

    Ratios: ``events`` of ``trials`` requests. Parity mismatches: ``events`` of ``trials`` replayed rows. p99: ``value``
    and ``stable_value`` in milliseconds over ``trials`` requests.
    """

    state: EvidenceState
    events: float = 0.0
    trials: float = 0.0
    value: float | None = None
    stable_value: float | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class FiringAlert:
    """A firing alert with a release label."""

    name: str
    release: str
    starts_at: float
    detail: str = ""


@dataclass(frozen=True, slots=True)
class EvidenceSnapshot:
    """All evidence about one rollout at one moment.

    ``weights`` are those that the traffic backend reports, in basis points by arm; None if it did not answer.
    ``canary_ready`` is None if unknown. An absent metric or guardrail counts as ``telemetry_down``.
    """

    time: float
    release: str
    metrics: Mapping[tuple[str, Slice], MetricEvidence] = field(default_factory=dict)
    guardrails: Mapping[GuardrailName, GuardrailReading] = field(default_factory=dict)
    alerts: tuple[FiringAlert, ...] = ()
    alerts_problem: str = ""
    """Why alerts may fire that are not in ``alerts``; empty if all are known."""
    weights: Mapping[Arm, int] | None = None
    canary_ready: bool | None = None
    canary_failure: str = ""
    """The backend's reason why the canary will never be ready; empty while it may become ready."""
    shadow_requests: int = 0
    audiences: Mapping[Arm, Audience] = field(default_factory=dict)
    """The audiences of stable and canary; empty without viewers, or without evidence for the metrics either."""


def metric_evidence(
    stable: ArmStatistics | None, canary: ArmStatistics | None, *, minimum_viewers: int
) -> MetricEvidence:
    """Returns an outcome metric from both arms' sums.

    Returns:
        ``telemetry_down`` for an absent arm or impossible sums, ``insufficient`` for too few viewers, else ``ok``.
    """
    for name, arm in (("stable", stable), ("canary", canary)):
        if arm is None:
            return MetricEvidence(EvidenceState.TELEMETRY_DOWN, detail=f"no counters for {name}")
        if not arm.is_consistent:
            return MetricEvidence(
                EvidenceState.TELEMETRY_DOWN, detail=f"{name}'s sums are impossible for any set of viewers: {arm}"
            )
    assert stable is not None
    assert canary is not None
    for name, arm in (("stable", stable), ("canary", canary)):
        if arm.viewers < minimum_viewers or arm.sum_x <= 0:
            detail = f"{name} has {arm.viewers:.0f} viewers, needs {minimum_viewers}"
            return MetricEvidence(EvidenceState.INSUFFICIENT, stable, canary, detail)
    return MetricEvidence(EvidenceState.OK, stable, canary)


def no_evidence(release: str, now: float) -> EvidenceSnapshot:
    """Returns the evidence if the metrics backend did not answer: all of it is ``telemetry_down``."""
    return EvidenceSnapshot(time=now, release=release)
