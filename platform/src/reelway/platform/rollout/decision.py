"""Decides the next action of a rollout and states the reason.

Pure functions: the same policy, state, evidence and clock give the same decision. ``_RULES`` lists the rules in order
of precedence; the first one that applies decides.

Apart from a forced ``promote`` command, only evidence promotes a release. Missing, stale, out-of-order, insufficient or
suspicious evidence holds the rollout. A hold ends in a pause or a rollback, never in a promotion.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from reelway.platform.contracts.events import Arm
from reelway.platform.contracts.ids import short_id
from reelway.platform.rollout.assessment import Assessment, assess
from reelway.platform.rollout.evidence import EvidenceSnapshot, no_evidence
from reelway.platform.rollout.policy import Deadline, RolloutPolicy, Step
from reelway.platform.rollout.sequential import BASIS_POINTS
from reelway.platform.rollout.state import RAMPING_PHASES, Phase, RolloutState
from reelway.platform.rollout.transition import Action, Decision, advance, start_state, tick_seconds

__all__ = ["Action", "Decision", "advance", "decide", "decide_on", "start_state"]


@dataclass(frozen=True, slots=True)
class _RuleContext:
    """Input of the decision rules."""

    policy: RolloutPolicy
    state: RolloutState
    evidence: EvidenceSnapshot
    verdicts: Assessment
    now: float
    tick_s: float
    untrusted_reason: str
    """Reason why this snapshot cannot justify a step or a promotion; empty if it can."""


def decide(policy: RolloutPolicy, state: RolloutState, evidence: EvidenceSnapshot | None, now: float) -> Decision:
    """Returns the next action. Without ``evidence`` everything is ``telemetry_down``."""
    evidence = evidence or no_evidence(state.canary_release, now)
    return decide_on(policy, state, evidence, assess(policy, evidence), now)


def decide_on(
    policy: RolloutPolicy, state: RolloutState, evidence: EvidenceSnapshot, verdicts: Assessment, now: float
) -> Decision:
    """Returns the next action for evidence that is already assessed."""
    tick_s = tick_seconds(policy, state, now)
    context = _RuleContext(
        policy, state, evidence, verdicts, now, tick_s, _untrusted_reason(policy, state, evidence, now)
    )
    for rule in _RULES:
        if (decision := rule(context)) is not None:
            break
    else:
        decision = Decision(Action.WAIT, f"{state.phase}: nothing to do")
    newest = evidence.time if not context.untrusted_reason else state.evidence_at
    return Decision(
        decision.action, decision.reason, decision.step, decision.canary_bp, newest, decision.holds_for,
        decision.consumes_command,
    )  # fmt: skip


def _untrusted_reason(policy: RolloutPolicy, state: RolloutState, evidence: EvidenceSnapshot, now: float) -> str:
    if evidence.release != state.canary_release:
        return f"the evidence belongs to release {short_id(evidence.release)}, not {short_id(state.canary_release)}"
    if not math.isfinite(evidence.time):
        return "the evidence has no valid time"
    if (age := now - evidence.time) > policy.evidence_max_age_s:
        return f"the evidence is {age:.0f} s old, allowed {policy.evidence_max_age_s:.0f} s"
    if age < -policy.evidence_max_age_s:
        return f"the evidence is from {-age:.0f} s in the future"
    clock_went_back = now < state.tick_at
    if (
        evidence.time < state.evidence_at
        and not clock_went_back
        and state.evidence_at <= now + policy.evidence_max_age_s
    ):
        return f"newer evidence was already assessed ({state.evidence_at - evidence.time:.0f} s newer)"
    return ""


def _is_about_canary(context: _RuleContext) -> bool:
    return context.evidence.release == context.state.canary_release


def _finished(context: _RuleContext) -> Decision | None:
    """Rolled-back and retired rollouts are final: neither evidence nor commands change them."""
    state = context.state
    if state.phase is not Phase.ROLLED_BACK and not state.retired:
        return None
    if state.command is None:
        return Decision(Action.WAIT, f"{'retired' if state.retired else state.phase}: nothing to do")
    reason = "the previous release is no longer warm" if state.retired else "it was rolled back"
    return Decision(
        Action.REFUSE,
        f"{state.command.verb} by {state.command.actor} rejected: {reason}; start a new rollout",
        consumes_command=True,
    )


def _rolling_back(context: _RuleContext) -> Decision | None:
    """A rollback cannot be interrupted."""
    state = context.state
    if state.phase is not Phase.ROLLING_BACK:
        return None
    done = state.command is not None
    if context.evidence.weights is not None and context.evidence.weights.get(Arm.CANARY, 0) == 0:
        return Decision(Action.COMPLETE_ROLLBACK, f"all traffic is on stable: {state.reason}", consumes_command=done)
    return Decision(Action.WAIT, "rolling back: not all traffic is observed on stable yet", consumes_command=done)


def _rollback_command(context: _RuleContext) -> Decision | None:
    command = context.state.command
    if command is None or command.verb != "rollback":
        return None
    note = f": {command.note}" if command.note else ""
    return Decision(Action.ROLL_BACK, f"rolled back by {command.actor}{note}", consumes_command=True)


def _guardrail(context: _RuleContext) -> Decision | None:
    """Rolls back immediately in every phase after pending, also on a stale snapshot of this release."""
    if (
        context.state.phase is Phase.PENDING
        or not _is_about_canary(context)
        or not (breaches := context.verdicts.breaches)
    ):
        return None
    return Decision(Action.ROLL_BACK, "guardrail: " + "; ".join(breach.sentence for breach in breaches))


def _harm(context: _RuleContext) -> Decision | None:
    """Rolls back also while paused: a pause stops the ramp, not the protection.

    Harm that forged viewers explain holds the rollout instead (``_suspicion``). After a promotion there is no stable
    arm to compare with.
    """
    if (
        context.state.phase not in RAMPING_PHASES
        or not _is_about_canary(context)
        or not (harms := context.verdicts.proven_harms)
    ):
        return None
    return Decision(Action.ROLL_BACK, "; ".join(harm.sentence for harm in harms))


def _other_commands(context: _RuleContext) -> Decision | None:
    state, command = context.state, context.state.command
    if command is None:
        return None
    by_actor = f"by {command.actor}" + (f": {command.note}" if command.note else "")
    if command.verb == "pause" and state.phase in (Phase.STEPPING, Phase.HOLDING):
        return Decision(Action.PAUSE, f"paused {by_actor}", consumes_command=True)
    if command.verb == "resume" and state.phase is Phase.PAUSED:
        return Decision(Action.RESUME, f"resumed {by_actor}", consumes_command=True)
    if command.verb == "promote" and state.phase in RAMPING_PHASES:
        return _promote_command(context, by_actor)
    return Decision(
        Action.REFUSE, f"{command.verb} {by_actor} rejected: the rollout is {state.phase}", consumes_command=True
    )


def _promote_command(context: _RuleContext, by_actor: str) -> Decision:
    """A command may skip steps and holds. Without evidence it requires ``--force``, which the reason records."""
    missing = _missing_requirement(context)
    if missing and not (context.state.command and context.state.command.force):
        return Decision(
            Action.REFUSE, f"promotion {by_actor} rejected: {missing}; --force promotes anyway", consumes_command=True
        )
    suffix = f", forced despite {missing}" if missing else f"; {_justification(context)}"
    return Decision(Action.PROMOTE, f"promoted {by_actor}{suffix}", consumes_command=True)


def _before_traffic(context: _RuleContext) -> Decision | None:
    state, policy, evidence = context.state, context.policy, context.evidence
    if state.phase is Phase.PENDING:
        return Decision(
            Action.PREPARE, f"start {short_id(state.canary_release)} in addition to {short_id(state.stable_release)}"
        )
    if state.phase is Phase.PREPARING:
        if not context.untrusted_reason and evidence.canary_failure:
            return Decision(Action.ROLL_BACK, f"the release cannot start: {evidence.canary_failure}")
        if not context.untrusted_reason and evidence.canary_ready:
            if policy.shadow is not None:
                return Decision(Action.SHADOW, f"ready; mirroring {policy.shadow.mirror_percent:g} % of the requests")
            return _step_to(context, 0, "ready")
        return _deadline(context, policy.deadlines.preparing, state.phase_s, "the release is not ready", holds="")
    if state.phase is Phase.SHADOW and policy.shadow is not None:
        return _leave_shadow(context)
    return _step_to(context, 0, "no shadow in the policy") if state.phase is Phase.SHADOW else None


def _leave_shadow(context: _RuleContext) -> Decision:
    state, shadow = context.state, context.policy.shadow
    assert shadow is not None
    if context.untrusted_reason or not context.evidence.canary_ready:
        reason = context.untrusted_reason or "the release is not observed as ready"
        deadline = context.policy.deadlines.telemetry_down
        return _deadline(context, deadline, state.held_telemetry_s, reason, holds="telemetry_down")
    mirrored, waited_s = context.evidence.shadow_requests, state.phase_s + context.tick_s
    if waited_s >= shadow.duration_s and mirrored >= shadow.minimum_requests:
        return _step_to(context, 0, f"{mirrored} mirrored requests in {waited_s:.0f} s without a breach")
    return Decision(
        Action.WAIT,
        f"shadow: {waited_s:.0f} of {shadow.duration_s:.0f} s, "
        f"{mirrored} of {shadow.minimum_requests} mirrored requests",
    )


def _after_traffic(context: _RuleContext) -> Decision | None:
    state = context.state
    if state.phase is Phase.PROMOTING:
        if context.evidence.weights is not None and context.evidence.weights.get(Arm.CANARY, 0) == state.canary_bp:
            return Decision(Action.COMPLETE_PROMOTION, f"all traffic is on {short_id(state.canary_release)}")
        return Decision(Action.WAIT, "promoting: not all traffic is observed on the release yet")
    if state.phase is Phase.PROMOTED:
        warm_s = state.phase_s + context.tick_s
        if warm_s >= context.policy.retention_s:
            return Decision(Action.RETIRE, f"{short_id(state.stable_release)} was kept warm for {warm_s:.0f} s")
        return Decision(Action.WAIT, f"promoted; {short_id(state.stable_release)} stays warm")
    return None


def _paused(context: _RuleContext) -> Decision | None:
    return Decision(Action.WAIT, f"paused: {context.state.reason}") if context.state.phase is Phase.PAUSED else None


def _ramp(context: _RuleContext) -> Decision | None:
    """Missing telemetry takes precedence: it is neither good nor bad, and its time does not count towards the hold."""
    state, deadlines = context.state, context.policy.deadlines
    if unseen := _missing_telemetry(context):
        return _deadline(context, deadlines.telemetry_down, state.held_telemetry_s, unseen, holds="telemetry_down")
    if suspicion := _suspicion(context):
        return _deadline(context, deadlines.insufficient, state.held_insufficient_s, suspicion, holds="insufficient")
    if not (missing := _missing_requirement(context, this_step=True)):
        if state.step + 1 < len(context.policy.steps):
            return _step_to(context, state.step + 1, _justification(context))
        return Decision(Action.PROMOTE, _justification(context))
    waited_s = state.phase_s + context.tick_s
    if waited_s < _current_step(context).hold_s:
        action = Action.CARRY_ON if state.phase is Phase.HOLDING else Action.WAIT
        return Decision(action, f"step {state.step + 1} at {state.canary_bp / 100:g} %: {missing}")
    return _deadline(context, deadlines.insufficient, state.held_insufficient_s, missing, holds="insufficient")


def _missing_telemetry(context: _RuleContext) -> str:
    if context.untrusted_reason:
        return f"telemetry down: {context.untrusted_reason}"
    if missing := context.verdicts.without_telemetry:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return f"telemetry down: {missing[0].sentence}{more}"
    return ""


def _suspicion(context: _RuleContext) -> str:
    """Returns why the viewers are not trusted; empty if nothing is suspected."""
    verdicts = context.verdicts
    if suspected := verdicts.suspected:
        return "suspicion: " + "; ".join(one.sentence for one in suspected)
    if verdicts.harms and not verdicts.proven_harms:
        harm = verdicts.harms[0]
        return f"suspicion: idle viewers, who may be forged, explain {harm.explained:.1%} of the harm; {harm.sentence}"
    return ""


def _missing_requirement(context: _RuleContext, *, this_step: bool = False) -> str:
    """Returns what is missing for a promotion; empty if nothing is.

    Args:
        this_step: check the requirements of the next step instead, unless this is the last step.
    """
    if unseen := _missing_telemetry(context):
        return unseen
    if suspicion := _suspicion(context):
        return suspicion
    verdicts = context.verdicts
    if verdicts.breaches or verdicts.harms:
        return "a guardrail breach or established harm"
    if not verdicts.guardrails_ok:
        return next(g.sentence for g in verdicts.guardrails if g.state.value != "ok")
    last = context.state.step + 1 >= len(context.policy.steps)
    excluded = not verdicts.harm_not_excluded
    step = _current_step(context)
    exposure = (
        f"{verdicts.canary_viewers} of {step.minimum_viewers} viewers, {verdicts.canary_impressions} of "
        f"{step.minimum_impressions} impressions"
    )
    exposed = (
        verdicts.canary_viewers >= step.minimum_viewers and verdicts.canary_impressions >= step.minimum_impressions
    )
    if not exposed:
        return f"exposure {exposure}"
    if this_step:
        waited_s = context.state.phase_s + context.tick_s
        if waited_s < step.hold_s and (last or not excluded):
            return f"held {waited_s:.0f} of {step.hold_s:.0f} s, exposure {exposure}"
    if (last or not this_step) and not excluded:
        return verdicts.harm_not_excluded[0].sentence
    return ""


def _justification(context: _RuleContext) -> str:
    """Returns the justification of a step or a promotion, with its numbers."""
    verdicts = context.verdicts
    exposure = f"{verdicts.canary_viewers} viewers and {verdicts.canary_impressions} impressions on the canary"
    if not verdicts.harm_not_excluded and (proved := [o.sentence for o in verdicts.outcomes if o.required]):
        return f"{exposure}; " + "; ".join(proved)
    duration_s = context.state.phase_s + context.tick_s
    return f"{exposure} in {duration_s:.0f} s at {context.state.canary_bp / 100:g} % without harm"


def _current_step(context: _RuleContext) -> Step:
    steps = context.policy.steps
    return steps[min(max(context.state.step, 0), len(steps) - 1)]


def _step_to(context: _RuleContext, index: int, why: str) -> Decision:
    """Decides a step. A step never lowers the weight, even if the policy was edited meanwhile."""
    points = max(context.policy.steps[index].weight_bp, context.state.canary_bp)
    points = min(points, BASIS_POINTS - context.state.holdout_bp)
    return Decision(Action.STEP, f"to step {index + 1}, {points / 100:g} %: {why}", index, points)


def _deadline(context: _RuleContext, deadline: Deadline, held_s: float, why: str, *, holds: str) -> Decision:
    """Holds until the deadline, then takes the policy's deadline action, which is never a promotion."""
    state, held_s = context.state, held_s + context.tick_s
    if held_s >= deadline.after_s and deadline.action != "hold":
        reason = f"{why}; for {held_s:.0f} s, deadline {deadline.after_s:.0f} s"
        if deadline.action == "rollback" or state.phase not in RAMPING_PHASES:
            return Decision(Action.ROLL_BACK, reason)
        return Decision(Action.PAUSE, reason)
    waits = state.phase is Phase.HOLDING or state.phase not in RAMPING_PHASES
    return Decision(
        Action.WAIT if waits else Action.HOLD, f"held at {state.canary_bp / 100:g} %: {why}", holds_for=holds
    )


_RULES: tuple[Callable[[_RuleContext], Decision | None], ...] = (
    _finished,
    _rolling_back,
    _rollback_command,
    _guardrail,
    _harm,
    _other_commands,
    _before_traffic,
    _after_traffic,
    _paused,
    _ramp,
)
