"""Waiting for rollouts, and the exit codes of ``reelway rollout``.

The exit codes apply to ``--wait``, ``watch`` and ``status --exit-code``:

====  ==========================================================================================================
code  meaning
====  ==========================================================================================================
0     promoted, or the command took effect (``rollback --wait``: all traffic on stable; ``pause --wait``: paused)
2     usage error: invalid option, policy or run directory
6     the release failed verification (``start``)
9     rejected: the rollout cannot start, or does not accept the command
10    rolled back, although another command was given
11    still in progress: at ``--timeout``, or at the time of ``status --exit-code``
12    paused: waits for ``resume``, ``promote`` or ``rollback``
130   interrupted with Ctrl-C; the rollout continues
====  ==========================================================================================================
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


class RolloutExitCode(IntEnum):
    """Exit codes for the state of a rollout; see the module's docstring."""

    PROMOTED = 0
    REFUSED = 9
    ROLLED_BACK = 10
    IN_PROGRESS = 11
    PAUSED = 12

    @property
    def description(self) -> str:
        return self.name.lower().replace("_", " ")


def exit_code_for(state: RolloutState) -> RolloutExitCode:
    """Returns the exit code for the state of a rollout."""
    match state.phase:
        case Phase.PROMOTED:
            return RolloutExitCode.PROMOTED
        case Phase.ROLLED_BACK:
            return RolloutExitCode.ROLLED_BACK
        case Phase.PAUSED:
            return RolloutExitCode.PAUSED
        case _:
            return RolloutExitCode.IN_PROGRESS


def poll_times(timeout_s: float | None, *, every_s: float = POLL_S) -> Iterator[float]:
    """Sleeps between iterations and yields the elapsed seconds; the last value is at or after the timeout."""
    started_s = time.monotonic()
    while True:
        passed_s = time.monotonic() - started_s
        yield passed_s
        if timeout_s is not None and passed_s >= timeout_s:
            return
        left_s = every_s if timeout_s is None else min(every_s, max(0.0, timeout_s - passed_s))
        time.sleep(left_s)


def wait_until(
    store: RolloutStore,
    rollout_id: str,
    condition: Callable[[Rollout], bool],
    *,
    timeout_s: float | None,
    on_change: Callable[[Rollout], None] = lambda _: None,
) -> Rollout:
    """Waits for a condition and returns the rollout, also at the timeout.

    Args:
        condition: ends the wait when it is true.
        on_change: called with the rollout after every write to the store.
    """
    changes, rollout = None, store.get(rollout_id)
    for _ in poll_times(timeout_s):
        if (now := store.revision()) != changes:
            changes, rollout = now, store.get(rollout_id)
            on_change(rollout)
        if condition(rollout):
            break
    return rollout
