"""Explains a rollout decision: its evidence, what would have changed it, and the policy lines that applied.

Derived from the recorded decision, its evidence summary and the rollout's policy. The recorded reason is repeated
verbatim; no evidence is assessed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from reelway.platform.cli.rollout.status_report import EvidenceReport, GuardrailReport, OutcomeReport
from reelway.platform.rollout.policy import RolloutPolicy, Step

if TYPE_CHECKING:
    from reelway.platform.rollout.records import HistoryEntry, LastReconcile


class Explanation(BaseModel):
    """``reelway rollout explain -o json``. A null ``entry`` means the last reconcile instead of a history entry."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rollout: str
    entry: int | None
    time: float
    action: str
    reason: str
    numbers: tuple[str, ...]
    otherwise: tuple[str, ...]
    policy: tuple[str, ...]


class DecisionPoint(BaseModel):
    """The fields that a history entry and the last reconcile have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rollout: str
    entry: int | None
    time: float
    action: str
    reason: str
    phase_before: str
    step: int
    evidence: EvidenceReport | None


def decision_point(record: HistoryEntry | LastReconcile, *, step: int, phase: str) -> DecisionPoint:
    """Returns the decision point of a history entry or of the last reconcile.

    Args:
        step: current step of the rollout; used for the last reconcile, which records none.
        phase: current phase of the rollout; used likewise.
    """
    number = getattr(record, "number", None)
    return DecisionPoint(
        rollout=record.rollout_id,
        entry=number,
        time=record.time,
        action=record.action,
        reason=record.reason,
        phase_before=getattr(record, "phase_before", phase),
        step=getattr(record, "step", step),
        evidence=EvidenceReport.model_validate(record.evidence) if record.evidence else None,
    )


def explain(point: DecisionPoint, policy: RolloutPolicy) -> Explanation:
    """Returns the evidence of a decision, what would have changed the decision, and the policy lines that applied."""
    otherwise, lines = _counterfactuals_and_policy(point, policy)
    return Explanation(
        rollout=point.rollout,
        entry=point.entry,
        time=point.time,
        action=point.action,
        reason=point.reason,
        numbers=tuple(_numbers(point.evidence, policy)) if point.evidence else (),
        otherwise=tuple(otherwise),
        policy=tuple(dict.fromkeys(lines)),
    )


def _numbers(evidence: EvidenceReport, policy: RolloutPolicy) -> list[str]:
    """Returns one line per number, in order of precedence: breaches, harms, then the rest."""
    exposure = evidence.exposure
    lines = [
        f"{exposure['viewers']:,} viewers and {exposure['impressions']:,} impressions on the canary since the start"
    ]
    guardrails = sorted(evidence.guardrails, key=lambda g: g.state != "bad")
    outcomes = sorted(evidence.outcomes, key=lambda o: o.finding != "harm_established")
    if evidence.breached and not evidence.has_outcome_data:
        return [g.sentence for g in guardrails if g.state == "bad"]
    lines += [guardrail.sentence for guardrail in guardrails if guardrail.state == "bad"]
    lines += [one.sentence for one in evidence.suspicions if one.suspected]
    lines += [_outcome_words(outcome, policy) for outcome in outcomes]
    lines += [guardrail.sentence for guardrail in guardrails if guardrail.state != "bad"]
    return lines


def _outcome_words(outcome: OutcomeReport, policy: RolloutPolicy) -> str:
    if outcome.harm is None or outcome.canary is None or outcome.stable is None:
        return outcome.sentence
    alphas = {
        (metric.name, part.value): alpha
        for (metric, part), alpha in zip(policy.tests, policy.rollback_alphas, strict=True)
    }
    direction = "worse" if outcome.harm > 0 else "better"
    alpha = alphas.get((outcome.name, outcome.slice))
    low = "unknown" if outcome.low is None else _harm(outcome.low)
    high = "unknown" if outcome.high is None else _harm(outcome.high)
    odds = "" if alpha is None else f" (wrong in one of {1 / alpha:,.0f} rollouts)"
    return (
        f"{outcome.label}: canary {outcome.canary:.4g}, stable {outcome.stable:.4g}: {abs(outcome.harm):.1%} "
        f"{direction}; confidence sequence from {low}{odds} to {high} "
        f"(wrong in one of {1 / policy.alpha.promotion:,.0f}); margin {outcome.margin:.1%} worse; "
        f"{outcome.viewers['canary']:,} canary and {outcome.viewers['stable']:,} stable viewers"
    )


def _harm(value: float) -> str:
    return f"{abs(value):.1%} {'worse' if value > 0 else 'better'}"


def _counterfactuals_and_policy(point: DecisionPoint, policy: RolloutPolicy) -> tuple[list[str], list[str]]:
    """Returns what would have changed the decision, and the policy lines that applied."""
    evidence = point.evidence
    match point.action:
        case "roll_back":
            return _explain_rollback(point, policy)
        case "step" | "promote":
            return _explain_progress(point, policy)
        case "pause":
            return _explain_pause(point, policy)
        case "refuse":
            return ["repeat the command once the reason no longer applies"], []
        case "wait" | "hold" | "carry_on" | "resume" if evidence is not None and point.phase_before in _RAMPING:
            return _explain_waiting(point, evidence, policy)
        case "retire" | "complete_promotion":
            return [], [f"retention_s: {policy.retention_s:g}"]
        case "complete_rollback":
            return ["nothing: a rollback cannot be interrupted"], [f"cooldown_s: {policy.cooldown_s:g}"]
        case "shadow" if policy.shadow is not None:
            return [], [f"shadow: {_dump(policy.shadow)}"]
        case _:
            return [], _deadline_line(policy, "preparing") if point.phase_before in ("pending", "preparing") else []


_RAMPING = ("stepping", "holding", "paused")


def _explain_rollback(point: DecisionPoint, policy: RolloutPolicy) -> tuple[list[str], list[str]]:
    evidence = point.evidence
    if point.reason.startswith("rolled back by "):
        return ["nothing in the evidence: a user requested the rollback"], []
    if evidence is not None and evidence.breached and point.reason.startswith("guardrail: "):
        breaches = [g for g in evidence.guardrails if g.state == "bad"]
        lines = [f"guardrails.{g.name}: {_limit(policy, g)}" for g in breaches]
        ratios = any(g.name.endswith("_ratio") for g in breaches)
        return [_without_breach(g, policy) for g in breaches], [
            *lines,
            *([f"guardrails.significance: {policy.guardrails.significance:g}"] if ratios else []),
        ]
    harms = [o for o in evidence.outcomes if o.finding == "harm_established"] if evidence is not None else []
    if harms:
        counterfactuals = [
            f"{o.label}: no rollback if a harm of {o.margin:.1%} or less had still been possible; the lower bound of "
            f"the harm is {_harm(o.low or 0.0)}, so a margin of {o.low or 0.0:.3f} or more would not have rolled back"
            for o in harms
        ]
        lines = [line for o in harms for line in _metric_lines(policy, o)]
        return counterfactuals, [
            *lines,
            f"alpha.rollback: {policy.alpha.rollback:g} over all {len(policy.tests)} tests",
        ]
    return _explain_deadline(point, policy)


def _explain_pause(point: DecisionPoint, policy: RolloutPolicy) -> tuple[list[str], list[str]]:
    if point.reason.startswith("paused by "):
        return ["nothing in the evidence: a user requested the pause; `reelway rollout resume` continues"], []
    return _explain_deadline(point, policy)


def _explain_deadline(point: DecisionPoint, policy: RolloutPolicy) -> tuple[list[str], list[str]]:
    name = "insufficient"
    if "telemetry down" in point.reason or point.phase_before == "shadow":
        name = "telemetry_down"
    elif point.phase_before in ("pending", "preparing"):
        name = "preparing"
    condition = {
        "insufficient": "enough data had arrived before the deadline",
        "telemetry_down": "the missing telemetry had returned before the deadline",
        "preparing": "the release's stages had been ready before the deadline",
    }[name]
    line = f"the rollout would have continued if {condition}; missing data proves neither harm nor its absence"
    return [line], _deadline_line(policy, name)


def _explain_progress(point: DecisionPoint, policy: RolloutPolicy) -> tuple[list[str], list[str]]:
    if point.action == "step" and point.step == 0:
        return ["the rollout would have waited if the release had not been ready"], [_step_line(policy, 0)]
    index = point.step - 1 if point.action == "step" else point.step
    index = min(max(index, 0), len(policy.steps) - 1)
    step, lines = policy.steps[index], [_step_line(policy, index)]
    counterfactuals = [
        f"the step would have been held with fewer than {step.minimum_viewers:,} viewers or "
        f"{step.minimum_impressions:,} impressions on the canary, or without data for a guardrail or an outcome metric"
    ]
    if point.action == "promote":
        counterfactuals.append("no promotion while harm beyond the margin is possible in a required outcome metric")
        if point.evidence is not None:
            lines += [line for o in point.evidence.outcomes if o.required for line in _metric_lines(policy, o)]
        lines.append(f"alpha.promotion: {policy.alpha.promotion:g}")
    else:
        counterfactuals.append(
            f"no next step before {step.hold_s:g} s, unless harm is excluded in all required outcome metrics"
        )
    return counterfactuals, lines


def _explain_waiting(
    point: DecisionPoint, evidence: EvidenceReport, policy: RolloutPolicy
) -> tuple[list[str], list[str]]:
    """Returns what the rollout waits for, with the missing numbers."""
    index = min(max(point.step, 0), len(policy.steps) - 1)
    step = policy.steps[index]
    missing, lines = _missing_exposure(evidence, step), [_step_line(policy, index)]
    verdicts: tuple[GuardrailReport | OutcomeReport, ...] = (*evidence.guardrails, *evidence.outcomes)
    down = [one for one in verdicts if one.state == "telemetry_down"]
    if down:
        missing = [f"the rollout continues when these have data again: {', '.join(sorted({one.name for one in down}))}"]
        lines += _deadline_line(policy, "telemetry_down")
        return missing, lines
    if suspected := [one for one in evidence.suspicions if one.suspected]:
        missing += [
            f"{one.name}: the rollout continues when the difference is within the margin of "
            f"{policy.suspicion.margin if policy.suspicion else 0.0:g}, or `reelway rollout promote --force` decides; "
            "find out who these viewers are first"
            for one in suspected
        ]
        lines.append(f"suspicion: {_dump(policy.suspicion)}" if policy.suspicion else "suspicion: off")
    insufficient = [g for g in evidence.guardrails if g.state == "insufficient"]
    missing += [f"{g.sentence}" for g in insufficient]
    lines += [f"guardrails.{g.name}: {_limit(policy, g)}" for g in insufficient]
    if index == len(policy.steps) - 1:
        open_ = [o for o in evidence.outcomes if o.required and o.finding != "harm_excluded"]
        missing += [_until_excluded(outcome) for outcome in open_]
        lines += [line for outcome in open_ for line in _metric_lines(policy, outcome)]
    return missing, [*lines, *_deadline_line(policy, "insufficient")]


def _missing_exposure(evidence: EvidenceReport, step: Step) -> list[str]:
    missing = []
    for name, least in (("viewers", step.minimum_viewers), ("impressions", step.minimum_impressions)):
        if (left := least - evidence.exposure[name]) > 0:
            missing.append(f"{left:,} more {name} on the canary")
    return missing


def _until_excluded(outcome: OutcomeReport) -> str:
    """Estimates how many more viewers exclude harm if the observed difference stays the same.

    The width of an interval shrinks roughly with the square root of the number of viewers.
    """
    if outcome.harm is None or outcome.high is None:
        return f"{outcome.label}: {outcome.sentence}"
    need = f"{outcome.label}: the upper bound of the harm ({_harm(outcome.high)}) must fall below {outcome.margin:.1%}"
    if outcome.harm >= outcome.margin:
        return f"{need}; impossible at the observed difference ({_harm(outcome.harm)}), which is beyond the margin"
    times = ((outcome.high - outcome.harm) / (outcome.margin - outcome.harm)) ** 2
    return f"{need}; needs about {max(times, 1.0):.1f} times the viewers at the observed difference"


def _without_breach(guardrail: GuardrailReport, policy: RolloutPolicy) -> str:
    if guardrail.name == "firing_alerts":
        return "no rollback if no alert with the release's label had been firing"
    if guardrail.name.endswith("_ratio"):
        return f"{guardrail.name}: no rollback within {_limit(policy, guardrail)}, apart from random variation"
    return f"{guardrail.name}: no rollback within {_limit(policy, guardrail)}"


def _limit(policy: RolloutPolicy, guardrail: GuardrailReport) -> str:
    limit = getattr(policy.guardrails, guardrail.name)
    return "off" if limit is None else _dump(limit)


def _metric_lines(policy: RolloutPolicy, outcome: OutcomeReport) -> list[str]:
    for i, metric in enumerate(policy.outcomes):
        if metric.name == outcome.name:
            shown = metric.model_dump(mode="json", exclude_none=True, exclude={"kind", "slices"})
            return [f"outcomes[{i}]: {_pairs(shown)}"]
    return []


def _step_line(policy: RolloutPolicy, index: int) -> str:
    return f"steps[{index}]: {_dump(policy.steps[index])}"


def _deadline_line(policy: RolloutPolicy, name: str) -> list[str]:
    return [f"deadlines.{name}: {_dump(getattr(policy.deadlines, name))}"]


def _dump(model: BaseModel) -> str:
    return _pairs(model.model_dump(mode="json", exclude_none=True))


def _pairs(values: dict[str, object]) -> str:
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
    )


def latest_deciding_entry(history: Sequence[HistoryEntry]) -> HistoryEntry | None:
    """Returns the latest entry that moved, stopped or ended the ramp."""
    deciding = ("step", "promote", "roll_back", "pause", "resume", "hold", "carry_on", "shadow", "prepare")
    return next((entry for entry in reversed(history) if entry.action in deciding), None)
