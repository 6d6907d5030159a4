"""Rollouts of ``reelway demo``: one good and three bad releases under simulated traffic.

Each step runs a ``reelway`` command. The results come from records: decisions from the rollout store, failed requests
from the traffic report.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from rich.markup import escape
from rich.table import Table

from reelway.platform.cli.demo.demo_progress import DemoProgress
from reelway.platform.cli.processes import child_process, reelway_command, run_command
from reelway.platform.cli.rollout.location import serving_record
from reelway.platform.cli.rollout.store_access import open_store
from reelway.platform.cli.terminal import print_status, stderr_console, stdout_console
from reelway.platform.contracts.ids import short_id
from reelway.platform.errors import CommandFailedError, ConfigError, RolloutError
from reelway.platform.run_directory import RunDirectory

if TYPE_CHECKING:
    from reelway.platform.rollout.records import HistoryEntry, Rollout

REQUESTS_PER_S: Final = 20
"""Traffic of the demo: about a third of what two cores can serve, so that a release can start meanwhile."""
PARITY_RATIO: Final = 0.05
PARITY_INTERVAL_S: Final = 5
ROLLOUT_S: Final = 240
"""Maximum duration of one rollout."""
SETTLE_DELAY_S: Final = 2.0
"""The traffic report is at most 1 s old, and the policy's cooldown is 1 s."""
TRAFFIC_START_TIMEOUT_S: Final = 60.0
TRAFFIC_STOP_LIMIT_S: Final = 3.0
_ACCEPTED_EXIT_CODES: Final = (0, 10)
"""Exit codes of ``reelway rollout start --wait``: promoted, rolled back."""


@dataclass(frozen=True)
class RolloutScenario:
    """One rollout of the demo."""

    title: str
    step: str
    """Step of the run whose record contains the release id."""
    fault: str
    expected: str


SCENARIOS: Final = (
    RolloutScenario("Roll out the trained release over popular videos", "release", "none", "promoted"),
    RolloutScenario("Roll out a release that viewers like less", "rehearse-worse", "shuffled labels", "rolled_back"),
    RolloutScenario("Roll out a release that fails", "rehearse-errors", "ranker fails", "rolled_back"),
    RolloutScenario("Roll out a release that is slow", "rehearse-slow", "ranker is slow", "rolled_back"),
)
DRILL_RELEASE_KINDS: Final = ("popular", "worse", "errors", "slow")


@dataclass(frozen=True)
class ScenarioResult:
    """Result of one rollout of the demo."""

    scene: RolloutScenario
    release: str
    end: str
    evidence: str
    weight_bp: int
    viewers: int
    seconds: float
    requests: int
    failed: int

    @property
    def as_expected(self) -> bool:
        """Whether the rollout ended in the expected phase without a failed request."""
        return self.end == self.scene.expected and self.failed == 0


def drill_release_commands(run: RunDirectory, seed: int) -> list[list[str]]:
    """Returns the commands that build the initial release and the bad releases."""
    good = str(run.record("release")["summary"]["release_id"])
    run_options = ["--run", str(run.path), "--base", short_id(good), "--seed", str(seed)]
    return [["release", "rehearse", kind, *run_options] for kind in DRILL_RELEASE_KINDS]


def initial_release(run: RunDirectory) -> str:
    """Returns the release that is served before the first rollout."""
    return _release_of(run, "rehearse-popular")


def archive_previous_rollouts(run: RunDirectory) -> None:
    """Moves the rollouts of an earlier demo aside, so that this demo starts without history.

    Raises:
        ConfigError: if the run is being served and its rollouts are in use.
    """
    if (serving := serving_record(run)) is not None:
        raise ConfigError(f"{run.path} is being served by process {serving.pid}; stop it first (kill {serving.pid})")
    folder = run.path / "rollout"
    if folder.exists():
        archive = run.path / "earlier-rollouts" / f"{datetime.now(UTC):%Y%m%d-%H%M%S}"
        archive.parent.mkdir(exist_ok=True)
        folder.rename(archive)
        print_status(f"rollouts of an earlier demo were moved to {archive}")


def run_scenarios(run: RunDirectory, progress: DemoProgress) -> tuple[list[ScenarioResult], dict[str, Any]]:
    """Runs all scenarios on the running service under traffic. Returns their results and the traffic report."""
    report = run.path / "traffic.json"
    run_option = ["--run", str(run.path)]
    traffic = ["traffic", *run_option, "--rate", str(REQUESTS_PER_S), "--report", str(report)]
    parity = ["features", "parity", *run_option, "--interval", str(PARITY_INTERVAL_S)]
    progress.step("Simulate viewers and replay served features", traffic, parity)
    with ExitStack() as stack:
        stack.enter_context(child_process(reelway_command(*parity), log=run.path / "parity.log", limit_s=2.0))
        stack.enter_context(_traffic(traffic, run.path / "traffic.log", report))
        endings = [_run_scenario(run, scenario, progress, report) for scenario in SCENARIOS]
    return endings, _read(report)


def print_scenario_results(endings: Sequence[ScenarioResult], traffic: dict[str, Any]) -> None:
    """Prints a table of the rollouts and their results.

    ``at`` is the canary's weight at the decision, ``viewers`` its number of viewers, ``s`` the seconds with traffic.
    """
    table = Table(title="rollouts and their results", title_justify="left", box=None, padding=(0, 1, 0, 0))
    right = ("at", "viewers", "s", "failed")
    for column in ("release", "fault", "result", "evidence", *right):
        justify: Literal["left", "right"] = "right" if column in right else "left"
        table.add_column(column, justify=justify, no_wrap=column != "evidence", overflow="fold")
    for one in endings:
        colour = "green" if one.as_expected else "bold red"
        table.add_row(
            short_id(one.release), one.scene.fault, f"[{colour}]{one.end.replace('_', ' ')}[/]",
            escape(one.evidence.replace(", ", "\n")), f"{one.weight_bp / 100:g} %", str(one.viewers),
            f"{one.seconds:.0f}", str(one.failed),
        )  # fmt: skip
    stdout_console.print(table)
    stdout_console.print(
        f"traffic: {traffic['requests']} requests, {traffic['failed']} failed, {traffic['arm_changes']} unexpected arm "
        f"changes; {traffic['outcomes']['sent']} outcomes sent, {traffic['outcomes']['posts_failed']} posts failed",
        highlight=False,
    )


def check_results(endings: Sequence[ScenarioResult], traffic: dict[str, Any]) -> None:
    """Checks that all scenarios ended as expected.

    Raises:
        RolloutError: if one did not; names each deviation.
    """
    wrong = [
        f"{one.scene.step} ended {one.end} with {one.failed} failed requests, expected {one.scene.expected} with none"
        for one in endings
        if not one.as_expected
    ]
    if traffic["failed"] or traffic["outcomes"]["posts_failed"] or traffic["arm_changes"]:
        examples = [*traffic["failures"], *traffic["arm_change_examples"]]
        wrong.append(f"traffic: {'; '.join(examples[:3]) or 'see the traffic report'}")
    if wrong:
        raise RolloutError("the demo did not end as expected: " + "; ".join(wrong))


def _run_scenario(run: RunDirectory, scenario: RolloutScenario, progress: DemoProgress, report: Path) -> ScenarioResult:
    release = _release_of(run, scenario.step)
    command = ["rollout", "start", short_id(release), "--run", str(run.path), "--policy", "demo", "--wait",
               "--timeout", str(ROLLOUT_S)]  # fmt: skip
    progress.step(scenario.title, command)
    before = _read(report)
    with child_process(reelway_command(*command)) as process:
        code = process.wait()
    if code not in _ACCEPTED_EXIT_CODES:
        raise CommandFailedError(reelway_command(*command), code)
    time.sleep(SETTLE_DELAY_S)
    store = open_store(run)
    rollout = store.latest()
    assert rollout is not None
    return scenario_result(scenario, rollout, store.history(rollout.state.id), before, _read(report))


def scenario_result(
    scene: RolloutScenario,
    rollout: Rollout,
    entries: Sequence[HistoryEntry],
    before: dict[str, Any],
    after: dict[str, Any],
) -> ScenarioResult:
    """Derives the result of a rollout from its history and the traffic reports before and after it."""
    release = rollout.state.canary_release
    decided = next((e for e in reversed(entries) if e.action in ("promote", "roll_back")), entries[-1])
    started_at = next((e.time for e in entries if e.action == "step"), decided.time)
    canary = [row for row in after["releases"] if row["release"] == release and row["arm"] == "canary"]
    return ScenarioResult(
        scene=scene,
        release=release,
        end=rollout.state.phase.value,
        evidence=deciding_evidence(decided),
        weight_bp=max((e.canary_bp for e in entries if e.number < decided.number), default=0),
        viewers=sum(row["viewers"] for row in canary),
        seconds=decided.time - started_at,
        requests=after["requests"] - before["requests"],
        failed=after["failed"] - before["failed"],
    )


def deciding_evidence(decision: HistoryEntry) -> str:
    """Returns the breached guardrails and harmed metrics behind a rollback, or the grounds of a promotion."""
    evidence = decision.evidence
    bad = [g["name"] for g in evidence.get("guardrails", ()) if g["state"] == "bad"]
    harms = [o["label"] for o in evidence.get("outcomes", ()) if o["finding"] == "harm_established"]
    if bad or harms:
        return ", ".join([*bad, *harms])
    if decision.action == "promote":
        return "harm excluded"
    return decision.reason[:60]


@contextmanager
def _traffic(command: Sequence[str], log: Path, report: Path) -> Iterator[None]:
    report.unlink(missing_ok=True)
    with child_process(reelway_command(*command), log=log, limit_s=TRAFFIC_STOP_LIMIT_S) as process:
        deadline = time.monotonic() + TRAFFIC_START_TIMEOUT_S
        with stderr_console.status(f"waiting for the first viewers (log: {log})"):
            while not report.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise CommandFailedError(["reelway", *command], process.poll() or 1)
                time.sleep(0.1)
        yield


def _release_of(run: RunDirectory, step: str) -> str:
    return str(run.record(step)["summary"]["release_id"])


def _read(report: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def build_drill_releases(commands: Sequence[Sequence[str]]) -> None:
    """Builds the releases sequentially."""
    for command in commands:
        run_command(reelway_command(*command))
