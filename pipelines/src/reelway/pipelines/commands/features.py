"""``reelway features``: feature views, Feast registration, training rows, online store and parity replay of a run."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from reelway.platform.cli.supervisor import supervise
from reelway.platform.cli.terminal import print_status, progress, stdout_console
from reelway.platform.errors import ConfigError, ParityError
from reelway.platform.run_directory import RunDirectory
from reelway.platform.stop_signals import STOP_LIMIT_S

if TYPE_CHECKING:
    from reelway.pipelines.features.parity.comparison import ParityReport

Run = Annotated[Path, typer.Option("--run", help="Run directory.", show_default=True)]
Cpus = Annotated[
    int,
    typer.Option(
        "--cpus", min=1, help="Number of CPUs of the local Ray runtime; ignored with the address of a cluster."
    ),
]
RayAddress = Annotated[
    str,
    typer.Option(
        "--ray-address",
        help="Address of the Ray cluster; 'local' starts a Ray runtime on this machine.",
        envvar="RAY_ADDRESS",
    ),
]
OnlineStore = Annotated[
    str | None,
    typer.Option(
        "--online-store",
        help="Feast online store: 'sqlite', 'redis://host:port/database' or, with TLS, 'rediss://...'. A password in "
        "it is never stored; later commands need it in REDIS_PASSWORD. Defaults to SQLite in the run directory.",
        envvar="REELWAY_ONLINE_STORE",
    ),
]
Registry = Annotated[
    str | None,
    typer.Option(
        "--publish-registry",
        help="Path or URL to which Feast's registry is copied, for services that read it. By default no copy.",
        envvar="REELWAY_FEATURE_REGISTRY",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Run the steps again even if their inputs have not changed.")]
DEFAULT_RUN = Path("runs/default")
LOG_FILE = "serving/vectors.jsonl"


def register(app: typer.Typer) -> None:
    """Adds ``features`` and its sub-commands."""
    features = typer.Typer(
        invoke_without_command=True,
        help="Compute features, register them with Feast, join training rows, fill the online store.\n\n"
        "Without a sub-command all these steps run. Examples:\n\n"
        "  reelway features --run runs/default --cpus 2\n\n"
        "  reelway features materialise --run runs/default --at 2026-01-31T00:00:00Z\n\n"
        "  reelway features parity --run runs/default",
    )
    features.callback()(build_and_materialise)
    features.command("build")(build)
    features.command("materialise")(materialise)
    features.command("parity")(parity)
    app.add_typer(features, name="features")


def build_and_materialise(
    context: typer.Context,
    run: Run = DEFAULT_RUN,
    cpus: Cpus = 2,
    ray_address: RayAddress = "local",
    online_store: OnlineStore = None,
    publish_registry: Registry = None,
    force: Force = False,
) -> None:
    """Builds the features, then materialises them."""
    if context.invoked_subcommand is None:
        supervise(STOP_LIMIT_S)
        _build(RunDirectory(run), cpus, ray_address, online_store, force)
        _materialise(RunDirectory(run), None, force)
        _publish(RunDirectory(run), publish_registry)


def build(
    run: Run = DEFAULT_RUN,
    cpus: Cpus = 2,
    ray_address: RayAddress = "local",
    online_store: OnlineStore = None,
    force: Force = False,
) -> None:
    """Compute every view, register it with Feast and join the training rows."""
    supervise(STOP_LIMIT_S)
    _build(RunDirectory(run), cpus, ray_address, online_store, force)


def materialise(
    run: Run = DEFAULT_RUN,
    at: Annotated[
        str | None,
        typer.Option("--at", help="Point in time of the rows, ISO 8601. Defaults to the end of the data, or now."),
    ] = None,
    publish_registry: Registry = None,
    force: Force = False,
) -> None:
    """Fill the online store with every viewer's row as of one point in time."""
    _materialise(RunDirectory(run), at, force)
    _publish(RunDirectory(run), publish_registry)


def parity(
    run: Annotated[str, typer.Option("--run", help="Run directory, or URL of one.")] = str(DEFAULT_RUN),
    log: Annotated[
        str | None,
        typer.Option(
            "--log", help=f"Vector log of a service: a file, or a folder or URL of logs. Defaults to RUN/{LOG_FILE}."
        ),
    ] = None,
    events: Annotated[
        str | None,
        typer.Option(
            "--events",
            help="Event log: a folder or kafka://host:port[,host:port]\\[/prefix]. Defaults to RUN/events, unless RUN "
            "is an URL.",
        ),
    ] = None,
    report_to: Annotated[
        str | None,
        typer.Option(
            "--report", help="Path or URL to which the findings are copied, for `reelway operator`. By default no copy."
        ),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option("--tolerance", min=0.0, help="Largest relative difference at which two values count as equal."),
    ] = 1e-6,
    late_after: Annotated[
        float,
        typer.Option(
            "--late-after", min=1.0, help="Seconds after which a new row of the stream must be served, or it is late."
        ),
    ] = 300.0,
    from_start: Annotated[
        bool,
        typer.Option("--from-start", help="Replay all vectors of the log again. By default only new ones."),
    ] = False,
    show: Annotated[int, typer.Option("--max-shown", min=1, help="Maximum number of mismatches to print.")] = 20,
    every: Annotated[
        float | None,
        typer.Option(
            "--interval",
            min=1,
            help="Repeat the replay at this interval in seconds, until Ctrl-C. By default one replay.",
        ),
    ] = None,
) -> None:
    """Recompute served feature vectors from the data set and the event log. Exits with code 4 if a value differs.

    Also exits with code 4 if no vector of the last day was replayed, unless the findings are reported to an operator.

    Replays the vectors that were logged since the last replay; RUN/parity holds the position and a copy of the events.
    Findings of the last day are also written to RUN/serving/parity.json, per release. A rollout is promoted only after
    vectors of its release were replayed, and is rolled back if one differs. With --interval the command repeats until
    Ctrl-C and reports mismatches without exiting.

    \b
    Examples:
      reelway features parity --run runs/demo
      reelway features parity --run s3://reelway/runs/production --log s3://reelway/parity \\
        --events kafka://kafka:9092 --report s3://reelway/releases/parity.json
    """
    import os
    import time

    from reelway.pipelines.features.parity.progress import forget_vectors
    from reelway.pipelines.features.parity.replay import ReplayOptions, replay
    from reelway.pipelines.features.parity.run_files import RunFiles
    from reelway.platform.rollout.sources.parity_store import write_parity
    from reelway.platform.viewer_pseudonyms import use_secret_of_run

    if "://" not in run:
        use_secret_of_run(RunDirectory(Path(run)).keys)
    options = ReplayOptions(
        vectors=log or f"{run}/{LOG_FILE}",
        events=events or (None if "://" in run else f"{run}/events"),
        tolerance=tolerance,
        late_after_s=late_after,
    )
    if from_start:
        forget_vectors(RunFiles(run), time.time())
    if every is not None:
        os.nice(19)  # the service has priority over its monitoring
    while True:
        report, progress = replay(run, options, time.time())
        findings = progress.by_release()
        for target in (f"{run}/serving/parity.json", report_to):
            if target is not None:
                write_parity(target, findings)
        _show_parity(report, show)
        if every is None:
            if not findings and report_to is None:  # an operator waits for findings
                raise ParityError("vector log: no served vectors were replayed; send requests with the vector log on")
            report.raise_if_bad()
            return
        time.sleep(every)


def _show_parity(report: ParityReport, show: int) -> None:
    stdout_console.print(
        f"{report.vectors} vectors, {report.values} values, {report.mismatch_count} mismatches", highlight=False
    )
    if report.mismatches:
        table = Table("view", "feature", "entity", "served", "offline")
        for miss in report.mismatches[:show]:
            table.add_row(miss.view, miss.feature, miss.entity, _short(miss.served), _short(miss.offline))
        stdout_console.print(table)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 48 else text[:45] + "..."


def _build(run: RunDirectory, cpus: int, ray_address: str, online_store: str | None, force: bool) -> None:
    from dataclasses import asdict

    from reelway.pipelines.features.batch import BatchSettings, build_views
    from reelway.pipelines.features.registry import feature_repo_path, register_features
    from reelway.pipelines.features.training_rows import TRAINING_ROWS_FILE, build_training_rows
    from reelway.pipelines.features.views import ViewSettings
    from reelway.platform.features.dimensions import read_dimensions
    from reelway.platform.features.redis_address import without_password

    run.record("dataset")
    dimensions = read_dimensions(run.dataset)
    settings = BatchSettings(ViewSettings(dimensions), cpus=cpus, ray_address=ray_address)
    path = run.features / TRAINING_ROWS_FILE
    with run.step(
        "features",
        config={"views": asdict(settings.views), "online_store": without_password(online_store or "sqlite")},
        after=("dataset",),
        inputs=(feature_repo_path() / "definitions.py",),
        outputs=(path, run.features / "views", run.features / "registry.db"),
        force=force,
    ) as step:
        if step.cached:
            print_status("features: already done with the same inputs, skipped (use --force to redo)")
            return
        with progress() as bar:
            views_bar = bar.add_task("features: views", total=None)
            report = build_views(run, settings, lambda done, total: bar.update(views_bar, completed=done, total=total))
            print_status("features: registering with Feast")
            register_features(run.features, dimensions, online_store)
            rows_bar = bar.add_task("features: training rows", total=8)

            def joined(view: str) -> None:
                bar.update(rows_bar, advance=1, description=f"features: training rows, {view}")

            build_training_rows(run, joined)
        step.summary.update(impressions=report.impressions, until_s=report.until_s, rows=report.rows)
        counts = Counter(report.rows)
        print_status(f"features: {report.impressions} training rows, {counts.total()} view rows in {len(counts)} views")


def _materialise(run: RunDirectory, at: str | None, force: bool) -> None:
    from reelway.pipelines.features.materialisation import MATERIALISATION_FILE, materialise

    # The views end at the next full day. A row of a future time would hide the stream's rows until then.
    at_s = _parse_time(at) if at else min(float(run.record("features")["summary"]["until_s"]), time.time())
    with run.step(
        "materialise",
        config={"at_s": at_s},
        after=("features",),
        outputs=(run.features / MATERIALISATION_FILE,),
        force=force,
    ) as step:
        if step.cached:
            print_status("materialise: already done with the same inputs, skipped (use --force to redo)")
            return
        with progress() as bar:
            task = bar.add_task("materialise: viewer rows", total=None)
            viewers = materialise(run.features, at_s, lambda done, total: bar.update(task, completed=done, total=total))
        step.summary.update(viewers=viewers, at_s=at_s)
        print_status(f"materialise: {viewers} viewers in the online store")


def _publish(run: RunDirectory, url: str | None) -> None:
    if url:
        from reelway.pipelines.features.registry import publish_registry

        publish_registry(run.features, url)
        print_status(f"features: registry published to {url}")


def _parse_time(text: str) -> float:
    from datetime import UTC, datetime

    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"--at {text!r}: expected ISO 8601, such as 2026-01-31T00:00:00Z") from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
