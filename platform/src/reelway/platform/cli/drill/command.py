"""``reelway drill``: a rollback that was never rehearsed is a hope, so rehearse it on the running system.

A release that is known to be bad is rolled out for real, and the very path that would save a real rollout has to find
it. Whatever happens, Ctrl-C included, the drill ends with everybody on stable, or says loudly that it could not.
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

from reelway.platform.cli.processes import child, reelway_command
from reelway.platform.cli.rollout.access import controller_sight, open_store, start_the_controller
from reelway.platform.cli.rollout.place import actor, controller_record, open_run, serving_record, tell
from reelway.platform.cli.rollout.wait import RolloutExit, wait_until
from reelway.platform.cli.terminal import console, out
from reelway.platform.errors import CommandFailedError, ConfigError, RolloutError
from reelway.platform.rollout.state import Command, Phase
from reelway.platform.runs import RunDirectory

if TYPE_CHECKING:
    from reelway.platform.cli.drill.report import DrillReport
    from reelway.platform.rollout.policy import RolloutPolicy
    from reelway.platform.rollout.records import Rollout, RolloutStore

READY_S: Final = 300.0
"""Longest that the bad release may take to come up."""
BACK_S: Final = 60.0
"""Longest that the drill waits at its end for everybody to be on stable."""
PROBE_S: Final = 3.0
ALERT_AFTER_S: Final = 3.0
"""Viewers meet the release for so long before the test alert is sent."""
EXIT_CODES = (
    "Exit codes: 0 caught and rolled back in time, 9 cannot be rehearsed, or not back on stable, 11 not caught in time "
    "and taken back by the drill, 130 Ctrl-C (and taken back)."
)


class Fault(StrEnum):
    """What is wrong with the release that is made."""

    ERRORS = "errors"
    SLOW = "slow"
    WORSE = "worse"


class By(StrEnum):
    """What has to bring the rollback about."""

    EVIDENCE = "evidence"
    ALERT = "alert"


class Output(StrEnum):
    """How the result is printed."""

    TEXT = "text"
    JSON = "json"


@dataclass
class Drill:
    """One drill under way."""

    run: RunDirectory
    store: RolloutStore
    by: By
    fault: str | None
    within_s: float
    traffic_report: Path | None
    exposure: dict[str, int] = field(default_factory=dict)
    alerted_at: float | None = None
    met_at: float | None = None


def register(app: typer.Typer) -> None:
    """Add ``reelway drill``."""
    app.command(epilog=EXIT_CODES)(drill)


def drill(
    run: Path = typer.Option(Path("runs/default"), "--run", help="Run directory; it is being served and has traffic."),
    release: str | None = typer.Option(None, help="A release known to be bad; one is made when absent."),
    fault: Fault = typer.Option(Fault.ERRORS, help="What is wrong with the release that is made."),
    policy: str = typer.Option("drill", help="A policy file, or the name of a policy that ships."),
    by: By = typer.Option(By.EVIDENCE, help="Caught by evidence, or by a test alert sent to the controller."),
    within: float = typer.Option(120.0, min=0, help="Seconds from the first viewer (or the alert) to all on stable."),
    traffic_report: Path | None = typer.Option(None, help="The file that `reelway traffic --report` keeps up to date."),
    output: Output = typer.Option(Output.TEXT, "-o", "--output", help="For people, or for programs."),
) -> None:
    """Rehearse a rollback on the running system with a release that is known to be bad; report how long it took.

    Needs live traffic (`reelway traffic --run RUN`), since without viewers there is no evidence. A few viewers really
    meet the bad release until it is caught. Always ends with everybody on stable.

    Examples:

      reelway drill --run runs/demo

      reelway drill --run runs/demo --fault worse --within 300 -o json

      reelway drill --run runs/demo --release 3f9c --by alert --within 5
    """
    from reelway.platform.cli.drill.report import drill_table
    from reelway.platform.cli.rollout.policy import policy_named

    directory = open_run(run)
    rules = policy_named(policy)
    store = open_store(directory)
    refuse_in_vain(directory, store, by)
    bad = release or make_bad_release(directory, fault)
    kind = None if release else fault.value
    report = rehearse(Drill(directory, store, by, kind, within, traffic_report), bad, rules)
    if output is Output.JSON:
        typer.echo(report.model_dump_json(indent=2))
    else:
        out.print(drill_table(report))
    if not report.on_stable:
        raise RolloutError(f"{report.rollout} is not seen rolled back; look at `reelway rollout status --run {run}`")
    raise typer.Exit(0 if report.passed else int(RolloutExit.UNDER_WAY))


def refuse_in_vain(run: RunDirectory, store: RolloutStore, by: By) -> None:
    """Refuse what could not end well before anything is moved.

    Raises:
        RolloutError: the run is not served, has no controller, a rollout under way, or no traffic.
    """
    serving, latest = serving_record(run), store.latest()
    if serving is None:
        raise RolloutError(f"{run.path} is not being served; start it with `reelway serve --run {run.path}`")
    sighting = store.sighting(latest.state.id) if latest else None
    if silent := controller_sight(run, latest, sighting, time.time()).problem:
        raise RolloutError(f"{silent}: {start_the_controller(run)}")
    if latest is not None and latest.state.active:
        raise RolloutError(f"rollout {latest.state.id} is {latest.state.phase.value}; a drill waits until it has ended")
    if by is By.EVIDENCE and not has_traffic(serving.url):
        raise RolloutError(
            f"{serving.url} had no request within {PROBE_S:g} s, and without viewers there is no evidence; start "
            f"`reelway traffic --run {run.path}` in another terminal, or rehearse an alert with --by alert"
        )


def has_traffic(url: str) -> bool:
    """Whether the service's count of requests grows.

    Raises:
        RolloutError: the service doesn't answer.
    """
    before, deadline = requests_of(url), time.monotonic() + PROBE_S
    while time.monotonic() < deadline:
        time.sleep(0.25)
        if requests_of(url) > before:
            return True
    return False


def requests_of(url: str) -> float:
    """Requests that the service has counted.

    Raises:
        RolloutError: it doesn't answer.
    """
    from prometheus_client.parser import text_string_to_metric_families

    from reelway.platform.rollout.series import REQUESTS

    try:
        answer = httpx.get(f"{url}/metrics", timeout=10).raise_for_status()
    except httpx.HTTPError as error:
        raise RolloutError(f"no metrics from {url}/metrics: {error}; is it being served?") from error
    families = text_string_to_metric_families(answer.text)
    return sum(sample.value for family in families for sample in family.samples if sample.name == REQUESTS)


def make_bad_release(run: RunDirectory, fault: Fault) -> str:
    """The id of a new release with that fault, made by ``reelway release rehearse``.

    Raises:
        CommandFailedError: it could not be made.
        ConfigError: the command printed no id.
    """
    log = run.path / "rollout" / "rehearse.log"
    command = ["release", "rehearse", fault.value, "--run", str(run.path)]
    tell(f"$ reelway {escape(' '.join(command))}")
    with (
        console.status("making a release that is bad on purpose"),
        child(reelway_command(*command), log=log) as process,
    ):
        code = process.wait()
    text = log.read_text(errors="replace")
    if code:
        tell(escape(text[-2000:]))
        raise CommandFailedError(["reelway", *command], code)
    found = re.findall(r"\b[0-9a-f]{64}\b", text)
    if not found:
        raise ConfigError(f"{log}: saw no release id, expected one of 64 hex digits; give one with --release")
    return str(found[-1])


def rehearse(drill: Drill, release: str, policy: RolloutPolicy) -> DrillReport:
    """Roll the release out, wait for the rollback, end on stable however it went, and report."""
    from reelway.platform.cli.drill.report import drill_report
    from reelway.platform.cli.rollout.start import DRILL_PREFIX, start_rollout

    store, before = drill.store, read_traffic(drill.traffic_report)
    note = f"drill, to be caught by {drill.by.value} within {drill.within_s:g} s"
    rollout = start_rollout(drill.run, store, release, policy, force=True, note=note, prefix=DRILL_PREFIX)
    try:
        with back_to_stable(drill, rollout.state.id):
            follow(drill, rollout.state.id)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    after = read_traffic(drill.traffic_report)
    return drill_report(
        store.get(rollout.state.id),
        store.history(rollout.state.id),
        fault=drill.fault,
        by=drill.by.value,
        within_s=drill.within_s,
        exposure=drill.exposure,
        alerted_at=drill.alerted_at,
        traffic=(after[0] - before[0], after[1] - before[1]) if before and after else None,
    )


def follow(drill: Drill, rollout_id: str) -> None:
    """Wait for the rollback, printing what is decided; send the test alert when it is its time."""
    from reelway.platform.cli.rollout.follow import PlainLines

    lines, store = PlainLines(console.print), drill.store

    def seen(rollout: Rollout) -> None:
        lines.decisions(store.history(rollout_id), len(rollout.policy.steps))
        sighting = store.sighting(rollout_id)
        if sighting is not None and sighting.evidence.get("exposure", {}).get("viewers"):
            drill.exposure = dict(sighting.evidence["exposure"])
        if rollout.state.canary_bp and drill.met_at is None:
            drill.met_at = time.time()

    def over(rollout: Rollout) -> bool:
        now = time.time()
        alert_due = drill.by is By.ALERT and drill.alerted_at is None and drill.met_at is not None
        if alert_due and drill.met_at is not None and now - drill.met_at >= ALERT_AFTER_S:
            drill.alerted_at = send_alert(drill.run, rollout)
        since = drill.met_at if drill.by is By.EVIDENCE else drill.alerted_at
        late = since is not None and now - since > drill.within_s
        return late or rollout.state.phase in (Phase.ROLLED_BACK, Phase.PROMOTING, Phase.PROMOTED)

    timeout_s = READY_S + drill.within_s + ALERT_AFTER_S
    wait_until(store, rollout_id, over, timeout_s=timeout_s, each=seen)


@contextmanager
def back_to_stable(drill: Drill, rollout_id: str) -> Iterator[None]:
    """However the block is left, take the rollout back and wait until everybody is on stable."""
    store = drill.store
    try:
        yield
    finally:
        state = store.get(rollout_id).state
        if state.phase not in (Phase.ROLLED_BACK, Phase.ROLLING_BACK):
            tell("[bold yellow]the drill takes its release back[/]")
            command = Command(id=uuid.uuid4().hex, verb="rollback", actor=actor(), note="the drill is over")
            store.ask(rollout_id, command)
        rolled_back = wait_until(
            store, rollout_id, lambda r: r.state.phase is Phase.ROLLED_BACK, timeout_s=BACK_S
        ).state.phase
        if rolled_back is not Phase.ROLLED_BACK:
            tell(f"[bold red]NOT ON STABLE:[/] {rollout_id} is {rolled_back.value}; {start_the_controller(drill.run)}")
        if drill.alerted_at is not None:
            deliver(drill.run, store.get(rollout_id), drill.alerted_at, "resolved")


def send_alert(run: RunDirectory, rollout: Rollout) -> float:
    """Send a firing test alert for the release; the moment that it started at.

    Raises:
        RolloutError: the controller did not take it.
    """
    moment = time.time()
    tell("sending the test alert")
    deliver(run, rollout, moment, "firing")
    return moment


def deliver(run: RunDirectory, rollout: Rollout, starts_at: float, status: str) -> None:
    """Alertmanager's delivery, as its webhook makes it, with the run's own token.

    Raises:
        RolloutError: the controller did not take it.
    """
    from reelway.platform.rollout.control.controller_service import WEBHOOK_TOKEN
    from reelway.platform.rollout.control.webhook import ALERTS_PATH

    record = controller_record(run)
    if record is None:
        raise RolloutError(f"no controller runs for this run: {start_the_controller(run)}")
    labels = {"alertname": "ReelwayDrill", "release": rollout.state.canary_release[:12], "rollout": rollout.state.id}
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
        raise RolloutError(f"the controller at {record.url} did not take the test alert: {error}") from error
    if not answer.is_success:
        raise RolloutError(f"the controller at {record.url} refused the test alert: {answer.status_code} {answer.text}")


def read_traffic(path: Path | None) -> tuple[int, int] | None:
    """Requests and failed ones so far, of a traffic report; None when none was asked for.

    Raises:
        ConfigError: it is not one.
    """
    if path is None:
        return None
    try:
        seen = json.loads(path.read_text())
        return int(seen["requests"]), int(seen["failed"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: {error!r}, expected the file that `reelway traffic --report {path}` keeps up to date"
        ) from error
