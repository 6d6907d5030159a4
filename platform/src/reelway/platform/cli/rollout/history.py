"""``reelway rollout history`` and ``explain``: prints decisions with their verbatim reasons and their evidence."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import typer
from rich.markup import escape

from reelway.platform.cli.rollout.explain import Explanation, explain, moment_of, newest_deciding
from reelway.platform.cli.rollout.intervals import worded
from reelway.platform.cli.rollout.place import tell
from reelway.platform.cli.rollout.views import clock_of
from reelway.platform.cli.rollout.wait import RolloutExit, exit_of
from reelway.platform.cli.terminal import out
from reelway.platform.contracts.ids import short_id
from reelway.platform.errors import RolloutError

if TYPE_CHECKING:
    from reelway.platform.rollout.records import HistoryEntry, Rollout, RolloutStore

INDENT: Final = 6
RESULT_STYLES: Final = {
    RolloutExit.PROMOTED: "bold green",
    RolloutExit.ROLLED_BACK: "bold red",
    RolloutExit.PAUSED: "bold yellow",
    RolloutExit.IN_PROGRESS: "bold blue",
}


def print_history(store: RolloutStore, rollout: Rollout, *, as_json: bool) -> None:
    """Prints the decisions of one rollout, oldest first."""
    entries = store.history(rollout.state.id)
    if as_json:
        typer.echo(json.dumps([entry.model_dump(mode="json") for entry in entries], indent=2))
        return
    state = rollout.state
    out.print(
        f"{state.id}   {short_id(state.canary_release)} over {short_id(state.stable_release)}   {exit_of(state).words}",
        highlight=False,
    )
    for entry in entries:
        phase, action = entry.phase.replace("_", " "), entry.action.replace("_", " ")
        head = f"[bold]{entry.number:>4}[/]  {clock_of(entry.time)} UTC  {phase}, canary {entry.canary_bp / 100:g} %"
        out.print(f"{head}  [bold]{action}[/]", highlight=False)
        out.print(_indented(entry.reason), highlight=False)
    tell("evidence of a decision: reelway rollout explain --entry NUMBER")


def print_all(store: RolloutStore, *, as_json: bool) -> None:
    """Prints all rollouts, oldest first; as JSON with their decisions."""
    rollouts = store.all()
    if as_json:
        typer.echo(json.dumps([_whole(store, rollout) for rollout in rollouts], indent=2))
        return
    for rollout in rollouts:
        state, result = rollout.state, exit_of(rollout.state)
        out.print(
            f"[bold]{state.id}[/]  {clock_of(state.started_at)[:16]}  {short_id(state.canary_release)} over "
            f"{short_id(state.stable_release)}  [{RESULT_STYLES[result]}]{result.words}[/]",
            highlight=False,
        )
        out.print(_indented(state.reason), highlight=False)


def _indented(text: str) -> str:
    return escape(textwrap.fill(text, out.width, initial_indent=" " * INDENT, subsequent_indent=" " * INDENT))


def _whole(store: RolloutStore, rollout: Rollout) -> dict[str, Any]:
    entries = [entry.model_dump(mode="json") for entry in store.history(rollout.state.id)]
    return {"rollout": rollout.state.model_dump(mode="json"), "result": exit_of(rollout.state).words,
            "history": entries}  # fmt: skip


def explanation_of(store: RolloutStore, rollout: Rollout, number: int | None) -> Explanation:
    """Returns the explanation of a history entry.

    Without ``number``: the last reconcile of an active rollout, or the decision that ended the rollout.

    Raises:
        RolloutError: if there is no such entry, or no decision yet.
    """
    state, entries = rollout.state, store.history(rollout.state.id)
    seen: Any = _entry(entries, number, state.id) if number is not None else None
    if seen is None and state.active:
        seen = store.sighting(state.id)
    if seen is None:
        seen = newest_deciding(entries)
    if seen is None:
        raise RolloutError(f"{state.id}: no decision yet; check that `reelway rollout controller` is running")
    return explain(moment_of(seen, step=state.step, phase=state.phase.value), rollout.policy)


def print_explanation(explanation: Explanation) -> None:
    which = f"decision {explanation.entry}" if explanation.entry is not None else "last reconcile"
    action = explanation.action.replace("_", " ")
    out.print(f"[bold]{explanation.rollout}[/], {which} at {clock_of(explanation.time)} UTC: [bold]{action}[/]",
              highlight=False)  # fmt: skip
    sections: tuple[tuple[str, Sequence[str]], ...] = (
        ("why", [explanation.reason]),
        ("numbers", explanation.numbers),
        ("otherwise", explanation.otherwise),
        ("policy", explanation.policy),
    )
    for word, lines in sections:
        for i, line in enumerate(lines):
            out.print(worded(word if i == 0 else "", "bold", line, out.width))


def _entry(entries: Sequence[HistoryEntry], number: int, rollout_id: str) -> HistoryEntry:
    for entry in entries:
        if entry.number == number:
            return entry
    known = f"{entries[0].number}..{entries[-1].number}" if entries else "none"
    raise RolloutError(
        f"{rollout_id}: no history entry {number}; existing entries: {known} (`reelway rollout history`)"
    )
