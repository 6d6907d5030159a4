"""Decides the next action of a rollout and states the reason.

Pure functions: the same policy, state, evidence and clock give the same decision. ``_RULES`` lists the rules in order
of precedence; the first one that applies decides.

Apart from a forced ``promote`` command, only evidence promotes a release. Missing, stale, out-of-order or insufficient
evidence holds the rollout. A hold ends in a pause or a rollback, never in a promotion.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from reelway.platform.contracts.events import Arm
from reelway.platform.contracts.ids import short_id
from reelway.platform.rollout.assessment import Assessment, assess
from reelway.platform.rollout.evidence import EvidenceSnapshot, nothing_heard
from reelway.platform.rollout.policy import Deadline, RolloutPolicy, Step
from reelway.platform.rollout.sequential import BASIS_POINTS
from reelway.platform.rollout.state import RAMPING, Phase, RolloutState
from reelway.platform.rollout.transition import Action, Decision, advance, start, tick_of

__all__ = ["Action", "Decision", "advance", "decide", "decide_on", "start"]


@dataclass(frozen=True, slots=True)
class _Case:
    """Input of the decision rules."""

    policy: RolloutPolicy
    state: RolloutState
    evidence: EvidenceSnapshot
    verdicts: Assessment
    now: float
    tick_s: float
    distrust: str
    """Reason why this snapshot cannot justify a step or a promotion; empty if it can."""


def decide(policy: RolloutPolicy, state: RolloutState, evidence: EvidenceSnapshot | None, now: float) -> Decision:
    """Returns the next action. Without ``evidence`` everything is ``telemetry_down``."""
    evidence = evidence or nothing_heard(state.canary_release, now)
    return decide_on(policy, state, evidence, assess(policy, evidence), now)


def decide_on(
    policy: RolloutPolicy, state: RolloutState, evidence: EvidenceSnapshot, verdicts: Assessment, now: float
) -> Decision:
    """Returns the next action for evidence that is already assessed."""
    tick_s = tick_of(policy, state, now)
    case = _Case(policy, state, evidence, verdicts, now, tick_s, _distrust(policy, state, evidence, now))
    for rule in _RULES:
        if (decision := rule(case)) is not None:
            break
    else:
        decision = Decision(Action.WAIT, f"{state.phase}: nothing to do")
    newest = evidence.time if not case.distrust else state.evidence_at
    return Decision(
        decision.action, decision.reason, decision.step, decision.canary_bp, newest, decision.holds_for,
        decision.command_done,
    )  # fmt: skip


def _distrust(policy: RolloutPolicy, state: RolloutState, evidence: EvidenceSnapshot, now: float) -> str:
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


def _own(case: _Case) -> bool:
    return case.evidence.release == case.state.canary_release


def _finished(case: _Case) -> Decision | None:
    """Rolled-back and retired rollouts are final: neither evidence nor commands change them."""
    state = case.state
    if state.phase is not Phase.ROLLED_BACK and not state.retired:
        return None
    if state.command is None:
        return Decision(Action.WAIT, f"{'retired' if state.retired else state.phase}: nothing to do")
    what = "the previous release is no longer warm" if state.retired else "it was rolled back"
    return Decision(
        Action.REFUSE,
        f"{state.command.verb} by {state.command.actor} rejected: {what}; start a new rollout",
        command_done=True,
    )


def _rolling_back(case: _Case) -> Decision | None:
    """A rollback cannot be interrupted."""
    state = case.state
    if state.phase is not Phase.ROLLING_BACK:
        return None
    done = state.command is not None
    if case.evidence.weights is not None and case.evidence.weights.get(Arm.CANARY, 0) == 0:
        return Decision(Action.COMPLETE_ROLLBACK, f"all traffic is on stable: {state.reason}", command_done=done)
    return Decision(Action.WAIT, "rolling back: not all traffic is observed on stable yet", command_done=done)


def _asked_to_roll_back(case: _Case) -> Decision | None:
    command = case.state.command
    if command is None or command.verb != "rollback":
        return None
    note = f": {command.note}" if command.note else ""
    return Decision(Action.ROLL_BACK, f"rolled back by {command.actor}{note}", command_done=True)


def _guardrail(case: _Case) -> Decision | None:
    """Rolls back immediately in every phase after pending, also on a stale snapshot of this release."""
    if case.state.phase is Phase.PENDING or not _own(case) or not (breaches := case.verdicts.breaches):
        return None
    return Decision(Action.ROLL_BACK, "guardrail: " + "; ".join(breach.sentence for breach in breaches))


def _harm(case: _Case) -> Decision | None:
    """Rolls back also while paused: a pause stops the ramp, not the protection.

    After a promotion there is no stable arm to compare with.
    """
    if case.state.phase not in RAMPING or not _own(case) or not (harms := case.verdicts.harms):
        return None
    return Decision(Action.ROLL_BACK, "; ".join(harm.sentence for harm in harms))


def _asked_else(case: _Case) -> Decision | None:
    state, command = case.state, case.state.command
    if command is None:
        return None
    who = f"by {command.actor}" + (f": {command.note}" if command.note else "")
    if command.verb == "pause" and state.phase in (Phase.STEPPING, Phase.HOLDING):
        return Decision(Action.PAUSE, f"paused {who}", command_done=True)
    if command.verb == "resume" and state.phase is Phase.PAUSED:
        return Decision(Action.RESUME, f"resumed {who}", command_done=True)
    if command.verb == "promote" and state.phase in RAMPING:
        return _asked_to_promote(case, who)
    return Decision(Action.REFUSE, f"{command.verb} {who} rejected: the rollout is {state.phase}", command_done=True)


def _asked_to_promote(case: _Case, who: str) -> Decision:
    """A command may skip steps and holds. Without evidence it requires ``--force``, which the reason records."""
    lacking = _lacking(case)
    if lacking and not (case.state.command and case.state.command.force):
        return Decision(
            Action.REFUSE, f"promotion {who} rejected: {lacking}; --force promotes anyway", command_done=True
        )
    suffix = f", forced despite {lacking}" if lacking else f"; {_grounds(case)}"
    return Decision(Action.PROMOTE, f"promoted {who}{suffix}", command_done=True)


def _before_traffic(case: _Case) -> Decision | None:
    state, policy, evidence = case.state, case.policy, case.evidence
    if state.phase is Phase.PENDING:
        return Decision(
            Action.PREPARE, f"start {short_id(state.canary_release)} in addition to {short_id(state.stable_release)}"
        )
    if state.phase is Phase.PREPARING:
        if not case.distrust and evidence.canary_gave_up:
            return Decision(Action.ROLL_BACK, f"the release cannot start: {evidence.canary_gave_up}")
        if not case.distrust and evidence.canary_ready:
            if policy.shadow is not None:
                return Decision(Action.SHADOW, f"ready; mirroring {policy.shadow.mirror_percent:g} % of the requests")
            return _step_to(case, 0, "ready")
        return _deadline(case, policy.deadlines.preparing, state.phase_s, "the release is not ready", holds="")
    if state.phase is Phase.SHADOW and policy.shadow is not None:
        return _leave_shadow(case)
    return _step_to(case, 0, "no shadow in the policy") if state.phase is Phase.SHADOW else None


def _leave_shadow(case: _Case) -> Decision:
    state, shadow = case.state, case.policy.shadow
    assert shadow is not None
    if case.distrust or not case.evidence.canary_ready:
        why = case.distrust or "the release is not observed as ready"
        deadline = case.policy.deadlines.telemetry_down
        return _deadline(case, deadline, state.held_telemetry_s, why, holds="telemetry_down")
    seen, waited_s = case.evidence.shadow_requests, state.phase_s + case.tick_s
    if waited_s >= shadow.duration_s and seen >= shadow.minimum_requests:
        return _step_to(case, 0, f"{seen} mirrored requests in {waited_s:.0f} s without a breach")
    return Decision(
        Action.WAIT,
        f"shadow: {waited_s:.0f} of {shadow.duration_s:.0f} s, {seen} of {shadow.minimum_requests} mirrored requests",
    )


def _after_traffic(case: _Case) -> Decision | None:
    state = case.state
    if state.phase is Phase.PROMOTING:
        if case.evidence.weights is not None and case.evidence.weights.get(Arm.CANARY, 0) == state.canary_bp:
            return Decision(Action.COMPLETE_PROMOTION, f"all traffic is on {short_id(state.canary_release)}")
        return Decision(Action.WAIT, "promoting: not all traffic is observed on the release yet")
    if state.phase is Phase.PROMOTED:
        kept_s = state.phase_s + case.tick_s
        if kept_s >= case.policy.retention_s:
            return Decision(Action.RETIRE, f"{short_id(state.stable_release)} was kept warm for {kept_s:.0f} s")
        return Decision(Action.WAIT, f"promoted; {short_id(state.stable_release)} stays warm")
    return None


def _paused(case: _Case) -> Decision | None:
    return Decision(Action.WAIT, f"paused: {case.state.reason}") if case.state.phase is Phase.PAUSED else None


def _ramp(case: _Case) -> Decision | None:
    """Missing telemetry takes precedence: it is neither good nor bad, and its time does not count towards the hold."""
    state, deadlines = case.state, case.policy.deadlines
    if unseen := _unseen(case):
        return _deadline(case, deadlines.telemetry_down, state.held_telemetry_s, unseen, holds="telemetry_down")
    if not (lacking := _lacking(case, this_step=True)):
        if state.step + 1 < len(case.policy.steps):
            return _step_to(case, state.step + 1, _grounds(case))
        return Decision(Action.PROMOTE, _grounds(case))
    waited_s = state.phase_s + case.tick_s
    if waited_s < _step_of(case).hold_s:
        action = Action.CARRY_ON if state.phase is Phase.HOLDING else Action.WAIT
        return Decision(action, f"step {state.step + 1} at {state.canary_bp / 100:g} %: {lacking}")
    return _deadline(case, deadlines.insufficient, state.held_insufficient_s, lacking, holds="insufficient")


def _unseen(case: _Case) -> str:
    if case.distrust:
        return f"telemetry down: {case.distrust}"
    if silent := case.verdicts.silent:
        more = f" and {len(silent) - 1} more" if len(silent) > 1 else ""
        return f"telemetry down: {silent[0].sentence}{more}"
    return ""


def _lacking(case: _Case, *, this_step: bool = False) -> str:
    """Returns what is missing for a promotion; empty if nothing is.

    Args:
        this_step: check the requirements of the next step instead, unless this is the last step.
    """
    if unseen := _unseen(case):
        return unseen
    verdicts = case.verdicts
    if verdicts.breaches or verdicts.harms:
        return "a guardrail breach or established harm"
    if not verdicts.guardrails_ok:
        return next(g.sentence for g in verdicts.guardrails if g.state.value != "ok")
    last = case.state.step + 1 >= len(case.policy.steps)
    excluded = not verdicts.not_excluded
    step = _step_of(case)
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
        waited_s = case.state.phase_s + case.tick_s
        if waited_s < step.hold_s and (last or not excluded):
            return f"held {waited_s:.0f} of {step.hold_s:.0f} s, exposure {exposure}"
    if (last or not this_step) and not excluded:
        return verdicts.not_excluded[0].sentence
    return ""


def _grounds(case: _Case) -> str:
    """Returns the justification of a step or a promotion, with its numbers."""
    verdicts = case.verdicts
    seen = f"{verdicts.canary_viewers} viewers and {verdicts.canary_impressions} impressions on the canary"
    if not verdicts.not_excluded and (proved := [o.sentence for o in verdicts.outcomes if o.required]):
        return f"{seen}; " + "; ".join(proved)
    return f"{seen} in {case.state.phase_s + case.tick_s:.0f} s at {case.state.canary_bp / 100:g} % without harm"


def _step_of(case: _Case) -> Step:
    steps = case.policy.steps
    return steps[min(max(case.state.step, 0), len(steps) - 1)]


def _step_to(case: _Case, index: int, why: str) -> Decision:
    """Decides a step. A step never lowers the weight, even if the policy was edited meanwhile."""
    points = max(case.policy.steps[index].weight_bp, case.state.canary_bp)
    points = min(points, BASIS_POINTS - case.state.holdout_bp)
    return Decision(Action.STEP, f"to step {index + 1}, {points / 100:g} %: {why}", index, points)


def _deadline(case: _Case, deadline: Deadline, held_s: float, why: str, *, holds: str) -> Decision:
    """Holds until the deadline, then takes the policy's deadline action, which is never a promotion."""
    state, held_s = case.state, held_s + case.tick_s
    if held_s >= deadline.after_s and deadline.action != "hold":
        reason = f"{why}; for {held_s:.0f} s, deadline {deadline.after_s:.0f} s"
        if deadline.action == "rollback" or state.phase not in RAMPING:
            return Decision(Action.ROLL_BACK, reason)
        return Decision(Action.PAUSE, reason)
    waits = state.phase is Phase.HOLDING or state.phase not in RAMPING
    return Decision(
        Action.WAIT if waits else Action.HOLD, f"held at {state.canary_bp / 100:g} %: {why}", holds_for=holds
    )


_RULES: tuple[Callable[[_Case], Decision | None], ...] = (
    _finished,
    _rolling_back,
    _asked_to_roll_back,
    _guardrail,
    _harm,
    _asked_else,
    _before_traffic,
    _after_traffic,
    _paused,
    _ramp,
)
