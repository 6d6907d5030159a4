"""Assesses evidence: a verdict with numbers and a sentence for every outcome metric and guardrail.

``decision`` decides what follows from a verdict. Every threshold comes from the policy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from reelway.platform.contracts.events import Arm
from reelway.platform.rollout.evidence import (
    EvidenceSnapshot,
    EvidenceState,
    GuardrailName,
    GuardrailReading,
    MetricEvidence,
    metric_evidence,
)
from reelway.platform.rollout.policy import CountLimit, LatencyLimit, OutcomeMetric, RatioLimit, RolloutPolicy, Slice
from reelway.platform.rollout.sequential import (
    Estimate,
    log_tail_bound,
    ratio_estimate,
    rejection_boundary,
    relative_difference,
)
from reelway.platform.rollout.suspicion import (
    TAINTS_HARM,
    Comparison,
    SuspicionVerdict,
    compare_audiences,
    explained_harm,
    group_share,
    share_difference,
    suspicion_verdict,
)

F64 = NDArray[np.float64]
Finding = Literal["harm_established", "harm_excluded", "undecided", "insufficient", "telemetry_down"]


@dataclass(frozen=True, slots=True)
class OutcomeVerdict:
    """One metric on one slice. ``harm`` is relative to stable, positive is worse; NaN without an estimate.

    ``harm_low`` and ``harm_high`` are one-sided confidence sequences, at ``alpha_rollback`` and ``alpha_promotion``.
    """

    name: str
    slice_: Slice
    finding: Finding
    margin: float
    alpha_rollback: float
    alpha_promotion: float
    stable: float
    canary: float
    harm: float
    harm_low: float
    harm_high: float
    stable_viewers: int
    canary_viewers: int
    required: bool
    lower_is_better: bool
    detail: str = ""
    explained: float = 0.0
    """Harm that idle viewers explain, who may be forged (``suspicion.explained_harm``)."""

    @property
    def is_proven_harm(self) -> bool:
        """Whether harm beyond the margin is established without the part that idle viewers explain."""
        return self.finding == "harm_established" and self.harm_low - self.explained > self.margin

    @property
    def state(self) -> EvidenceState:
        if self.finding == "harm_established":
            return EvidenceState.BAD
        if self.finding in ("insufficient", "telemetry_down"):
            return EvidenceState(self.finding)
        return EvidenceState.OK

    @property
    def label(self) -> str:
        return self.name if self.slice_ is Slice.OVERALL else f"{self.name} on {self.slice_.value}"

    @property
    def sentence(self) -> str:
        """The finding and its numbers as one sentence."""
        if self.state in (EvidenceState.INSUFFICIENT, EvidenceState.TELEMETRY_DOWN):
            return f"{self.label}: {self.finding.replace('_', ' ')} ({self.detail})"
        sign = 1.0 if self.lower_is_better else -1.0
        change, ends = sign * self.harm, sorted((sign * self.harm_low, sign * self.harm_high))
        finding = {
            "harm_established": f"harm beyond the margin of {self.margin:.1%} is established",
            "harm_excluded": f"harm beyond the margin of {self.margin:.1%} is excluded",
            "undecided": f"harm beyond the margin of {self.margin:.1%} is neither established nor excluded",
        }[self.finding]
        return (
            f"{self.label}: {finding}; canary {self.canary:.4g} against stable {self.stable:.4g}, {change:+.1%} "
            f"(at any time within {ends[0]:+.1%}..{ends[1]:+.1%}; {self.canary_viewers} and {self.stable_viewers} "
            f"viewers, alpha {self.alpha_rollback:.2g} for harm, {self.alpha_promotion:.2g} against)"
        )


@dataclass(frozen=True, slots=True)
class GuardrailVerdict:
    """One guardrail: ``bad`` is a breach."""

    name: str
    state: EvidenceState
    sentence: str


@dataclass(frozen=True, slots=True)
class Assessment:
    """All verdicts at one moment."""

    outcomes: tuple[OutcomeVerdict, ...]
    guardrails: tuple[GuardrailVerdict, ...]
    canary_viewers: int
    canary_impressions: int
    suspicions: tuple[SuspicionVerdict, ...] = ()

    @property
    def breaches(self) -> tuple[GuardrailVerdict, ...]:
        return tuple(g for g in self.guardrails if g.state is EvidenceState.BAD)

    @property
    def harms(self) -> tuple[OutcomeVerdict, ...]:
        return tuple(o for o in self.outcomes if o.finding == "harm_established")

    @property
    def suspected(self) -> tuple[SuspicionVerdict, ...]:
        return tuple(one for one in self.suspicions if one.suspected)

    @property
    def proven_harms(self) -> tuple[OutcomeVerdict, ...]:
        """Established harms that forged viewers do not explain: those that roll back."""
        if any(one.name in TAINTS_HARM for one in self.suspected):
            return ()
        return tuple(o for o in self.outcomes if o.is_proven_harm)

    @property
    def without_telemetry(self) -> tuple[OutcomeVerdict | GuardrailVerdict, ...]:
        """Verdicts without telemetry."""
        verdicts: tuple[OutcomeVerdict | GuardrailVerdict, ...] = (*self.guardrails, *self.outcomes)
        return tuple(v for v in verdicts if v.state is EvidenceState.TELEMETRY_DOWN)

    @property
    def harm_not_excluded(self) -> tuple[OutcomeVerdict, ...]:
        """Required outcomes that do not exclude harm beyond their margin yet. Empty: promotion is allowed."""
        return tuple(o for o in self.outcomes if o.required and o.finding != "harm_excluded")

    @property
    def guardrails_ok(self) -> bool:
        return all(g.state is EvidenceState.OK for g in self.guardrails)


def assess(policy: RolloutPolicy, snapshot: EvidenceSnapshot) -> Assessment:
    """Assesses every outcome metric and guardrail of the policy. Absent evidence is ``telemetry_down``. Pure."""
    outcomes = _assess_outcomes(policy, snapshot)
    first = snapshot.metrics.get((policy.outcomes[0].name, Slice.OVERALL))
    exposure = first.canary if first is not None and first.canary.is_consistent else None
    return Assessment(
        outcomes,
        _assess_guardrails(policy, snapshot),
        int(exposure.viewers) if exposure else 0,
        int(exposure.impressions) if exposure else 0,
        tuple(suspicion_verdict(one) for one in _compare_audiences(policy, snapshot)),
    )


def harm_of(canary: Estimate, stable: Estimate, lower_is_better: ArrayLike) -> Estimate:
    """Returns the relative harm; positive is worse for viewers for every metric. Broadcasts."""
    difference = relative_difference(canary, stable)
    return Estimate(np.where(lower_is_better, 1.0, -1.0) * difference.value, difference.variance, difference.viewers)


def _compare_audiences(policy: RolloutPolicy, snapshot: EvidenceSnapshot) -> tuple[Comparison, ...]:
    """Returns no comparison if the policy disables it, or an arm has no audience."""
    stable, canary = (snapshot.audiences.get(arm) for arm in (Arm.STABLE, Arm.CANARY))
    if policy.suspicion is None or stable is None or canary is None:
        return ()
    return compare_audiences(stable, canary, alpha=policy.suspicion.alpha, margin=policy.suspicion.margin)


def _assess_outcomes(policy: RolloutPolicy, snapshot: EvidenceSnapshot) -> tuple[OutcomeVerdict, ...]:
    tests = policy.tests
    evidence = [_with_burn_in(metric, snapshot.metrics.get((metric.name, slice_))) for metric, slice_ in tests]
    stable, canary = (
        ratio_estimate(*np.array([_sums(getattr(e, arm)) for e in evidence]).T) for arm in ("stable", "canary")
    )
    lower = np.array([metric.direction == "lower" for metric, _ in tests])
    harm = harm_of(canary, stable, lower)
    error = np.sqrt(harm.variance)
    scale = np.array([metric.effect_beyond_margin(slice_) for metric, slice_ in tests])
    margin = np.array([metric.margin_on(slice_) for metric, slice_ in tests])
    low = harm.value - rejection_boundary(harm.variance, scale, np.array(policy.rollback_alphas)) * error
    high = harm.value + rejection_boundary(harm.variance, margin, policy.alpha.promotion) * error
    explained = np.zeros(len(tests)) if policy.suspicion is None else _explained(policy, evidence, stable.value, lower)
    return tuple(
        OutcomeVerdict(
            name=metric.name,
            slice_=slice_,
            finding=_finding(evidence[i], float(low[i]), float(high[i]), float(margin[i])),
            margin=float(margin[i]),
            alpha_rollback=policy.rollback_alphas[i],
            alpha_promotion=policy.alpha.promotion,
            stable=float(stable.value[i]),
            canary=float(canary.value[i]),
            harm=float(harm.value[i]),
            harm_low=float(low[i]),
            harm_high=float(high[i]),
            stable_viewers=int(evidence[i].stable.viewers),
            canary_viewers=int(evidence[i].canary.viewers),
            required=slice_ is Slice.OVERALL and metric.promotion_requires == "excluded",
            lower_is_better=bool(lower[i]),
            explained=float(explained[i]),
            detail=evidence[i].detail or "no estimate: an arm has no variation or stable's value is not positive",
        )
        for i, (metric, slice_) in enumerate(tests)
    )


def _explained(
    policy: RolloutPolicy, evidence: Sequence[MetricEvidence], stable_value: F64, lower: NDArray[np.bool_]
) -> F64:
    """Returns the harm of each test that idle viewers explain."""
    names = ("viewers", "sum_x", "sum_xx", "idle_x", "idle_xx")
    stable, canary = (
        group_share(*np.array([[getattr(getattr(e, arm), name) for name in names] for e in evidence]).T)
        for arm in ("stable", "canary")
    )
    idle = share_difference(stable, canary)
    overall = next(i for i, (_, slice_) in enumerate(policy.tests) if slice_ is Slice.OVERALL)
    on_all = Estimate(idle.value[overall], idle.variance[overall], idle.viewers[overall])
    return explained_harm(idle, on_all, stable_value, lower)


def _with_burn_in(metric: OutcomeMetric, evidence: MetricEvidence | None) -> MetricEvidence:
    """Returns the evidence with its state checked against the policy's minimum number of viewers."""
    if evidence is None:
        return MetricEvidence(EvidenceState.TELEMETRY_DOWN, detail="no evidence")
    if evidence.state is EvidenceState.TELEMETRY_DOWN:
        return MetricEvidence(evidence.state, detail=evidence.detail or "its source did not answer")
    checked = metric_evidence(evidence.stable, evidence.canary, minimum_viewers=metric.minimum_viewers)
    if checked.state is EvidenceState.TELEMETRY_DOWN:
        return MetricEvidence(checked.state, detail=checked.detail)
    if checked.state is EvidenceState.OK and evidence.state is EvidenceState.INSUFFICIENT:
        detail = evidence.detail or "its source reports it as insufficient"
        return MetricEvidence(evidence.state, evidence.stable, evidence.canary, detail)
    return checked


def _sums(arm: object) -> tuple[float, ...]:
    return tuple(getattr(arm, name) for name in ("viewers", "sum_x", "sum_y", "sum_xx", "sum_yy", "sum_xy"))


def _finding(evidence: MetricEvidence, low: float, high: float, margin: float) -> Finding:
    if evidence.state is EvidenceState.TELEMETRY_DOWN:
        return "telemetry_down"
    if evidence.state is EvidenceState.INSUFFICIENT or math.isnan(low) or math.isnan(high):
        return "insufficient"
    if low > margin:
        return "harm_established"
    return "harm_excluded" if high < margin else "undecided"


def _assess_guardrails(policy: RolloutPolicy, snapshot: EvidenceSnapshot) -> tuple[GuardrailVerdict, ...]:
    limits, verdicts = policy.guardrails, []
    ratios: tuple[tuple[GuardrailName, RatioLimit | None], ...] = (
        ("error_ratio", limits.error_ratio),
        ("empty_slate_ratio", limits.empty_slate_ratio),
    )
    for name, limit in ratios:
        if limit is not None:
            verdicts.append(_assess_ratio(name, limit, snapshot.guardrails.get(name), limits.significance))
    if limits.p99_ms is not None:
        verdicts.append(_assess_latency(limits.p99_ms, snapshot.guardrails.get("p99_ms")))
    if limits.parity_mismatches is not None:
        verdicts.append(_assess_parity(limits.parity_mismatches, snapshot.guardrails.get("parity_mismatches")))
    if limits.firing_alerts is not None:
        verdicts.append(_assess_alerts(limits.firing_alerts, snapshot))
    return tuple(verdicts)


def _telemetry_down_verdict(name: str, reading: GuardrailReading | None) -> GuardrailVerdict | None:
    """Returns a verdict for a reading that cannot be judged; None if it can."""
    if reading is None:
        return GuardrailVerdict(name, EvidenceState.TELEMETRY_DOWN, f"{name}: telemetry down (no reading)")
    if reading.state in (EvidenceState.TELEMETRY_DOWN, EvidenceState.INSUFFICIENT):
        state = reading.state.value.replace("_", " ")
        return GuardrailVerdict(name, reading.state, f"{name}: {state} ({reading.detail or 'no detail'})")
    numbers = (reading.events, reading.trials)
    if not all(math.isfinite(v) and v >= 0 for v in numbers):
        return GuardrailVerdict(name, EvidenceState.TELEMETRY_DOWN, f"{name}: telemetry down (saw {numbers})")
    return None


def _assess_ratio(
    name: str, limit: RatioLimit, reading: GuardrailReading | None, significance: float
) -> GuardrailVerdict:
    """Assesses a ratio: a breach if so many events are less likely than ``significance`` at the limit.

    Ten errors in ten requests are a breach long before ``minimum_requests``. That number only decides when a reading
    without a breach is ``ok``.
    """
    if (down := _telemetry_down_verdict(name, reading)) is not None:
        return down
    assert reading is not None
    if reading.events > reading.trials:
        observed = f"{reading.events:.0f} events of {reading.trials:.0f} requests"
        return GuardrailVerdict(name, EvidenceState.TELEMETRY_DOWN, f"{name}: telemetry down (saw {observed})")
    ratio = reading.events / reading.trials if reading.trials else 0.0
    observed = f"{ratio:.2%} ({reading.events:.0f} of {reading.trials:.0f} requests)"
    log_p = float(log_tail_bound(reading.events, reading.trials, limit.maximum))
    if log_p <= math.log(significance):
        return GuardrailVerdict(name, EvidenceState.BAD, f"{name} {observed} is above the limit of {limit.maximum:.2%}")
    if reading.trials < limit.minimum_requests:
        return GuardrailVerdict(
            name, EvidenceState.INSUFFICIENT, f"{name} {observed}: needs {limit.minimum_requests} requests"
        )
    return GuardrailVerdict(
        name, EvidenceState.OK, f"{name} {observed} is not established to be above the limit of {limit.maximum:.2%}"
    )


def _assess_latency(limit: LatencyLimit, reading: GuardrailReading | None) -> GuardrailVerdict:
    name = "p99_ms"
    if (down := _telemetry_down_verdict(name, reading)) is not None:
        return down
    assert reading is not None
    if reading.trials < limit.minimum_requests:
        observed = f"{reading.trials:.0f} requests, needs {limit.minimum_requests}"
        return GuardrailVerdict(name, EvidenceState.INSUFFICIENT, f"{name}: insufficient ({observed})")
    bounds = [] if limit.maximum is None else [(limit.maximum, "the limit")]
    if limit.maximum_ratio_to_stable is not None:
        if reading.stable_value is None or not (math.isfinite(reading.stable_value) and reading.stable_value > 0):
            return GuardrailVerdict(
                name, EvidenceState.TELEMETRY_DOWN, f"{name}: telemetry down (stable's p99 unknown)"
            )
        times = limit.maximum_ratio_to_stable
        bounds.append((times * reading.stable_value, f"{times:g} times stable's {reading.stable_value:.0f} ms"))
    if reading.value is None or not (math.isfinite(reading.value) and reading.value >= 0):
        return GuardrailVerdict(name, EvidenceState.TELEMETRY_DOWN, f"{name}: telemetry down (saw {reading.value})")
    bound, bound_name = min(bounds)
    observed = f"p99 {reading.value:.0f} ms over {reading.trials:.0f} requests"
    if reading.value > bound:
        return GuardrailVerdict(name, EvidenceState.BAD, f"{observed} is above {bound_name}: {bound:.0f} ms")
    return GuardrailVerdict(name, EvidenceState.OK, f"{observed} is within {bound_name}: {bound:.0f} ms")


def _assess_parity(limit: CountLimit, reading: GuardrailReading | None) -> GuardrailVerdict:
    name = "parity_mismatches"
    if (down := _telemetry_down_verdict(name, reading)) is not None:
        return down
    assert reading is not None
    observed = f"{reading.events:.0f} parity mismatches in {reading.trials:.0f} replayed rows"
    if reading.events > limit.maximum:
        more = f": {reading.detail}" if reading.detail else ""
        return GuardrailVerdict(name, EvidenceState.BAD, f"{observed}, allowed {limit.maximum}{more}")
    if reading.trials <= 0:
        return GuardrailVerdict(name, EvidenceState.INSUFFICIENT, f"{name}: insufficient (no row was replayed)")
    return GuardrailVerdict(name, EvidenceState.OK, f"{observed}, allowed {limit.maximum}")


def _assess_alerts(limit: CountLimit, snapshot: EvidenceSnapshot) -> GuardrailVerdict:
    """Assesses the firing alerts; only alerts with this rollout's release count."""
    alerts = [alert for alert in snapshot.alerts if alert.release == snapshot.release]
    if len(alerts) > limit.maximum:
        names = ", ".join(sorted({alert.name for alert in alerts}))
        return GuardrailVerdict("firing_alerts", EvidenceState.BAD, f"alerts firing for the release: {names}")
    if snapshot.alerts_problem:
        sentence = f"firing_alerts: telemetry down ({snapshot.alerts_problem})"
        return GuardrailVerdict("firing_alerts", EvidenceState.TELEMETRY_DOWN, sentence)
    return GuardrailVerdict("firing_alerts", EvidenceState.OK, f"{len(alerts)} alerts fire for the release")
