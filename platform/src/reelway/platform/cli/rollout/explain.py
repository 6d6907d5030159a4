"""Why: who is woken by a rollback wants to know what moved the rollout, by which numbers, and what would have kept it.

Pure: from a decision as it was recorded, the evidence summary beside it and the policy that applied. The decision's
reason is repeated word for word; nothing is judged again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from reelway.platform.cli.rollout.report import EvidenceReport, GuardrailReport, OutcomeReport
from reelway.platform.rollout.policy import RolloutPolicy, Step

if TYPE_CHECKING:
    from reelway.platform.rollout.records import HistoryEntry, Sighting


class Explanation(BaseModel):
    """``reelway rollout explain -o json``. ``entry`` null: the last look, not a decision of the history."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rollout: str
    entry: int | None
    time: float
    action: str
    reason: str
    numbers: tuple[str, ...]
    otherwise: tuple[str, ...]
    policy: tuple[str, ...]


class Moment(BaseModel):
    """A decision of the history or the last look: what both have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rollout: str
    entry: int | None
    time: float
    action: str
    reason: str
    phase_before: str
    step: int
    evidence: EvidenceReport | None


def moment_of(seen: HistoryEntry | Sighting, *, step: int, phase: str) -> Moment:
    """The moment of an entry or a look. ``step`` and ``phase`` are the rollout's, for a look, which has none itself."""
    number = getattr(seen, "number", None)
    return Moment(
        rollout=seen.rollout_id,
        entry=number,
        time=seen.time,
        action=seen.action,
        reason=seen.reason,
        phase_before=getattr(seen, "phase_before", phase),
        step=getattr(seen, "step", step),
        evidence=EvidenceReport.model_validate(seen.evidence) if seen.evidence else None,
    )


def explain(moment: Moment, policy: RolloutPolicy) -> Explanation:
    """Numbers, what would have changed it, and the policy's lines that applied."""
    otherwise, lines = _grounds(moment, policy)
    return Explanation(
        rollout=moment.rollout,
        entry=moment.entry,
        time=moment.time,
        action=moment.action,
        reason=moment.reason,
        numbers=tuple(_numbers(moment.evidence, policy)) if moment.evidence else (),
        otherwise=tuple(otherwise),
        policy=tuple(dict.fromkeys(lines)),
    )


def _numbers(evidence: EvidenceReport, policy: RolloutPolicy) -> list[str]:
    """Every number, what decided first: breaches, harms, then the rest."""
    seen = evidence.exposure
    said = [f"{seen['viewers']:,} viewers and {seen['impressions']:,} impressions on the canary since the beginning"]
    guardrails = sorted(evidence.guardrails, key=lambda g: g.state != "bad")
    outcomes = sorted(evidence.outcomes, key=lambda o: o.finding != "harm_established")
    if evidence.breached and not evidence.heard_outcomes:
        return [g.sentence for g in guardrails if g.state == "bad"]
    said += [guardrail.sentence for guardrail in guardrails if guardrail.state == "bad"]
    said += [_outcome_words(outcome, policy) for outcome in outcomes]
    said += [guardrail.sentence for guardrail in guardrails if guardrail.state != "bad"]
    return said


def _outcome_words(outcome: OutcomeReport, policy: RolloutPolicy) -> str:
    if outcome.harm is None or outcome.canary is None or outcome.stable is None:
        return outcome.sentence
    alphas = {
        (metric.name, part.value): alpha
        for (metric, part), alpha in zip(policy.tests, policy.rollback_alphas, strict=True)
    }
    side = "worse" if outcome.harm > 0 else "better"
    alpha = alphas.get((outcome.name, outcome.slice))
    low = "unknown" if outcome.low is None else _harm(outcome.low)
    high = "unknown" if outcome.high is None else _harm(outcome.high)
    odds = "" if alpha is None else f" (wrong once in {1 / alpha:,.0f} rollouts)"
    return (
        f"{outcome.label}: canary {outcome.canary:.4g}, stable {outcome.stable:.4g}: {abs(outcome.harm):.1%} {side}; "
        f"whenever one looks, truly between {low}{odds} and {high} (wrong once in {1 / policy.alpha.promotion:,.0f}); "
        f"accepted is {outcome.margin:.1%} worse; {outcome.viewers['canary']:,} and {outcome.viewers['stable']:,} "
        "viewers"
    )


def _harm(value: float) -> str:
    return f"{abs(value):.1%} {'worse' if value > 0 else 'better'}"


def _grounds(moment: Moment, policy: RolloutPolicy) -> tuple[list[str], list[str]]:
    """What would have changed the decision, and the policy's lines."""
    evidence = moment.evidence
    match moment.action:
        case "roll_back":
            return _of_rollback(moment, policy)
        case "step" | "promote":
            return _of_progress(moment, policy)
        case "pause":
            return _of_pause(moment, policy)
        case "refuse":
            return ["the command may be given again once this holds no more"], []
        case "wait" | "hold" | "carry_on" | "resume" if evidence is not None and moment.phase_before in _RAMPING:
            return _of_waiting(moment, evidence, policy)
        case "retire" | "complete_promotion":
            return [], [f"retention_s: {policy.retention_s:g}"]
        case "complete_rollback":
            return ["nothing: the only way out of a rollback is its end"], [f"cooldown_s: {policy.cooldown_s:g}"]
        case "shadow" if policy.shadow is not None:
            return [], [f"shadow: {_dump(policy.shadow)}"]
        case _:
            return [], _deadline_line(policy, "preparing") if moment.phase_before in ("pending", "preparing") else []


_RAMPING = ("stepping", "holding", "paused")


def _of_rollback(moment: Moment, policy: RolloutPolicy) -> tuple[list[str], list[str]]:
    evidence = moment.evidence
    if moment.reason.startswith("rolled back by "):
        return ["nothing in the evidence: a person asked for it"], []
    if evidence is not None and evidence.breached and moment.reason.startswith("guardrail: "):
        breaches = [g for g in evidence.guardrails if g.state == "bad"]
        lines = [f"guardrails.{g.name}: {_limit(policy, g)}" for g in breaches]
        ratios = any(g.name.endswith("_ratio") for g in breaches)
        return [_without(g, policy) for g in breaches], [
            *lines,
            *([f"guardrails.significance: {policy.guardrails.significance:g}"] if ratios else []),
        ]
    harms = [o for o in evidence.outcomes if o.finding == "harm_established"] if evidence is not None else []
    if harms:
        said = [
            f"{o.label}: it would have gone on had harm of {o.margin:.1%} or less still been possible; the least "
            f"that the evidence allows is {_harm(o.low or 0.0)}, so a margin of {o.low or 0.0:.3f} or more would not "
            "have rolled back"
            for o in harms
        ]
        lines = [line for o in harms for line in _metric_lines(policy, o)]
        return said, [*lines, f"alpha.rollback: {policy.alpha.rollback:g} over all {len(policy.tests)} tests"]
    return _of_deadline(moment, policy)


def _of_pause(moment: Moment, policy: RolloutPolicy) -> tuple[list[str], list[str]]:
    if moment.reason.startswith("paused by "):
        return ["nothing in the evidence: a person asked for it; `reelway rollout resume` goes on"], []
    return _of_deadline(moment, policy)


def _of_deadline(moment: Moment, policy: RolloutPolicy) -> tuple[list[str], list[str]]:
    name = "insufficient"
    if "telemetry down" in moment.reason or moment.phase_before == "shadow":
        name = "telemetry_down"
    elif moment.phase_before in ("pending", "preparing"):
        name = "preparing"
    what = {
        "insufficient": "had enough been seen before the deadline, or none been set",
        "telemetry_down": "had what was not heard been heard before the deadline",
        "preparing": "had the release's stages been ready before the deadline",
    }[name]
    return [f"it would have gone on {what}; silence is no harm, and no proof of none"], _deadline_line(policy, name)


def _of_progress(moment: Moment, policy: RolloutPolicy) -> tuple[list[str], list[str]]:
    if moment.action == "step" and moment.step == 0:
        return ["it would have waited had the release not been ready"], [_step_line(policy, 0)]
    index = moment.step - 1 if moment.action == "step" else moment.step
    index = min(max(index, 0), len(policy.steps) - 1)
    step, lines = policy.steps[index], [_step_line(policy, index)]
    said = [
        f"it would have stayed with fewer than {step.minimum_viewers:,} viewers or {step.minimum_impressions:,} "
        "impressions on the canary, a guardrail not heard, or a metric not heard"
    ]
    if moment.action == "promote":
        said.append("it would have stayed with harm beyond the margin possible in any outcome marked as required")
        if moment.evidence is not None:
            lines += [line for o in moment.evidence.outcomes if o.required for line in _metric_lines(policy, o)]
        lines.append(f"alpha.promotion: {policy.alpha.promotion:g}")
    else:
        said.append(f"it would have stayed before {step.hold_s:g} s, unless harm was excluded in all required outcomes")
    return said, lines


def _of_waiting(moment: Moment, evidence: EvidenceReport, policy: RolloutPolicy) -> tuple[list[str], list[str]]:
    """What is missing, as far as numbers say it."""
    index = min(max(moment.step, 0), len(policy.steps) - 1)
    step = policy.steps[index]
    said, lines = _missing_exposure(evidence, step), [_step_line(policy, index)]
    verdicts: tuple[GuardrailReport | OutcomeReport, ...] = (*evidence.guardrails, *evidence.outcomes)
    silent = [one for one in verdicts if one.state == "telemetry_down"]
    if silent:
        said = [f"it goes on when these are heard again: {', '.join(sorted({one.name for one in silent}))}"]
        lines += _deadline_line(policy, "telemetry_down")
        return said, lines
    few = [g for g in evidence.guardrails if g.state == "insufficient"]
    said += [f"{g.sentence}" for g in few]
    lines += [f"guardrails.{g.name}: {_limit(policy, g)}" for g in few]
    if index == len(policy.steps) - 1:
        open_ = [o for o in evidence.outcomes if o.required and o.finding != "harm_excluded"]
        said += [_until_excluded(outcome) for outcome in open_]
        lines += [line for outcome in open_ for line in _metric_lines(policy, outcome)]
    return said, [*lines, *_deadline_line(policy, "insufficient")]


def _missing_exposure(evidence: EvidenceReport, step: Step) -> list[str]:
    said = []
    for name, least in (("viewers", step.minimum_viewers), ("impressions", step.minimum_impressions)):
        if (left := least - evidence.exposure[name]) > 0:
            said.append(f"{left:,} more {name} on the canary")
    return said


def _until_excluded(outcome: OutcomeReport) -> str:
    """An interval shrinks about with the square root of the viewers: how many more are needed if nothing changes."""
    if outcome.harm is None or outcome.high is None:
        return f"{outcome.label}: {outcome.sentence}"
    need = f"{outcome.label}: at most {_harm(outcome.high)} has to fall below {outcome.margin:.1%}"
    if outcome.harm >= outcome.margin:
        return f"{need}; what is seen now ({_harm(outcome.harm)}) is beyond it, so it will not at this difference"
    times = ((outcome.high - outcome.harm) / (outcome.margin - outcome.harm)) ** 2
    return f"{need}; about {max(times, 1.0):.1f} times the viewers, if the difference stays as it is"


def _without(guardrail: GuardrailReport, policy: RolloutPolicy) -> str:
    if guardrail.name == "firing_alerts":
        return "it would have gone on had no alert with the release's label been firing"
    if guardrail.name.endswith("_ratio"):
        return f"{guardrail.name}: it would have gone on within {_limit(policy, guardrail)}, beyond what chance gives"
    return f"{guardrail.name}: it would have gone on within {_limit(policy, guardrail)}"


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


def newest_deciding(history: Sequence[HistoryEntry]) -> HistoryEntry | None:
    """The entry that most wants explaining: the newest that moved, stopped or ended the ramp."""
    telling = ("step", "promote", "roll_back", "pause", "resume", "hold", "carry_on", "shadow", "prepare")
    return next((entry for entry in reversed(history) if entry.action in telling), None)
