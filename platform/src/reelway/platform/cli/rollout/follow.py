"""``reelway rollout status`` and ``watch``: shows the stored state of a rollout.

``watch`` polls the store. On a terminal it redraws the view in place; otherwise it prints one plain line per change.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.live import Live

from reelway.platform.cli.rollout.access import controller_sight, rollout_of, start_the_controller
from reelway.platform.cli.rollout.place import Place, flags_of, serving_record
from reelway.platform.cli.rollout.report import StatusReport, report_rollout
from reelway.platform.cli.rollout.views import status_view
from reelway.platform.cli.rollout.wait import RolloutExit, exit_of, moments
from reelway.platform.rollout.state import Phase

if TYPE_CHECKING:
    from reelway.platform.rollout.records import HistoryEntry, RolloutStore

REDRAW_S: Final = 0.25
REMIND_S: Final = 15.0
"""Minimum interval between two plain lines about what the rollout waits for: its numbers change on every reconcile."""
FINAL: Final = frozenset({Phase.PROMOTED, Phase.ROLLED_BACK})


def look(run: Place, store: RolloutStore, rollout_id: str | None) -> StatusReport:
    """Returns the current status.

    Raises:
        RolloutError: if an id is given and there is no such rollout.
    """
    now = time.time()
    rollout = store.get(rollout_id) if rollout_id else store.latest()
    sighting = store.sighting(rollout.state.id) if rollout else None
    report = report_rollout(rollout, sighting, store.history(rollout.state.id), now) if rollout else None
    return StatusReport(
        run=flags_of(run).removeprefix("--run "),
        time=now,
        serving=serving_record(run),
        controller=controller_sight(run, rollout, sighting, now),
        rollout=report,
    )


def watch_rollout(
    run: Place, store: RolloutStore, rollout_id: str | None, console: Console, *, timeout_s: float | None
) -> RolloutExit:
    """Shows the rollout until it has ended or the timeout has passed.

    Raises:
        RolloutError: if there is no such rollout.
    """
    whole_id = rollout_of(store, rollout_id).state.id
    if not console.is_terminal:
        return follow_lines(run, store, whole_id, console.print, timeout_s=timeout_s, until=FINAL)
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        for _ in moments(timeout_s, every_s=REDRAW_S):
            report = look(run, store, whole_id)
            live.update(status_view(report, width=console.width, height=console.height - 1), refresh=True)
            if report.rollout is not None and report.rollout.phase in FINAL:
                break
    return exit_of(store.get(whole_id).state)


def follow_lines(
    run: Place,
    store: RolloutStore,
    rollout_id: str,
    write: Callable[..., None],
    *,
    timeout_s: float | None,
    until: frozenset[Phase],
) -> RolloutExit:
    """Prints one line per decision, and occasionally what the rollout waits for.

    Returns at a phase of ``until`` or at the timeout.
    """
    printer = PlainLines(write)
    for _ in moments(timeout_s, every_s=REDRAW_S):
        now, rollout, sighting = time.time(), store.get(rollout_id), store.sighting(rollout_id)
        printer.decisions(store.history(rollout_id), len(rollout.policy.steps))
        sight = controller_sight(run, rollout, sighting, now)
        printer.silence(sight.problem and f"{sight.problem}: {start_the_controller(run)}", now)
        if sighting is not None and rollout.state.active and sighting.action in ("wait", "hold"):
            printer.waiting(sighting.reason, now)
        if rollout.state.phase in until:
            break
    return exit_of(store.get(rollout_id).state)


class PlainLines:
    """Prints status changes as plain lines and omits what was printed before."""

    def __init__(self, write: Callable[..., None]) -> None:
        self._write = write
        self._number = 0
        self._waiting = ""
        self._reminded_at = 0.0
        self._silence = ""

    def decisions(self, history: Sequence[HistoryEntry], steps: int) -> None:
        for entry in history:
            if entry.number > self._number:
                self._number = entry.number
                self._line(entry.time, entry_line(entry, steps))

    def waiting(self, reason: str, now: float) -> None:
        if now - self._reminded_at >= REMIND_S and reason != self._waiting:
            self._waiting, self._reminded_at = reason, now
            self._line(now, f"waiting: {reason}")

    def silence(self, problem: str, now: float) -> None:
        """Prints when the controller becomes unresponsive and when it recovers."""
        if bool(problem) != bool(self._silence):
            self._line(now, f"WARNING: {problem}" if problem else "the controller is reconciling again")
        self._silence = problem

    def _line(self, at: float, text: str) -> None:
        stamp = f"{datetime.fromtimestamp(at, UTC):%H:%M:%S}Z"
        self._write(f"{stamp} {text}", markup=False, highlight=False, soft_wrap=True)


def entry_line(entry: HistoryEntry, steps: int) -> str:
    """Returns a decision as one line: phase, step, weight, action, reason."""
    phase = entry.phase.replace("_", " ")
    step = f" step {entry.step + 1} of {steps}" if entry.step >= 0 else ""
    return f"{phase}{step}, canary {entry.canary_bp / 100:g} %: {entry.action.replace('_', ' ')}: {entry.reason}"
