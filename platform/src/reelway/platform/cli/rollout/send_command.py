"""``reelway rollout pause|resume|promote|rollback``: stores a command and reports its effect.

A command whose target state is already reached succeeds without a change. Commands that the rollout can never accept
are rejected here; the controller accepts or rejects all others, and its reason is printed verbatim.
"""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Final

from rich.markup import escape

from reelway.platform.cli.rollout.location import RolloutLocation, current_user, print_unwrapped
from reelway.platform.cli.rollout.store_access import controller_start_hint, controller_status
from reelway.platform.cli.rollout.wait import RolloutExitCode, exit_code_for, wait_until
from reelway.platform.contracts.ids import short_id
from reelway.platform.errors import RolloutError
from reelway.platform.rollout.state import Command, Phase, RolloutState, Verb

if TYPE_CHECKING:
    from reelway.platform.rollout.records import Rollout, RolloutStore

ACCEPT_TIMEOUT_S: Final = 5.0
"""Without ``--wait``: how long to wait for the controller to accept a command, which normally takes less than 1 s."""
TARGET_PHASES: Final[dict[Verb, frozenset[Phase]]] = {
    "pause": frozenset({Phase.PAUSED}),
    "resume": frozenset({Phase.STEPPING, Phase.HOLDING}),
    "promote": frozenset({Phase.PROMOTED}),
    "rollback": frozenset({Phase.ROLLED_BACK}),
}
TRANSITION_PHASES: Final[dict[Verb, frozenset[Phase]]] = {
    "promote": frozenset({Phase.PROMOTING}),
    "rollback": frozenset({Phase.ROLLING_BACK}),
}


def send_command(
    run: RolloutLocation,
    store: RolloutStore,
    rollout: Rollout,
    verb: Verb,
    *,
    note: str,
    force: bool,
    wait: bool,
    timeout_s: float,
) -> RolloutExitCode:
    """Submits a command and prints its effect.

    Returns exit code 0 if the command took effect, or without ``wait`` if it was submitted.

    Raises:
        RolloutError: if the command is rejected; the message is the reason.
    """
    state = rollout.state
    if state.phase in TARGET_PHASES[verb] and not _contradicted_by_pending(state, verb):
        print_unwrapped(f"{state.id} is already {_phase(state)}: {escape(state.reason)}")
        return RolloutExitCode.PROMOTED
    check_command_applicable(store, state, verb)
    number = _latest_entry_number(store, state.id)
    command = None
    if state.phase not in TRANSITION_PHASES.get(verb, frozenset()):
        command = Command(id=uuid.uuid4().hex, verb=verb, actor=current_user(), force=force, note=note)
        submitted = store.submit_command(state.id, command)
        if submitted.state.command != command:
            waiting = submitted.state.command
            raise RolloutError(
                f"cannot {verb} {state.id}: a {waiting and waiting.verb} is pending, and {verb} does not replace it"
            )
        print_unwrapped(f"{verb} of {state.id} requested")
    problem = controller_status(run, rollout, store.last_reconcile(state.id), time.time()).problem
    if problem:
        print_unwrapped(f"[bold red]{escape(problem)}:[/] {escape(controller_start_hint(run))}")
    if command is not None and not (problem and not wait):
        taken_by_s = timeout_s if wait else ACCEPT_TIMEOUT_S
        rollout_after = wait_until(store, state.id, lambda r: r.state.command != command, timeout_s=taken_by_s)
        _raise_rejection(store, rollout_after, verb, number)
        if not wait:
            _print_accepted(rollout_after, command)
    if not wait:
        return RolloutExitCode.PROMOTED
    return _wait_for_effect(store, state.id, verb, number, timeout_s)


def check_command_applicable(store: RolloutStore, state: RolloutState, verb: Verb) -> None:
    """Checks that the rollout can accept the command, also if no controller is running.

    Raises:
        RolloutError: if a newer rollout exists or the rollout has ended.
    """
    latest = store.latest()
    if latest is not None and latest.state.id != state.id:
        raise RolloutError(
            f"cannot {verb} {state.id}: it is not the latest rollout; only {latest.state.id} accepts commands"
        )
    if state.retired:
        raise RolloutError(
            f"cannot {verb} {state.id}: it was promoted and {short_id(state.stable_release)} is no longer kept warm; "
            f"to return to it, run `reelway rollout start {short_id(state.stable_release)}`"
        )
    if state.phase is Phase.ROLLED_BACK:
        raise RolloutError(
            f"cannot {verb} {state.id}: it was rolled back ({state.reason}); "
            f"to retry the release, run `reelway rollout start {short_id(state.canary_release)} --force`"
        )
    if state.phase is Phase.PROMOTED and verb != "rollback":
        raise RolloutError(f"cannot {verb} {state.id}: it was promoted, and a promoted rollout accepts only `rollback`")


def _wait_for_effect(
    store: RolloutStore, rollout_id: str, verb: Verb, number: int, timeout_s: float
) -> RolloutExitCode:
    """Waits until the command has taken effect or can no longer take effect."""
    ended = TARGET_PHASES[verb] | {Phase.ROLLED_BACK, Phase.PROMOTED}
    if verb == "rollback":
        ended = TARGET_PHASES[verb]
    rollout_after = wait_until(store, rollout_id, lambda r: r.state.phase in ended, timeout_s=timeout_s)
    _raise_rejection(store, rollout_after, verb, number)
    if rollout_after.state.phase in TARGET_PHASES[verb]:
        print_unwrapped(f"{rollout_id} is {_phase(rollout_after.state)}: {escape(rollout_after.state.reason)}")
        return RolloutExitCode.PROMOTED
    if rollout_after.state.phase not in ended:
        print_unwrapped(
            f"[bold yellow]timeout:[/] {rollout_id} is still {_phase(rollout_after.state)} after {timeout_s:g} s"
        )
        return RolloutExitCode.IN_PROGRESS
    state = rollout_after.state
    print_unwrapped(f"[bold red]{verb} came too late:[/] {rollout_id} is {_phase(state)}: {escape(state.reason)}")
    return exit_code_for(rollout_after.state)


def _print_accepted(rollout: Rollout, command: Command) -> None:
    if rollout.state.command == command:
        print_unwrapped(
            f"not accepted within {ACCEPT_TIMEOUT_S:g} s; the command stays pending, see `reelway rollout status`"
        )
    else:
        print_unwrapped(f"accepted; {rollout.state.id} is {_phase(rollout.state)}: {escape(rollout.state.reason)}")


def _raise_rejection(store: RolloutStore, rollout: Rollout, verb: Verb, number: int) -> None:
    """Raises the controller's rejection recorded after entry ``number``, unless the command has taken effect."""
    if rollout.state.phase in TARGET_PHASES[verb]:
        return
    for entry in store.history(rollout.state.id):
        if entry.number > number and entry.action == "refuse" and entry.reason.split(" ", 1)[0] in (verb, _noun(verb)):
            raise RolloutError(entry.reason)


def _noun(verb: Verb) -> str:
    return "promotion" if verb == "promote" else verb


def _contradicted_by_pending(state: RolloutState, verb: Verb) -> bool:
    """Returns whether a pending command will change the current phase."""
    return state.command is not None and state.command.verb != verb


def _latest_entry_number(store: RolloutStore, rollout_id: str) -> int:
    return max((entry.number for entry in store.history(rollout_id)), default=0)


def _phase(state: RolloutState) -> str:
    return state.phase.value.replace("_", " ")
