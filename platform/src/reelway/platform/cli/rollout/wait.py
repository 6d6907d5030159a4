"""Why: a script that waits for a rollout needs an exit code for each way it can end, and one for giving up waiting.

The table of ``reelway rollout``'s exit codes, for ``--wait``, ``watch`` and ``status --exit-code``:

====  ==========================================================================================================
code  meaning
====  ==========================================================================================================
0     promoted, or done as asked (``rollback --wait``: everybody is on stable; ``pause --wait``: paused)
2     usage: a wrong flag, policy or run directory
6     the release is refused (``start``)
9     refused: the rollout cannot start or be changed as asked
10    rolled back, and that was not what was asked for
11    still under way: at ``--timeout``, or when ``status --exit-code`` looked
12    paused: a person has to say ``resume``, ``promote`` or ``rollback``
130   interrupted with Ctrl-C; the rollout goes on
====  ==========================================================================================================

Refuses to decide anything: the controller moves the rollout, this only looks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from reelway.platform.rollout.state import Phase, RolloutState

if TYPE_CHECKING:
    from reelway.platform.rollout.records import Rollout, RolloutStore

POLL_S: Final = 0.1


class RolloutExit(IntEnum):
    """Exit codes that say how a rollout stands; see the module's docstring."""

    PROMOTED = 0
    REFUSED = 9
    ROLLED_BACK = 10
    UNDER_WAY = 11
    PAUSED = 12

    @property
    def words(self) -> str:
        return self.name.lower().replace("_", " ")


def exit_of(state: RolloutState) -> RolloutExit:
    """How a rollout stands, as an exit code."""
    match state.phase:
        case Phase.PROMOTED:
            return RolloutExit.PROMOTED
        case Phase.ROLLED_BACK:
            return RolloutExit.ROLLED_BACK
        case Phase.PAUSED:
            return RolloutExit.PAUSED
        case _:
            return RolloutExit.UNDER_WAY


def moments(timeout_s: float | None, *, every_s: float = POLL_S) -> Iterator[float]:
    """Seconds since the first one, again and again, until the timeout has passed; the last is at or past it."""
    began = time.monotonic()
    while True:
        passed_s = time.monotonic() - began
        yield passed_s
        if timeout_s is not None and passed_s >= timeout_s:
            return
        left_s = every_s if timeout_s is None else min(every_s, max(0.0, timeout_s - passed_s))
        time.sleep(left_s)


def wait_until(
    store: RolloutStore,
    rollout_id: str,
    holds: Callable[[Rollout], bool],
    *,
    timeout_s: float | None,
    each: Callable[[Rollout], None] = lambda _: None,
) -> Rollout:
    """The rollout when ``holds`` is true of it, or as it is at the timeout.

    Args:
        each: called with the rollout whenever something was written, for progress.
    """
    changes, rollout = None, store.get(rollout_id)
    for _ in moments(timeout_s):
        if (now := store.changes()) != changes:
            changes, rollout = now, store.get(rollout_id)
            each(rollout)
        if holds(rollout):
            break
    return rollout
