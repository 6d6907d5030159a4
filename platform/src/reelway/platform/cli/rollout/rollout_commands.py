"""``reelway rollout``: the commands that start, watch and control rollouts, for people and scripts.

Commands write to the rollout store of a run directory or a namespace; the controller changes the traffic. The table of
exit codes is in ``reelway.platform.cli.rollout.wait``.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer
from rich.markup import escape

from reelway.platform.cli.rollout.location import (
    ClusterNamespace,
    RolloutLocation,
    location_flags,
    open_run,
    print_unwrapped,
    resolve_location,
)
from reelway.platform.cli.rollout.policy_commands import policy_group, policy_named
from reelway.platform.cli.rollout.store_access import controller_start_hint, find_rollout, open_store
from reelway.platform.cli.rollout.wait import RolloutExitCode
from reelway.platform.cli.terminal import stdout_console
from reelway.platform.contracts.ids import short_id

if TYPE_CHECKING:
    from reelway.platform.rollout.state import Verb

EXIT_CODES = (
    "Exit codes: 0 promoted or command completed, 2 usage, 6 release failed verification, 9 command rejected, "
    "10 rolled back, 11 still in progress (at --timeout), 12 paused, 130 Ctrl-C."
)


class TextOrJson(StrEnum):
    """Output format of a command."""

    TEXT = "text"
    JSON = "json"


RUN = typer.Option(Path("runs/default"), "--run", help="Run directory.")
NAMESPACE = typer.Option(
    None, "--namespace", "-n", help="Kubernetes namespace whose rollouts are used instead of those of --run."
)
CONTEXT = typer.Option(
    None, "--context", help="Kubeconfig context; selects the rollouts of its namespace unless --namespace is given."
)
ID = typer.Argument(None, metavar="[ID]", help="Rollout id or unique id prefix. Defaults to the latest rollout.")
OUTPUT = typer.Option(TextOrJson.TEXT, "-o", "--output", help="Output format: text or json.")
NOTE = typer.Option("", help="Reason for the command; recorded in the history.")
WAIT = typer.Option(False, "--wait", help="Wait until the command has taken effect; the exit code is the result.")
TIMEOUT = typer.Option(120.0, min=0, help="Maximum seconds to wait with --wait; then exit with code 11.")
WATCH_TIMEOUT = typer.Option(
    None, min=0, help="Stop waiting after this many seconds and exit with code 11, or 12 if the rollout is paused."
)


def register(app: typer.Typer) -> None:
    """Adds ``reelway rollout ...``."""
    group = typer.Typer(no_args_is_help=True, epilog=EXIT_CODES)
    app.add_typer(group, name="rollout", help="Roll out a release as a canary, watch it, and roll it back.")
    group.command("start", epilog=EXIT_CODES)(start)
    group.command("status", epilog=EXIT_CODES)(status)
    group.command("watch", epilog=EXIT_CODES)(watch)
    for command in (pause, resume, promote, rollback):
        group.command(command.__name__, epilog=EXIT_CODES)(command)
    group.command("history")(history)
    group.command("explain")(explain)
    group.command("controller")(controller)
    group.add_typer(policy_group(), name="policy", help="Show and check rollout policies.")


def start(
    release: str = typer.Argument(..., help="Release id, unique id prefix, or 'latest'."),
    run: Path = RUN,
    namespace: str | None = NAMESPACE,
    context: str | None = CONTEXT,
    policy: str = typer.Option("default", help="Policy file, or name of a built-in policy: default, demo, drill."),
    force: bool = typer.Option(
        False, "--force", help="Start despite a cooldown or an earlier rollback of this release."
    ),
    wait: bool = typer.Option(
        False, "--wait", help="Wait until the rollout has ended or is paused, and exit with the code of its result."
    ),
    timeout: float | None = WATCH_TIMEOUT,
    note: str = NOTE,
    ray_service: str | None = typer.Option(
        None,
        help="RayService to roll out on, with --namespace. Default: that of the latest rollout, else the only one.",
    ),
    serve_api: str | None = typer.Option(
        None, help="URL of the Ray dashboard of a Ray Serve without KubeRay; requires --namespace and --serve-url."
    ),
    serve_url: str | None = typer.Option(
        None, help="URL of the router of a Ray Serve without KubeRay; requires --namespace and --serve-api."
    ),
) -> None:
    """Roll out a release: verify it and store the rollout; the controller then shifts the traffic.

    With --namespace the command creates a ReleaseRollout. The operator verifies the release's manifest before the
    rollout starts, and the serving pods verify the release before opening it.

    Examples:

      reelway rollout start latest --run runs/demo

      reelway rollout start 3f9c --policy mine.yaml --wait --timeout 3600

      reelway rollout start 3f9c -n reelway --ray-service reelway --wait
    """
    from reelway.platform.cli.rollout.start import start_rollout
    from reelway.platform.cli.rollout.watch import TERMINAL_PHASES, read_status, watch_plain
    from reelway.platform.cli.terminal import stderr_console
    from reelway.platform.rollout.state import Phase

    directory = resolve_location(run, namespace, context)
    rules = policy_named(policy)
    store = open_store(directory)
    before = store.latest()
    if isinstance(directory, ClusterNamespace):
        from reelway.platform.cli.rollout.cluster import start_on_cluster

        serve = (serve_api, serve_url) if serve_api and serve_url else None
        started = start_on_cluster(
            directory, release, rules, force=force, note=note, ray_service=ray_service, serve=serve
        )
    else:
        started = start_rollout(directory, store, release, rules, force=force, note=note, in_child=wait)
    state = started.state
    stdout_console.print(state.id, highlight=False)
    releases = f"{short_id(state.canary_release)} over {short_id(state.stable_release)}"
    print_unwrapped(f"rolling out {releases}, policy {escape(rules.name)}")
    if before is not None and before.state.phase is Phase.PROMOTED and not before.state.retired:
        released = short_id(before.state.stable_release)
        print_unwrapped(f"{released} is no longer kept warm: {before.state.id} can no longer be rolled back")
    controller = read_status(directory, store, state.id).controller
    if controller.unresponsive:
        print_unwrapped(f"[bold red]{escape(controller.problem)}:[/] {escape(controller_start_hint(directory))}")
    if not wait:
        flags = location_flags(directory)
        print_unwrapped(f"next: reelway rollout watch {flags}   (roll back: reelway rollout rollback {flags})")
        return
    until = TERMINAL_PHASES | {Phase.PAUSED}
    _exit_on_interrupt(
        lambda: watch_plain(directory, store, state.id, stderr_console.print, timeout_s=timeout, until=until)
    )


def status(
    rollout_id: str | None = ID,
    run: Path = RUN,
    namespace: str | None = NAMESPACE,
    context: str | None = CONTEXT,
    output: TextOrJson = OUTPUT,
    exit_code: bool = typer.Option(
        False, "--exit-code", help="Exit with the exit code of the rollout's state instead of 0."
    ),
) -> None:
    """Show the state of the rollout, the reason for it, and what the rollout waits for.

    Example: reelway rollout status -o json --exit-code
    """
    from reelway.platform.cli.rollout.status_report import exit_code_of
    from reelway.platform.cli.rollout.views import status_view
    from reelway.platform.cli.rollout.watch import read_status

    directory = resolve_location(run, namespace, context)
    report = read_status(directory, open_store(directory), rollout_id)
    if output is TextOrJson.JSON:
        typer.echo(report.model_dump_json(indent=2))
    else:
        stdout_console.print(status_view(report, width=stdout_console.width))
    if exit_code:
        raise typer.Exit(exit_code_of(report))


def watch(
    rollout_id: str | None = ID,
    run: Path = RUN,
    namespace: str | None = NAMESPACE,
    context: str | None = CONTEXT,
    timeout: float | None = WATCH_TIMEOUT,
) -> None:
    """Watch the rollout until it has ended and exit with its exit code. Ctrl-C stops watching, not the rollout.

    Without a terminal each decision is printed as one line.

    Example: reelway rollout watch --run runs/demo
    """
    from reelway.platform.cli.rollout.watch import watch_rollout

    directory = resolve_location(run, namespace, context)
    store = open_store(directory)
    _exit_on_interrupt(lambda: watch_rollout(directory, store, rollout_id, stdout_console, timeout_s=timeout))


def pause(
    rollout_id: str | None = ID, run: Path = RUN, namespace: str | None = NAMESPACE, context: str | None = CONTEXT,
    note: str = NOTE, wait: bool = WAIT, timeout: float = TIMEOUT,
) -> None:  # fmt: skip
    """Pause the ramp at its current step. Guardrail breaches and established harm still roll back.

    Example: reelway rollout pause --note "checking the like rate"
    """
    _send_command("pause", rollout_id, resolve_location(run, namespace, context), note=note, wait=wait, timeout=timeout)


def resume(
    rollout_id: str | None = ID, run: Path = RUN, namespace: str | None = NAMESPACE, context: str | None = CONTEXT,
    note: str = NOTE, wait: bool = WAIT, timeout: float = TIMEOUT,
) -> None:  # fmt: skip
    """Resume a paused ramp.

    Example: reelway rollout resume --wait
    """
    _send_command(
        "resume", rollout_id, resolve_location(run, namespace, context), note=note, wait=wait, timeout=timeout
    )


def promote(
    rollout_id: str | None = ID,
    run: Path = RUN,
    namespace: str | None = NAMESPACE,
    context: str | None = CONTEXT,
    note: str = NOTE,
    force: bool = typer.Option(
        False, "--force", help="Promote even if evidence is missing; the history records that the promotion was forced."
    ),
    wait: bool = WAIT,
    timeout: float = TIMEOUT,
) -> None:
    """Send all traffic to the release now, skipping the remaining steps and holds.

    Rejected if evidence is missing, unless --force is given. Always rejected after a guardrail breach or established
    harm.

    Example: reelway rollout promote --wait
    """
    _send_command(
        "promote",
        rollout_id,
        resolve_location(run, namespace, context),
        note=note,
        force=force,
        wait=wait,
        timeout=timeout,
    )


def rollback(
    rollout_id: str | None = ID, run: Path = RUN, namespace: str | None = NAMESPACE, context: str | None = CONTEXT,
    note: str = NOTE, wait: bool = WAIT, timeout: float = TIMEOUT,
) -> None:  # fmt: skip
    """Send all traffic back to the stable release now. Also works after a promotion while that release is kept warm.

    Example: reelway rollout rollback --note "complaints" --wait
    """
    _send_command(
        "rollback", rollout_id, resolve_location(run, namespace, context), note=note, wait=wait, timeout=timeout
    )


def history(
    rollout_id: str | None = ID,
    run: Path = RUN,
    namespace: str | None = NAMESPACE,
    context: str | None = CONTEXT,
    every: bool = typer.Option(False, "--all", help="List all rollouts of the run or namespace."),
    output: TextOrJson = OUTPUT,
) -> None:
    """Show every decision of a rollout with its reason.

    Examples:

      reelway rollout history

      reelway rollout history --all -o json
    """
    from reelway.platform.cli.rollout.history import print_all, print_history

    store = open_store(resolve_location(run, namespace, context))
    if every:
        print_all(store, as_json=output is TextOrJson.JSON)
    else:
        print_history(store, find_rollout(store, rollout_id), as_json=output is TextOrJson.JSON)


def explain(
    rollout_id: str | None = ID,
    run: Path = RUN,
    namespace: str | None = NAMESPACE,
    context: str | None = CONTEXT,
    entry: int | None = typer.Option(
        None,
        help="Number of the history entry to explain. Default: the last reconcile, or the final decision.",
    ),
    output: TextOrJson = OUTPUT,
) -> None:
    """Explain a decision: its evidence, what would have changed the decision, and the policy that applied.

    Example: reelway rollout explain r-2026 --entry 7
    """
    from reelway.platform.cli.rollout.history import load_explanation, print_explanation

    store = open_store(resolve_location(run, namespace, context))
    explanation = load_explanation(store, find_rollout(store, rollout_id), entry)
    if output is TextOrJson.JSON:
        typer.echo(explanation.model_dump_json(indent=2))
    else:
        print_explanation(explanation)


def controller(
    run: Path = RUN,
    config: Path | None = typer.Option(
        None,
        help="Settings file (YAML) with the keys interval_s, webhook, prometheus, alertmanager. Options override it.",
    ),
    host: str | None = typer.Option(
        None, help="Address at which the alert webhook listens. Default: 127.0.0.1; * for all interfaces."
    ),
    port: int | None = typer.Option(None, min=0, max=65535, help="Port of the alert webhook. Default: a free port."),
    interval: float | None = typer.Option(
        None,
        min=0.1,
        help="Seconds between two reconciles. Default: 1. Commands and alerts take effect without waiting.",
    ),
    prometheus_url: str | None = typer.Option(
        None, help="URL of Prometheus; by default the service's metrics are scraped directly."
    ),
    alertmanager_url: str | None = typer.Option(
        None, help="URL of Alertmanager, polled in addition to its webhook; by default nothing is polled."
    ),
) -> None:
    """Run the controller of the run's rollouts until Ctrl-C.

    After a crash the controller resumes from the stored rollouts. `reelway serve` starts a controller automatically.

    Examples:

      reelway rollout controller --run runs/demo

      reelway rollout controller --run runs/demo --prometheus-url http://localhost:9090 --port 9095
    """
    directory = open_run(run)
    import logging

    from reelway.platform.rollout.control.local_controller import ControllerSettings, run_controller
    from reelway.platform.settings import load_settings
    from reelway.platform.telemetry import configure_logging

    configure_logging()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line per scrape would bury the decisions
    options = {
        "run": directory.path,
        "interval_s": interval,
        "webhook": {"host": host, "port": port},
        "prometheus": {"url": prometheus_url},
        "alertmanager": {"url": alertmanager_url},
    }
    run_controller(load_settings(ControllerSettings, config, options))


def _send_command(
    verb: Verb,
    rollout_id: str | None,
    location: RolloutLocation,
    *,
    note: str,
    wait: bool,
    timeout: float,
    force: bool = False,
) -> None:
    from reelway.platform.cli.rollout.send_command import send_command

    store = open_store(location)
    rollout = find_rollout(store, rollout_id)
    _exit_on_interrupt(
        lambda: send_command(location, store, rollout, verb, note=note, force=force, wait=wait, timeout_s=timeout)
    )


def _exit_on_interrupt(follow: Callable[[], RolloutExitCode]) -> NoReturn:
    """Exits with the rollout's exit code. Ctrl-C stops waiting and leaves the rollout running."""
    try:
        code = int(follow())
    except KeyboardInterrupt:
        print_unwrapped("the rollout continues; roll it back with `reelway rollout rollback`")
        code = 130
    raise typer.Exit(code)
