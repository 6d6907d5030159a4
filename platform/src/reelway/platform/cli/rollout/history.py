"""``reelway rollout history`` and ``explain``: prints decisions with their verbatim reasons and their evidence."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import typer
from rich.markup import escape

from reelway.platform.cli.rollout.explain import Explanation, decision_point, explain, latest_deciding_entry
from reelway.platform.cli.rollout.intervals import labelled_line
from reelway.platform.cli.rollout.location import print_unwrapped
from reelway.platform.cli.rollout.views import format_utc_time
from reelway.platform.cli.rollout.wait import RolloutExitCode, exit_code_for
from reelway.platform.cli.terminal import stdout_console
from reelway.platform.contracts.ids import short_id
from reelway.platform.errors import RolloutError

if TYPE_CHECKING:
    from reelway.platform.rollout.records import HistoryEntry, Rollout, RolloutStore

INDENT: Final = 6
RESULT_STYLES: Final = {
    RolloutExitCode.PROMOTED: "bold green",
    RolloutExitCode.ROLLED_BACK: "bold red",
    RolloutExitCode.PAUSED: "bold yellow",
    RolloutExitCode.IN_PROGRESS: "bold blue",
}


def print_history(store: RolloutStore, rollout: Rollout, *, as_json: bool) -> None:
    """Prints the decisions of one rollout, oldest first."""
    entries = store.history(rollout.state.id)
    if as_json:
        typer.echo(json.dumps([entry.model_dump(mode="json") for entry in entries], indent=2))
        return
    state = rollout.state
    releases = f"{short_id(state.canary_release)} over {short_id(state.stable_release)}"
    stdout_console.print(
        f"{state.id}   {releases}   {exit_code_for(state).description}",
        highlight=False,
    )
    for entry in entries:
        phase, action = entry.phase.replace("_", " "), entry.action.replace("_", " ")
        time = format_utc_time(entry.time)
        head = f"[bold]{entry.number:>4}[/]  {time} UTC  {phase}, canary {entry.canary_bp / 100:g} %"
        stdout_console.print(f"{head}  [bold]{action}[/]", highlight=False)
        stdout_console.print(_indented(entry.reason), highlight=False)
    print_unwrapped("evidence of a decision: reelway rollout explain --entry NUMBER")


def print_all(store: RolloutStore, *, as_json: bool) -> None:
    """Prints all rollouts, oldest first; as JSON with their decisions."""
    rollouts = store.all()
    if as_json:
        typer.echo(json.dumps([_rollout_with_history(store, rollout) for rollout in rollouts], indent=2))
        return
    for rollout in rollouts:
        state, result = rollout.state, exit_code_for(rollout.state)
        stdout_console.print(
            f"[bold]{state.id}[/]  {format_utc_time(state.started_at)[:16]}  {short_id(state.canary_release)} over "
            f"{short_id(state.stable_release)}  [{RESULT_STYLES[result]}]{result.description}[/]",
            highlight=False,
        )
        stdout_console.print(_indented(state.reason), highlight=False)


def _indented(text: str) -> str:
    return escape(
        textwrap.fill(text, stdout_console.width, initial_indent=" " * INDENT, subsequent_indent=" " * INDENT)
    )


def _rollout_with_history(store: RolloutStore, rollout: Rollout) -> dict[str, Any]:
    entries = [entry.model_dump(mode="json") for entry in store.history(rollout.state.id)]
    return {"rollout": rollout.state.model_dump(mode="json"), "result": exit_code_for(rollout.state).description,
            "history": entries}  # fmt: skip


def load_explanation(store: RolloutStore, rollout: Rollout, number: int | None) -> Explanation:
    """Returns the explanation of a history entry.

    Without ``number``: the last reconcile of an active rollout, or the decision that ended the rollout.

    Raises:
        RolloutError: if there is no such entry, or no decision yet.
    """
    state, entries = rollout.state, store.history(rollout.state.id)
    decision: Any = _entry(entries, number, state.id) if number is not None else None
    if decision is None and state.active:
        decision = store.last_reconcile(state.id)
    if decision is None:
        decision = latest_deciding_entry(entries)
    if decision is None:
        raise RolloutError(f"{state.id}: no decision yet; check that `reelway rollout controller` is running")
    return explain(decision_point(decision, step=state.step, phase=state.phase.value), rollout.policy)


def print_explanation(explanation: Explanation) -> None:
    which = f"decision {explanation.entry}" if explanation.entry is not None else "last reconcile"
    action = explanation.action.replace("_", " ")
    time = format_utc_time(explanation.time)
    stdout_console.print(f"[bold]{explanation.rollout}[/], {which} at {time} UTC: [bold]{action}[/]", highlight=False)
    sections: tuple[tuple[str, Sequence[str]], ...] = (
        ("why", [explanation.reason]),
        ("numbers", explanation.numbers),
        ("otherwise", explanation.otherwise),
        ("policy", explanation.policy),
    )
    for label, lines in sections:
        for i, line in enumerate(lines):
            stdout_console.print(labelled_line(label if i == 0 else "", "bold", line, stdout_console.width))


def _entry(entries: Sequence[HistoryEntry], number: int, rollout_id: str) -> HistoryEntry:
    for entry in entries:
        if entry.number == number:
            return entry
    known = f"{entries[0].number}..{entries[-1].number}" if entries else "none"
    raise RolloutError(
        f"{rollout_id}: no history entry {number}; existing entries: {known} (`reelway rollout history`)"
    )
