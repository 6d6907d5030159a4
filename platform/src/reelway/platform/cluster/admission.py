"""Why: rollouts of one backend take turns, and whether one may begin is settled in one place, with a reason.

Pure. What can change by itself or be mended (a rollout under way, a cooldown, a policy that is not there yet) waits;
what would be a surprise if it began later (the release is live, was rolled back, or another one is live than was said)
is refused for good.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from reelway.platform.cluster.resources import Resource
from reelway.platform.cluster.rollout_store import rollout_of
from reelway.platform.errors import RolloutError
from reelway.platform.rollout.policy import RolloutPolicy
from reelway.platform.rollout.state import Phase, RolloutState
from reelway.platform.rollout.transition import start


@dataclass(frozen=True, slots=True)
class Wait:
    """Not yet."""

    reason: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """Never."""

    reason: str


@dataclass(frozen=True, slots=True)
class Begin:
    """Now, in this state."""

    state: RolloutState
    policy: RolloutPolicy


def admit(
    resource: Resource, policy: RolloutPolicy, *, previous: Resource | None, live: str | None, unseen: str, now: float
) -> Wait | Refuse | Begin:
    """Whether a rollout may begin.

    Args:
        previous: the newest rollout of the backend that has begun.
        live: the release that everybody is on where there is no such rollout; None when it cannot be seen.
        unseen: why it cannot.
    """
    spec, before = resource.spec, rollout_of(previous).state if previous else None
    if spec.commands and spec.commands[-1].verb == "rollback":
        return Refuse(f"withdrawn by {spec.commands[-1].actor} before it began")
    if before is not None and before.active:
        return Wait(f"rollout {before.id} of {before.canary_release[:12]} is under way; this one begins after its end")
    stable = before.live_release if before else live
    if stable is None:
        return Wait(f"it cannot be seen which release is live: {unseen}")
    if stable == spec.release:
        return Refuse(f"release {spec.release[:12]} is the one that is live; give another one to roll out")
    if spec.stable_release not in (None, stable):
        return Refuse(
            f"spec.stableRelease is {str(spec.stable_release)[:12]}, but {stable[:12]} is live; "
            "make another rollout, over that one"
        )
    again = before is not None and before.phase is Phase.ROLLED_BACK and before.canary_release == spec.release
    if again and before is not None and not spec.force:
        return Refuse(
            f"release {spec.release[:12]} was rolled back ({before.reason}); roll it out again with spec.force"
        )
    try:
        state = start(
            policy,
            rollout_id=resource.rollout_id,
            canary_release=spec.release,
            stable_release=stable,
            now=now,
            previous=before,
            force=spec.force,
        )
    except RolloutError as error:
        if before is None:
            return Refuse(str(error))
        until = datetime.fromtimestamp(before.changed_at + policy.cooldown_s, UTC)
        return Wait(f"cooldown of {policy.cooldown_s:.0f} s after rollout {before.id}, until {until:%H:%M:%S}Z")
    note = f": {spec.note}" if spec.note else ""
    return Begin(state.model_copy(update={"reason": state.reason + note}), policy)
