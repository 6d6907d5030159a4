"""``reelway drill``: rolls out a known-bad release on the running service to test detection and rollback.

The drill uses the same evidence, alerts and controller as a real rollout. However it ends, also after Ctrl-C, all
traffic is back on stable; if that fails, the command prints an error and exits with code 9.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final

import httpx
import typer
from rich.markup import escape

from reelway.platform.cli.processes import child_process, reelway_command
from reelway.platform.cli.rollout.location import (
    controller_record,
    current_user,
    open_run,
    print_unwrapped,
    serving_record,
)
from reelway.platform.cli.rollout.store_access import controller_start_hint, controller_status, open_store
from reelway.platform.cli.rollout.wait import RolloutExitCode, wait_until
from reelway.platform.cli.terminal import stderr_console, stdout_console
from reelway.platform.contracts.ids import short_id
from reelway.platform.errors import CommandFailedError, ConfigError, RolloutError
from reelway.platform.rollout.state import Command, Phase
from reelway.platform.run_directory import RunDirectory

if TYPE_CHECKING:
    from reelway.platform.cli.drill.report import DrillReport
    from reelway.platform.rollout.policy import RolloutPolicy
    from reelway.platform.rollout.records import Rollout, RolloutStore

READY_TIMEOUT_S: Final = 300.0
"""Maximum time for the bad release to start."""
ROLLBACK_TIMEOUT_S: Final = 60.0
"""Maximum time at the end of the drill until all traffic is on stable."""
INTERRUPTED_ROLLBACK_TIMEOUT_S: Final = 10.0
"""The same after a stop signal. The controller completes a rollback that takes longer."""
TRAFFIC_PROBE_S: Final = 3.0
ALERT_DELAY_S: Final = 3.0
"""Exposure of viewers to the release before the test alert is sent."""
EXIT_CODES = (
    "Exit codes: 0 detected and rolled back in time, 9 preconditions not met or traffic not back on stable, 11 not "
    "detected in time and rolled back by the drill, 130 Ctrl-C (rolled back)."
)


class Fault(StrEnum):
    """The fault in the bad release."""

    ERRORS = "errors"
    SLOW = "slow"
    WORSE = "worse"


class DetectedBy(StrEnum):
    """What must trigger the rollback."""

    EVIDENCE = "evidence"
    ALERT = "alert"


class TextOrJson(StrEnum):
    """Output format of the command."""

    TEXT = "text"
    JSON = "json"


@dataclass
class Drill:
    """A drill in progress."""

    run: RunDirectory
    store: RolloutStore
    by: DetectedBy
    fault: str | None
    deadline_s: float
    traffic_report: Path | None
    exposure: dict[str, int] = field(default_factory=dict)
    alerted_at: float | None = None
    first_exposure_at: float | None = None


def register(app: typer.Typer) -> None:
    """Adds ``reelway drill``."""
    app.command(epilog=EXIT_CODES)(drill)


def drill(
    run: Path = typer.Option(Path("runs/default"), "--run", help="Run directory of a service that has traffic."),
    release: str | None = typer.Option(None, help="Id of a known-bad release. Default: a release built with --fault."),
    fault: Fault = typer.Option(Fault.ERRORS, help="Fault of the bad release to build; ignored with --release."),
    policy: str = typer.Option("drill", help="Policy file, or name of a built-in policy: default, demo, drill."),
    detected_by: DetectedBy = typer.Option(
        DetectedBy.EVIDENCE,
        "--detected-by",
        help="Trigger of the rollback: evidence, or a test alert sent to the controller.",
    ),
    deadline: float = typer.Option(
        120.0, "--deadline", min=0,
        help="Maximum seconds from the first exposure (or the alert) until all traffic is on stable.",
    ),
    traffic_report: Path | None = typer.Option(
        None, help="File that `reelway traffic --report` writes. Adds numbers of requests and failures to the report."
    ),
    output: TextOrJson = typer.Option(TextOrJson.TEXT, "-o", "--output", help="Output format: text or json."),
) -> None:  # fmt: skip
    """Test a rollback on the running service with a known-bad release and report how long it took.

    Requires live traffic (`reelway traffic --run RUN`): without viewers there is no evidence. A few viewers get the bad
    release until it is detected. All traffic is on stable afterwards.

    Examples:

      reelway drill --run runs/demo

      reelway drill --run runs/demo --fault worse --deadline 300 -o json

      reelway drill --run runs/demo --release 3f9c --detected-by alert --deadline 5
    """
    from reelway.platform.cli.drill.report import drill_table
    from reelway.platform.cli.rollout.policy_commands import policy_named

    directory = open_run(run)
    rules = policy_named(policy)
    store = open_store(directory)
    check_preconditions(directory, store, detected_by)
    bad = release or make_bad_release(directory, fault)
    kind = None if release else fault.value
    report = run_drill(Drill(directory, store, detected_by, kind, deadline, traffic_report), bad, rules)
    if output is TextOrJson.JSON:
        typer.echo(report.model_dump_json(indent=2))
    else:
        stdout_console.print(drill_table(report))
    if not report.on_stable:
        raise RolloutError(f"{report.rollout}: traffic is not back on stable; see `reelway rollout status --run {run}`")
    raise typer.Exit(0 if report.passed else int(RolloutExitCode.IN_PROGRESS))


def check_preconditions(run: RunDirectory, store: RolloutStore, by: DetectedBy) -> None:
    """Checks the preconditions of a drill before any traffic changes.

    Raises:
        RolloutError: if the run is not being served, no controller reconciles it, a rollout is in progress, or there is
            no traffic.
    """
    serving, latest = serving_record(run), store.latest()
    if serving is None:
        raise RolloutError(f"{run.path} is not being served; run `reelway serve --run {run.path}`")
    last_reconcile = store.last_reconcile(latest.state.id) if latest else None
    if problem := controller_status(run, latest, last_reconcile, time.time()).problem:
        raise RolloutError(f"{problem}: {controller_start_hint(run)}")
    if latest is not None and latest.state.active:
        raise RolloutError(f"rollout {latest.state.id} is {latest.state.phase.value}; retry when it has ended")
    if by is DetectedBy.EVIDENCE and not has_traffic(serving.internal_url):
        raise RolloutError(
            f"{serving.url} received no request within {TRAFFIC_PROBE_S:g} s, and without viewers there is no "
            f"evidence; start `reelway traffic --run {run.path}` in another terminal, or test an alert with "
            "--detected-by alert"
        )


def has_traffic(url: str) -> bool:
    """Returns whether the service receives requests within ``TRAFFIC_PROBE_S``.

    Raises:
        RolloutError: if the service does not respond.
    """
    before, deadline = request_count(url), time.monotonic() + TRAFFIC_PROBE_S
    while time.monotonic() < deadline:
        time.sleep(0.25)
        if request_count(url) > before:
            return True
    return False


def request_count(url: str) -> float:
    """Returns the number of requests that the service has counted.

    Raises:
        RolloutError: if the service does not respond.
    """
    from prometheus_client.parser import text_string_to_metric_families

    from reelway.platform.rollout.metric_names import REQUESTS

    try:
        answer = httpx.get(f"{url}/metrics", timeout=10).raise_for_status()
    except httpx.HTTPError as error:
        raise RolloutError(f"{url}/metrics: no metrics: {error}; check that the run is being served") from error
    families = text_string_to_metric_families(answer.text)
    return sum(sample.value for family in families for sample in family.samples if sample.name == REQUESTS)


def make_bad_release(run: RunDirectory, fault: Fault) -> str:
    """Builds a release with a fault by ``reelway release rehearse`` and returns its id.

    Raises:
        CommandFailedError: if the command fails.
        ConfigError: if the command printed no release id.
    """
    log = run.path / "rollout" / "rehearse.log"
    command = ["release", "rehearse", fault.value, "--run", str(run.path)]
    print_unwrapped(f"$ reelway {escape(' '.join(command))}")
    with (
        stderr_console.status("building a bad release"),
        child_process(reelway_command(*command), log=log, limit_s=10.0) as process,
    ):
        code = process.wait()
    text = log.read_text(errors="replace")
    if code:
        print_unwrapped(escape(text[-2000:]))
        raise CommandFailedError(["reelway", *command], code)
    found = re.findall(r"\b[0-9a-f]{64}\b", text)
    if not found:
        raise ConfigError(f"{log}: no release id found, expected 64 hex digits; give a release with --release")
    return str(found[-1])


def run_drill(drill: Drill, release: str, policy: RolloutPolicy) -> DrillReport:
    """Rolls out the release, waits for the rollback, makes sure that all traffic is on stable, and reports."""
    from reelway.platform.cli.drill.report import drill_report
    from reelway.platform.cli.rollout.start import DRILL_PREFIX, start_rollout

    store, before = drill.store, read_traffic_report(drill.traffic_report)
    note = f"drill, detection by {drill.by.value} within {drill.deadline_s:g} s"
    rollout = start_rollout(drill.run, store, release, policy, force=True, note=note, prefix=DRILL_PREFIX)
    try:
        with ensure_rolled_back(drill, rollout.state.id):
            wait_for_rollback(drill, rollout.state.id)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    after = read_traffic_report(drill.traffic_report)
    return drill_report(
        store.get(rollout.state.id),
        store.history(rollout.state.id),
        fault=drill.fault,
        by=drill.by.value,
        within_s=drill.deadline_s,
        exposure=drill.exposure,
        alerted_at=drill.alerted_at,
        traffic=(after[0] - before[0], after[1] - before[1]) if before and after else None,
    )


def wait_for_rollback(drill: Drill, rollout_id: str) -> None:
    """Waits for the rollback, prints the decisions, and sends the test alert after ``ALERT_DELAY_S``."""
    from reelway.platform.cli.rollout.watch import PlainOutput

    lines, store = PlainOutput(stderr_console.print), drill.store

    def record_progress(rollout: Rollout) -> None:
        lines.decisions(store.history(rollout_id), len(rollout.policy.steps))
        last_reconcile = store.last_reconcile(rollout_id)
        if last_reconcile is not None and last_reconcile.evidence.get("exposure", {}).get("viewers"):
            drill.exposure = dict(last_reconcile.evidence["exposure"])
        if rollout.state.canary_bp and drill.first_exposure_at is None:
            drill.first_exposure_at = time.time()

    def is_over(rollout: Rollout) -> bool:
        now = time.time()
        alert_due = drill.by is DetectedBy.ALERT and drill.alerted_at is None and drill.first_exposure_at is not None
        if alert_due and drill.first_exposure_at is not None and now - drill.first_exposure_at >= ALERT_DELAY_S:
            drill.alerted_at = send_alert(drill.run, rollout)
        since = drill.first_exposure_at if drill.by is DetectedBy.EVIDENCE else drill.alerted_at
        late = since is not None and now - since > drill.deadline_s
        return late or rollout.state.phase in (Phase.ROLLED_BACK, Phase.PROMOTING, Phase.PROMOTED)

    timeout_s = READY_TIMEOUT_S + drill.deadline_s + ALERT_DELAY_S
    wait_until(store, rollout_id, is_over, timeout_s=timeout_s, on_change=record_progress)


@contextmanager
def ensure_rolled_back(drill: Drill, rollout_id: str) -> Iterator[None]:
    """Rolls back when the block is left for any reason, and waits until all traffic is on stable."""
    store, timeout_s = drill.store, ROLLBACK_TIMEOUT_S
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        timeout_s = INTERRUPTED_ROLLBACK_TIMEOUT_S
        raise
    finally:
        state = store.get(rollout_id).state
        if state.phase not in (Phase.ROLLED_BACK, Phase.ROLLING_BACK):
            print_unwrapped("[bold yellow]the drill rolls its release back[/]")
            command = Command(id=uuid.uuid4().hex, verb="rollback", actor=current_user(), note="the drill is over")
            store.submit_command(rollout_id, command)
        rolled_back = wait_until(
            store, rollout_id, lambda r: r.state.phase is Phase.ROLLED_BACK, timeout_s=timeout_s
        ).state.phase
        if rolled_back is not Phase.ROLLED_BACK:
            print_unwrapped(
                f"[bold red]NOT ON STABLE:[/] {rollout_id} is {rolled_back.value}; {controller_start_hint(drill.run)}"
            )
        if drill.alerted_at is not None:
            post_alert(drill.run, store.get(rollout_id), drill.alerted_at, "resolved")


def send_alert(run: RunDirectory, rollout: Rollout) -> float:
    """Sends a firing test alert for the release and returns its start time.

    Raises:
        RolloutError: if the controller did not accept the alert.
    """
    moment = time.time()
    print_unwrapped("sending the test alert")
    post_alert(run, rollout, moment, "firing")
    return moment


def post_alert(run: RunDirectory, rollout: Rollout, starts_at: float, status: str) -> None:
    """Posts an alert to the controller's webhook as Alertmanager does, with the run's token.

    Raises:
        RolloutError: if the controller did not accept the alert.
    """
    from reelway.platform.rollout.control.local_controller import WEBHOOK_TOKEN
    from reelway.platform.rollout.control.webhook import ALERTS_PATH

    record = controller_record(run)
    if record is None:
        raise RolloutError(f"no controller is running for this run: {controller_start_hint(run)}")
    labels = {
        "alertname": "ReelwayDrill",
        "release": short_id(rollout.state.canary_release),
        "rollout": rollout.state.id,
    }
    alert = {
        "status": status,
        "labels": labels,
        "annotations": {"summary": "a test alert of `reelway drill`"},
        "startsAt": datetime.fromtimestamp(starts_at, UTC).isoformat(),
    }
    body = {"version": "4", "groupKey": f"drill:{rollout.state.id}", "status": status, "alerts": [alert]}
    token = (run.keys / WEBHOOK_TOKEN).read_text().strip()
    try:
        answer = httpx.post(
            f"{record.url}{ALERTS_PATH}", json=body, headers={"Authorization": f"Bearer {token}"}, timeout=10
        )
    except httpx.HTTPError as error:
        raise RolloutError(f"cannot send the test alert to the controller at {record.url}: {error}") from error
    if not answer.is_success:
        raise RolloutError(
            f"the controller at {record.url} rejected the test alert: {answer.status_code} {answer.text}"
        )


def read_traffic_report(path: Path | None) -> tuple[int, int] | None:
    """Returns the requests and failed requests of a traffic report; None without a path.

    Raises:
        ConfigError: if the file is not a traffic report.
    """
    if path is None:
        return None
    try:
        report = json.loads(path.read_text())
        return int(report["requests"]), int(report["failed"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: not a traffic report: {error!r}; expected the file that `reelway traffic --report {path}` writes"
        ) from error
