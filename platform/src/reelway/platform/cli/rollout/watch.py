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

from reelway.platform.cli.rollout.location import RolloutLocation, location_flags, serving_record
from reelway.platform.cli.rollout.status_report import StatusReport, build_rollout_report
from reelway.platform.cli.rollout.store_access import controller_start_hint, controller_status, find_rollout
from reelway.platform.cli.rollout.views import status_view
from reelway.platform.cli.rollout.wait import RolloutExitCode, exit_code_for, poll_times
from reelway.platform.rollout.state import Phase

if TYPE_CHECKING:
    from reelway.platform.rollout.records import HistoryEntry, RolloutStore

REDRAW_INTERVAL_S: Final = 0.25
READ_INTERVAL_S: Final = 1.0
"""Seconds after which plain output reads a store that has not changed, to notice a controller that has stopped."""
REMINDER_INTERVAL_S: Final = 15.0
"""Minimum interval between two plain lines about what the rollout waits for: its numbers change on every reconcile."""
TERMINAL_PHASES: Final = frozenset({Phase.PROMOTED, Phase.ROLLED_BACK})


def read_status(run: RolloutLocation, store: RolloutStore, rollout_id: str | None) -> StatusReport:
    """Returns the current status.

    Raises:
        RolloutError: if an id is given and there is no such rollout.
    """
    now = time.time()
    rollout = store.get(rollout_id) if rollout_id else store.latest()
    last_reconcile = store.last_reconcile(rollout.state.id) if rollout else None
    report = build_rollout_report(rollout, last_reconcile, store.history(rollout.state.id), now) if rollout else None
    return StatusReport(
        run=location_flags(run).removeprefix("--run "),
        time=now,
        serving=serving_record(run),
        controller=controller_status(run, rollout, last_reconcile, now),
        rollout=report,
    )


def watch_rollout(
    run: RolloutLocation, store: RolloutStore, rollout_id: str | None, console: Console, *, timeout_s: float | None
) -> RolloutExitCode:
    """Shows the rollout until it has ended or the timeout has passed.

    Raises:
        RolloutError: if there is no such rollout.
    """
    full_id = find_rollout(store, rollout_id).state.id
    if not console.is_terminal:
        return watch_plain(run, store, full_id, console.print, timeout_s=timeout_s, until=TERMINAL_PHASES)
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        for _ in poll_times(timeout_s, every_s=REDRAW_INTERVAL_S):
            report = read_status(run, store, full_id)
            live.update(status_view(report, width=console.width, height=console.height - 1), refresh=True)
            if report.rollout is not None and report.rollout.phase in TERMINAL_PHASES:
                break
    return exit_code_for(store.get(full_id).state)


def watch_plain(
    run: RolloutLocation,
    store: RolloutStore,
    rollout_id: str,
    write: Callable[..., None],
    *,
    timeout_s: float | None,
    until: frozenset[Phase],
) -> RolloutExitCode:
    """Prints one line per decision, and occasionally what the rollout waits for.

    Returns at a phase of ``until`` or at the timeout.
    """
    printer, shown, revision, read_at = PlainOutput(write), None, None, 0.0
    for _ in poll_times(timeout_s, every_s=REDRAW_INTERVAL_S):
        now, newest = time.time(), store.revision()
        if newest == revision and abs(now - read_at) < READ_INTERVAL_S:
            continue
        revision, read_at = newest, now
        rollout, last_reconcile = store.get(rollout_id), store.last_reconcile(rollout_id)
        if rollout != shown:  # a decision changes the rollout; most reconciles decide nothing
            shown = rollout
            printer.decisions(store.history(rollout_id), len(rollout.policy.steps))
        controller = controller_status(run, rollout, last_reconcile, now)
        printer.controller_silent(controller.problem and f"{controller.problem}: {controller_start_hint(run)}", now)
        if last_reconcile is not None and rollout.state.active and last_reconcile.action in ("wait", "hold"):
            printer.waiting(last_reconcile.reason, now)
        if rollout.state.phase in until:
            break
    return exit_code_for(store.get(rollout_id).state)


class PlainOutput:
    """Prints status changes as plain lines and omits what was printed before."""

    def __init__(self, write: Callable[..., None]) -> None:
        self._write = write
        self._number = 0
        self._waiting = ""
        self._reminded_at = 0.0
        self._controller_problem = ""

    def decisions(self, history: Sequence[HistoryEntry], steps: int) -> None:
        for entry in history:
            if entry.number > self._number:
                self._number = entry.number
                self._line(entry.time, entry_line(entry, steps))

    def waiting(self, reason: str, now: float) -> None:
        if now - self._reminded_at >= REMINDER_INTERVAL_S and reason != self._waiting:
            self._waiting, self._reminded_at = reason, now
            self._line(now, f"waiting: {reason}")

    def controller_silent(self, problem: str, now: float) -> None:
        """Prints when the controller becomes unresponsive and when it recovers."""
        if bool(problem) != bool(self._controller_problem):
            self._line(now, f"WARNING: {problem}" if problem else "the controller is reconciling again")
        self._controller_problem = problem

    def _line(self, at: float, text: str) -> None:
        stamp = f"{datetime.fromtimestamp(at, UTC):%H:%M:%S}Z"
        self._write(f"{stamp} {text}", markup=False, highlight=False, soft_wrap=True)


def entry_line(entry: HistoryEntry, steps: int) -> str:
    """Returns a decision as one line: phase, step, weight, action, reason."""
    phase = entry.phase.replace("_", " ")
    step = f" step {entry.step + 1} of {steps}" if entry.step >= 0 else ""
    return f"{phase}{step}, canary {entry.canary_bp / 100:g} %: {entry.action.replace('_', ' ')}: {entry.reason}"
