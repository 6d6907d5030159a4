"""Decides whether a rollout may start: one rollout per backend at a time.

Pure. ``Waiting`` is the answer to conditions that can change: an active rollout, a cooldown, a missing policy.
``Refused`` is final, because a later start would surprise the user: the release is live, was rolled back, or another
release is live than the spec names.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from reelway.platform.cluster.kube_rollout_store import to_rollout
from reelway.platform.cluster.resources import RolloutResource
from reelway.platform.contracts.ids import short_id
from reelway.platform.errors import RolloutError
from reelway.platform.rollout.policy import RolloutPolicy
from reelway.platform.rollout.state import Phase, RolloutState
from reelway.platform.rollout.transition import already_live, start_state


@dataclass(frozen=True, slots=True)
class Waiting:
    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    reason: str


@dataclass(frozen=True, slots=True)
class Admitted:
    """The rollout starts in ``state``."""

    state: RolloutState
    policy: RolloutPolicy


def admit(
    resource: RolloutResource,
    policy: RolloutPolicy,
    *,
    previous: RolloutResource | None,
    live: str | None,
    unknown_reason: str,
    now: float,
) -> Waiting | Refused | Admitted:
    """Decides whether a rollout may start.

    Args:
        previous: the latest started rollout of the backend.
        live: the release that has all traffic if there is no previous rollout; None if it is unknown.
        unknown_reason: why the live release is unknown.
    """
    spec, before = resource.spec, to_rollout(previous).state if previous else None
    if spec.commands and spec.commands[-1].verb == "rollback":
        return Refused(f"withdrawn by {spec.commands[-1].actor} before it started")
    if before is not None and before.active:
        return Waiting(
            f"rollout {before.id} of {short_id(before.canary_release)} is in progress; this one starts after it ends"
        )
    stable = before.live_release if before else live
    if stable is None:
        return Waiting(f"the live release is unknown: {unknown_reason}")
    if stable == spec.release:
        return Refused(already_live(spec.release))
    if spec.stable_release not in (None, stable):
        return Refused(
            f"spec.stableRelease is {str(spec.stable_release)[:12]}, but {stable[:12]} is live; "
            "create a rollout that replaces the live release"
        )
    again = before is not None and before.phase is Phase.ROLLED_BACK and before.canary_release == spec.release
    if again and before is not None and not spec.force:
        return Refused(
            f"release {short_id(spec.release)} was rolled back ({before.reason}); roll it out again with spec.force"
        )
    try:
        state = start_state(
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
            return Refused(str(error))
        until = datetime.fromtimestamp(before.changed_at + policy.cooldown_s, UTC)
        return Waiting(f"cooldown of {policy.cooldown_s:.0f} s after rollout {before.id}, until {until:%H:%M:%S}Z")
    note = f": {spec.note}" if spec.note else ""
    return Admitted(state.model_copy(update={"reason": state.reason + note}), policy)
