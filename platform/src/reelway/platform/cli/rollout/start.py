"""``reelway rollout start``: everything that can be refused is refused before anybody meets the release.

The release is verified as ``reelway serve`` verifies it, the policy is checked, and what is live is asked of the store.
Nothing is moved here: the controller does that, from what is written down.
"""

from __future__ import annotations

import secrets
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from reelway.platform.cli.rollout.place import actor, serving_record
from reelway.platform.cli.terminal import console
from reelway.platform.errors import RolloutError
from reelway.platform.rollout.policy import RolloutPolicy
from reelway.platform.runs import RunDirectory

ROLLOUT_PREFIX: Final = "r-"
DRILL_PREFIX: Final = "d-"

if TYPE_CHECKING:
    from reelway.platform.rollout.records import Rollout, RolloutStore


def start_rollout(
    run: RunDirectory,
    store: RolloutStore,
    release: str,
    policy: RolloutPolicy,
    *,
    force: bool,
    note: str,
    prefix: str = ROLLOUT_PREFIX,
) -> Rollout:
    """Write a new rollout down.

    Args:
        release: id, unique beginning of one, or ``latest``, in the run's release store.
        force: past a cooldown and past the same release's rollback; never past a rollout under way.
        prefix: of the rollout's id; a drill has its own, since nobody's cooldown should come of it.

    Raises:
        ReleaseError: the release is not there, or is refused.
        RolloutError: the run is not being served, or the rollout may not start.
    """
    from reelway.platform.rollout.transition import start

    stable = live_release(run, store.latest())
    canary = verified_release(run, release)
    now, previous = time.time(), previous_of(store, canary)
    state = start(
        policy,
        rollout_id=new_rollout_id(now, prefix),
        canary_release=canary,
        stable_release=stable,
        now=now,
        previous=previous.state if previous else None,
        force=force,
    )
    said = f" by {actor()}" + (f": {note}" if note else "")
    return store.create(state.model_copy(update={"reason": state.reason + said}), policy)


def live_release(run: RunDirectory, previous: Rollout | None) -> str:
    """The release that everybody is on, which the new one is compared with.

    Raises:
        RolloutError: nobody serves the run.
    """
    serving = serving_record(run)
    if serving is None:
        raise RolloutError(
            f"{run.path} is not being served, so there is nothing to compare a release with; "
            f"start it with `reelway serve --run {run.path}`"
        )
    return previous.state.live_release if previous else serving.release


def verified_release(run: RunDirectory, release: str) -> str:
    """The whole id of a release that may take traffic; it then lies where the stages read it.

    Raises:
        ReleaseError: it is not there, or it is refused.
    """
    from reelway.platform.cli.release import fetch_verified

    with console.status("verifying the release"):
        return fetch_verified(run, release).manifest.release_id


def previous_of(store: RolloutStore, canary: str) -> Rollout | None:
    """The rollout that a new one has to reckon with: the newest, but for other releases' drills."""
    for rollout in reversed(store.all()):
        drilled = rollout.state.id.startswith(DRILL_PREFIX)
        if not drilled or rollout.state.active or rollout.state.canary_release == canary:
            return rollout
    return None


def new_rollout_id(now: float, prefix: str = ROLLOUT_PREFIX) -> str:
    """Short enough to be read out: ``r-20260131-3fa91c``."""
    return f"{prefix}{datetime.fromtimestamp(now, UTC):%Y%m%d}-{secrets.token_hex(3)}"
