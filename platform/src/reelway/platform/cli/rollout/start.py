"""``reelway rollout start`` for a run directory: checks a rollout and stores it.

The release is verified as ``reelway serve`` verifies it, and the policy is checked, before any viewer gets the release.
The controller reads the stored rollout and changes the traffic.
"""

from __future__ import annotations

import secrets
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import UTC, datetime
from multiprocessing import get_context
from typing import TYPE_CHECKING, Final

from reelway.platform.cli.rollout.location import current_user, serving_record
from reelway.platform.cli.terminal import stderr_console
from reelway.platform.errors import ReleaseError, RolloutError
from reelway.platform.rollout.policy import RolloutPolicy
from reelway.platform.run_directory import RunDirectory

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
    in_child: bool = False,
) -> Rollout:
    """Stores a new rollout.

    Args:
        release: id, unique id prefix, or ``latest``, in the run's release store.
        force: ignores a cooldown and an earlier rollback of this release, but not a rollout in progress.
        prefix: prefix of the rollout id. Drills have their own, because a drill causes no cooldown.
        in_child: verify the release in a child process, for callers that then wait for a long time.

    Raises:
        ReleaseError: if the release does not exist or fails verification.
        RolloutError: if the run is not being served or the rollout may not start.
    """
    from reelway.platform.rollout.transition import start_state

    stable = live_release(run, store.latest())
    canary = verified_in_child(run, release) if in_child else verified_release(run, release)
    now, previous = time.time(), previous_rollout(store, canary)
    state = start_state(
        policy,
        rollout_id=new_rollout_id(now, prefix),
        canary_release=canary,
        stable_release=stable,
        now=now,
        previous=previous.state if previous else None,
        force=force,
    )
    request = f" by {current_user()}" + (f": {note}" if note else "")
    return store.create(state.model_copy(update={"reason": state.reason + request}), policy)


def live_release(run: RunDirectory, previous: Rollout | None) -> str:
    """Returns the live release, which the canary is compared with.

    Raises:
        RolloutError: if the run is not being served.
    """
    serving = serving_record(run)
    if serving is None:
        raise RolloutError(
            f"{run.path} is not being served, so there is no live release to compare with; "
            f"run `reelway serve --run {run.path}`"
        )
    return previous.state.live_release if previous else serving.release


def verified_release(run: RunDirectory, release: str) -> str:
    """Fetches and verifies a release, and returns its full id.

    Raises:
        ReleaseError: if the release does not exist or fails verification.
    """
    from reelway.platform.cli.release_commands import fetch_verified

    with stderr_console.status("verifying the release"):
        return fetch_verified(run, release).manifest.release_id


def verified_in_child(run: RunDirectory, release: str) -> str:
    """Verifies a release as ``verified_release`` does, in a process that then ends.

    Verification loads the models' and Feast's libraries, which would stay in this process's memory (some 700 MB).

    Raises:
        ReleaseError: if the release does not exist, fails verification, or the process was killed.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(verified_release, run, release).result()
        except BrokenProcessPool as error:
            raise ReleaseError(
                f"release {release}: the process that verified it was killed, perhaps for lack of memory; try again"
            ) from error


def previous_rollout(store: RolloutStore, canary: str) -> Rollout | None:
    """Returns the latest rollout that restricts a new one. Ended drills of other releases are skipped."""
    for rollout in reversed(store.all()):
        drilled = rollout.state.id.startswith(DRILL_PREFIX)
        if not drilled or rollout.state.active or rollout.state.canary_release == canary:
            return rollout
    return None


def new_rollout_id(now: float, prefix: str = ROLLOUT_PREFIX) -> str:
    """Returns a short id such as ``r-20260131-3fa91c``."""
    return f"{prefix}{datetime.fromtimestamp(now, UTC):%Y%m%d}-{secrets.token_hex(3)}"
