"""State transitions of a rollout: the first state, and the state after each decision.

Pure functions. ``start_state`` checks that a rollout may start: no rollout is in progress, the release was not rolled
back before, and no cooldown is running. ``force`` skips the last two checks.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from reelway.platform.contracts.ids import short_id
from reelway.platform.errors import RolloutError
from reelway.platform.rollout.policy import RolloutPolicy
from reelway.platform.rollout.sequential import BASIS_POINTS
from reelway.platform.rollout.state import Phase, RolloutState


class Action(StrEnum):
    """Actions of a decision. ``wait`` and ``hold`` change no weight."""

    WAIT = "wait"
    PREPARE = "prepare"
    SHADOW = "shadow"
    STEP = "step"
    HOLD = "hold"
    CARRY_ON = "carry_on"
    PAUSE = "pause"
    RESUME = "resume"
    PROMOTE = "promote"
    COMPLETE_PROMOTION = "complete_promotion"
    ROLL_BACK = "roll_back"
    COMPLETE_ROLLBACK = "complete_rollback"
    RETIRE = "retire"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class Decision:
    """An action and its reason. The fields after ``reason`` are the input of ``advance``."""

    action: Action
    reason: str
    step: int = -1
    canary_bp: int = 0
    evidence_at: float = 0.0
    holds_for: str = ""
    consumes_command: bool = False


def start_state(
    policy: RolloutPolicy,
    *,
    rollout_id: str,
    canary_release: str,
    stable_release: str,
    now: float,
    previous: RolloutState | None = None,
    force: bool = False,
) -> RolloutState:
    """Returns the first state of a new rollout.

    Args:
        previous: state of the service's previous rollout.
        force: ignores the cooldown and an earlier rollback of the same release.

    Raises:
        RolloutError: if a rollout is in progress, the release was rolled back, or the cooldown has not ended.
    """
    if canary_release == stable_release:
        raise RolloutError(already_live(canary_release))
    if previous is not None and previous.active:
        raise RolloutError(
            f"rollout {previous.id} of {short_id(previous.canary_release)} is {previous.phase}; wait until it has "
            "ended, or end it with `reelway rollout rollback`"
        )
    if previous is not None and previous.phase is Phase.ROLLED_BACK and not force:
        if previous.canary_release == canary_release:
            raise RolloutError(
                f"release {short_id(canary_release)} was rolled back ({previous.reason}); "
                "to roll it out again, use --force"
            )
        left_s = policy.cooldown_s - max(0.0, now - previous.changed_at)
        if left_s > 0:
            raise RolloutError(
                f"cooldown after rollout {previous.id}: {left_s:.0f} of {policy.cooldown_s:.0f} s remain; "
                "wait, or use --force"
            )
    return RolloutState(
        id=rollout_id,
        stable_release=stable_release,
        canary_release=canary_release,
        holdout_bp=policy.holdout_bp,
        started_at=now,
        changed_at=now,
        tick_at=now,
        forced=force,
        reason=f"rollout of {short_id(canary_release)} over {short_id(stable_release)} requested"
        + (" (forced)" if force else ""),
    )


def already_live(release: str) -> str:
    """Returns the reason for which the live release cannot be rolled out."""
    return f"release {short_id(release)} is already live; roll out another release"


def tick_seconds(policy: RolloutPolicy, state: RolloutState, now: float) -> float:
    """Returns the seconds that a decision adds to the timers: at least 0, at most the policy's ``longest_tick_s``."""
    return min(max(now - state.tick_at, 0.0), policy.longest_tick_s)


def advance(state: RolloutState, decision: Decision, policy: RolloutPolicy, now: float) -> RolloutState:
    """Returns the state after a decision. It must be recorded before any traffic is changed for it."""
    tick_s = tick_seconds(policy, state, now)
    change: dict[str, object] = {"tick_at": now, "evidence_at": decision.evidence_at}
    if decision.action not in (Action.WAIT, Action.REFUSE) or decision.holds_for:
        change["reason"] = decision.reason
    if decision.consumes_command:
        change["command"] = None
    telemetry, insufficient = decision.holds_for == "telemetry_down", decision.holds_for == "insufficient"
    change["held_telemetry_s"] = state.held_telemetry_s + tick_s if telemetry else 0.0
    change["held_insufficient_s"] = (
        state.held_insufficient_s + tick_s if insufficient else state.held_insufficient_s if telemetry else 0.0
    )
    if not telemetry:
        change["phase_s"] = state.phase_s + tick_s
    changed = _state_changes(state, decision, policy)
    if changed:
        change.update(changed)
        if changed["phase"] is not state.phase or "step" in changed:
            change["changed_at"] = now
    return state.model_copy(update=change)


def _state_changes(state: RolloutState, decision: Decision, policy: RolloutPolicy) -> dict[str, object]:
    fresh: dict[str, object] = {"phase_s": 0.0, "held_telemetry_s": 0.0, "held_insufficient_s": 0.0}
    back = {**fresh, "phase": Phase.ROLLING_BACK, "canary_bp": 0, "shadow_bp": 0}
    match decision.action:
        case Action.PREPARE:
            return {**fresh, "phase": Phase.PREPARING}
        case Action.SHADOW:
            mirrored = round(policy.shadow.mirror_percent * 100) if policy.shadow else 0
            return {**fresh, "phase": Phase.SHADOW, "shadow_bp": mirrored}
        case Action.STEP:
            new = {"step": decision.step, "canary_bp": decision.canary_bp, "shadow_bp": 0}
            return {**fresh, **new, "phase": Phase.STEPPING}
        case Action.HOLD:
            return {"phase": Phase.HOLDING}
        case Action.CARRY_ON:
            return {"phase": Phase.STEPPING}
        case Action.PAUSE:
            return {"phase": Phase.PAUSED, "held_telemetry_s": 0.0, "held_insufficient_s": 0.0}
        case Action.RESUME:
            return {"phase": Phase.STEPPING, "held_telemetry_s": 0.0, "held_insufficient_s": 0.0}
        case Action.PROMOTE:
            everything = BASIS_POINTS - state.holdout_bp
            return {**fresh, "phase": Phase.PROMOTING, "canary_bp": everything, "shadow_bp": 0}
        case Action.COMPLETE_PROMOTION:
            return {**fresh, "phase": Phase.PROMOTED}
        case Action.ROLL_BACK:
            return back
        case Action.COMPLETE_ROLLBACK:
            return {**back, "phase": Phase.ROLLED_BACK}
        case Action.RETIRE:
            return {"phase": Phase.PROMOTED, "retired": True}
        case _:
            return {}
