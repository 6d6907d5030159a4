"""``reelway rollout``: for an on-call engineer at three in the morning, and for scripts.

Commands write to the store of rollouts, of a run or of a cluster's namespace, and the controller moves the traffic;
nothing here touches the service.
The table of exit codes is in ``rollout_wait``.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer
from rich.markup import escape

from reelway.platform.cli.rollout.access import open_store, rollout_of, start_the_controller
from reelway.platform.cli.rollout.place import ClusterPlace, Place, flags_of, open_place, open_run, tell
from reelway.platform.cli.rollout.policy import policy_group, policy_named
from reelway.platform.cli.rollout.wait import RolloutExit
from reelway.platform.cli.terminal import out

if TYPE_CHECKING:
    from reelway.platform.rollout.state import Verb

EXIT_CODES = (
    "Exit codes: 0 promoted or done as asked, 2 usage, 6 release refused, 9 refused, 10 rolled back, "
    "11 still under way (at --timeout), 12 paused, 130 Ctrl-C."
)


class Output(StrEnum):
    """How a result is printed."""

    TEXT = "text"
    JSON = "json"


RUN = typer.Option(Path("runs/default"), "--run", help="Run directory.")
NAMESPACE = typer.Option(None, "--namespace", "-n", help="Rollouts of this namespace of a cluster, not of a run.")
CONTEXT = typer.Option(None, "--context", help="Of the kubeconfig; its namespace, unless one is given.")
ID = typer.Argument(None, metavar="[ID]", help="Rollout, or the unique beginning of its id; the newest when absent.")
OUTPUT = typer.Option(Output.TEXT, "-o", "--output", help="For people, or for programs.")
NOTE = typer.Option("", help="Why, for those who read the history.")
WAIT = typer.Option(False, "--wait", help="Wait for the effect, and let the exit code say what came of it.")
TIMEOUT = typer.Option(120.0, min=0, help="Longest that --wait waits, in seconds; then exit code 11.")
ENDLESS = typer.Option(None, min=0, help="Give up after so many seconds, with exit code 11 (12 while paused).")


def register(app: typer.Typer) -> None:
    """Add ``reelway rollout ...``."""
    group = typer.Typer(no_args_is_help=True, epilog=EXIT_CODES)
    app.add_typer(group, name="rollout", help="Roll a release out as a canary, watch it, and take it back.")
    group.command("start", epilog=EXIT_CODES)(start)
    group.command("status", epilog=EXIT_CODES)(status)
    group.command("watch", epilog=EXIT_CODES)(watch)
    for command in (pause, resume, promote, rollback):
        group.command(command.__name__, epilog=EXIT_CODES)(command)
    group.command("history")(history)
    group.command("explain")(explain)
    group.command("controller")(controller)
    group.add_typer(policy_group(), name="policy", help="Look at policies and check them.")


def start(
    release: str = typer.Argument(..., help="Id of a release in the run's store, the unique beginning, or 'latest'."),
    run: Path = RUN,
    namespace: str | None = NAMESPACE,
    context: str | None = CONTEXT,
    policy: str = typer.Option("default", help="A policy file, or the name of a policy that ships: default, demo."),
    force: bool = typer.Option(False, "--force", help="Past a cooldown, and past this release's own rollback."),
    wait: bool = typer.Option(False, "--wait", help="Follow it to its end, or until it is paused."),
    timeout: float | None = ENDLESS,
    note: str = NOTE,
    ray_service: str | None = typer.Option(None, help="On a cluster: the RayService; the one of the last rollout."),
    serve_api: str | None = typer.Option(None, help="On a cluster without KubeRay: URL of the Ray dashboard."),
    serve_url: str | None = typer.Option(None, help="On a cluster without KubeRay: URL of the router."),
) -> None:
    """Roll a release out: verify it, write the rollout down, and let the controller take it from there.

    On a cluster it becomes a ReleaseRollout, and serving verifies the release before it opens it.

    Examples:

      reelway rollout start latest --run runs/demo

      reelway rollout start 3f9c --policy mine.yaml --wait --timeout 3600

      reelway rollout start 3f9c -n reelway --ray-service reelway --wait
    """
    from reelway.platform.cli.rollout.follow import FINAL, follow_lines, look
    from reelway.platform.cli.rollout.start import start_rollout
    from reelway.platform.cli.terminal import console
    from reelway.platform.rollout.state import Phase

    directory = open_place(run, namespace, context)
    rules = policy_named(policy)
    store = open_store(directory)
    before = store.latest()
    if isinstance(directory, ClusterPlace):
        from reelway.platform.cli.rollout.cluster import start_on_cluster

        serve = (serve_api, serve_url) if serve_api and serve_url else None
        begun = start_on_cluster(
            directory, release, rules, force=force, note=note, ray_service=ray_service, serve=serve
        )
    else:
        begun = start_rollout(directory, store, release, rules, force=force, note=note)
    state = begun.state
    out.print(state.id, highlight=False)
    tell(f"rolling {state.canary_release[:12]} out over {state.stable_release[:12]}, policy {escape(rules.name)}")
    if before is not None and before.state.phase is Phase.PROMOTED and not before.state.retired:
        gone = before.state.stable_release[:12]
        tell(f"{gone} is kept warm no longer: {before.state.id} cannot be rolled back any more")
    controller = look(directory, store, state.id).controller
    if controller.silent:
        tell(f"[bold red]{escape(controller.problem)}:[/] {escape(start_the_controller(directory))}")
    if not wait:
        flags = flags_of(directory)
        tell(f"next: reelway rollout watch {flags}   (take it back: reelway rollout rollback {flags})")
        return
    until = FINAL | {Phase.PAUSED}
    _leave_on_interrupt(lambda: follow_lines(directory, store, state.id, console.print, timeout_s=timeout, until=until))


def status(
    rollout_id: str | None = ID,
    run: Path = RUN,
    namespace: str | None = NAMESPACE,
    context: str | None = CONTEXT,
    output: Output = OUTPUT,
    exit_code: bool = typer.Option(False, "--exit-code", help="Let the exit code say how the rollout stands."),
) -> None:
    """Show where the rollout stands, why, and what it waits for.

    Example: reelway rollout status -o json --exit-code
    """
    from reelway.platform.cli.rollout.follow import look
    from reelway.platform.cli.rollout.report import exit_code_of
    from reelway.platform.cli.rollout.views import status_view

    directory = open_place(run, namespace, context)
    report = look(directory, open_store(directory), rollout_id)
    if output is Output.JSON:
        typer.echo(report.model_dump_json(indent=2))
    else:
        out.print(status_view(report, width=out.width))
    if exit_code:
        raise typer.Exit(exit_code_of(report))


def watch(
    rollout_id: str | None = ID,
    run: Path = RUN,
    namespace: str | None = NAMESPACE,
    context: str | None = CONTEXT,
    timeout: float | None = ENDLESS,
) -> None:
    """Watch the rollout live until it has ended; the exit code is the rollout's. Ctrl-C leaves it running.

    Where there is no terminal every decision is one line.

    Example: reelway rollout watch --run runs/demo
    """
    from reelway.platform.cli.rollout.follow import watch_rollout

    directory = open_place(run, namespace, context)
    store = open_store(directory)
    _leave_on_interrupt(lambda: watch_rollout(directory, store, rollout_id, out, timeout_s=timeout))


def pause(
    rollout_id: str | None = ID, run: Path = RUN, namespace: str | None = NAMESPACE, context: str | None = CONTEXT,
    note: str = NOTE, wait: bool = WAIT, timeout: float = TIMEOUT,
) -> None:  # fmt: skip
    """Stop the ramp where it is. Guardrails and established harm still roll back.

    Example: reelway rollout pause --note "looking at the like rate"
    """
    _ask("pause", rollout_id, open_place(run, namespace, context), note=note, wait=wait, timeout=timeout)


def resume(
    rollout_id: str | None = ID, run: Path = RUN, namespace: str | None = NAMESPACE, context: str | None = CONTEXT,
    note: str = NOTE, wait: bool = WAIT, timeout: float = TIMEOUT,
) -> None:  # fmt: skip
    """Let a paused ramp go on.

    Example: reelway rollout resume --wait
    """
    _ask("resume", rollout_id, open_place(run, namespace, context), note=note, wait=wait, timeout=timeout)


def promote(
    rollout_id: str | None = ID,
    run: Path = RUN,
    namespace: str | None = NAMESPACE,
    context: str | None = CONTEXT,
    note: str = NOTE,
    force: bool = typer.Option(False, "--force", help="Although evidence is missing; it is written down as such."),
    wait: bool = WAIT,
    timeout: float = TIMEOUT,
) -> None:
    """Give the release everybody now, past the steps and holds that are left.

    Refused where evidence is missing, unless forced; never past a breach or established harm.

    Example: reelway rollout promote --wait
    """
    _ask("promote", rollout_id, open_place(run, namespace, context), note=note, force=force, wait=wait, timeout=timeout)


def rollback(
    rollout_id: str | None = ID, run: Path = RUN, namespace: str | None = NAMESPACE, context: str | None = CONTEXT,
    note: str = NOTE, wait: bool = WAIT, timeout: float = TIMEOUT,
) -> None:  # fmt: skip
    """Take everybody back to the release before, now. Also after a promotion, while that one is kept warm.

    Example: reelway rollout rollback --note "complaints" --wait
    """
    _ask("rollback", rollout_id, open_place(run, namespace, context), note=note, wait=wait, timeout=timeout)


def history(
    rollout_id: str | None = ID,
    run: Path = RUN,
    namespace: str | None = NAMESPACE,
    context: str | None = CONTEXT,
    every: bool = typer.Option(False, "--all", help="All rollouts of the run, a line each."),
    output: Output = OUTPUT,
) -> None:
    """Show every decision with its reason, word for word.

    Examples:

      reelway rollout history

      reelway rollout history --all -o json
    """
    from reelway.platform.cli.rollout.history import print_all, print_history

    store = open_store(open_place(run, namespace, context))
    if every:
        print_all(store, as_json=output is Output.JSON)
    else:
        print_history(store, rollout_of(store, rollout_id), as_json=output is Output.JSON)


def explain(
    rollout_id: str | None = ID,
    run: Path = RUN,
    namespace: str | None = NAMESPACE,
    context: str | None = CONTEXT,
    entry: int | None = typer.Option(None, help="Number of a history entry; where the rollout stands when absent."),
    output: Output = OUTPUT,
) -> None:
    """Say why the rollout moved or stopped: the numbers, what would have changed it, and the policy that applied.

    Example: reelway rollout explain r-2026 --entry 7
    """
    from reelway.platform.cli.rollout.history import explanation_of, print_explanation

    store = open_store(open_place(run, namespace, context))
    explanation = explanation_of(store, rollout_of(store, rollout_id), entry)
    if output is Output.JSON:
        typer.echo(explanation.model_dump_json(indent=2))
    else:
        print_explanation(explanation)


def controller(
    run: Path = RUN,
    config: Path | None = typer.Option(
        None,
        help="Settings file (YAML) with the keys interval_s, webhook, prometheus, alertmanager. Options override it.",
    ),
    host: str | None = typer.Option(None, help="Address of the alert webhook; 127.0.0.1 by default, 0.0.0.0 for all."),
    port: int | None = typer.Option(
        None, min=0, max=65535, help="Port of the alert webhook; by default a free one is chosen."
    ),
    interval: float | None = typer.Option(
        None, min=0.1, help="Seconds between two reconciles, 1 by default; commands and alerts are handled at once."
    ),
    prometheus_url: str | None = typer.Option(
        None, help="URL of Prometheus; by default the service's metrics are scraped directly."
    ),
    alertmanager_url: str | None = typer.Option(
        None, help="URL of Alertmanager, polled in addition to its webhook; by default nothing is polled."
    ),
) -> None:
    """Manage the run's rollouts until Ctrl-C.

    The controller may be killed at any time; when it is started again it continues from the recorded state.
    `reelway serve` starts a controller automatically.

    Examples:

      reelway rollout controller --run runs/demo

      reelway rollout controller --run runs/demo --prometheus-url http://localhost:9090 --port 9095
    """
    directory = open_run(run)
    import logging

    from reelway.platform.rollout.control.controller_service import ControllerSettings, run_controller
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


def _ask(
    verb: Verb, rollout_id: str | None, place: Place, *, note: str, wait: bool, timeout: float, force: bool = False
) -> None:
    from reelway.platform.cli.rollout.ask import ask_rollout

    store = open_store(place)
    rollout = rollout_of(store, rollout_id)
    _leave_on_interrupt(
        lambda: ask_rollout(place, store, rollout, verb, note=note, force=force, wait=wait, timeout_s=timeout)
    )


def _leave_on_interrupt(follow: Callable[[], RolloutExit]) -> NoReturn:
    """End with the rollout's exit code; Ctrl-C ends the looking, never the rollout."""
    try:
        code = int(follow())
    except KeyboardInterrupt:
        tell("the rollout goes on; take it back with `reelway rollout rollback`")
        code = 130
    raise typer.Exit(code)
