"""``reelway features``: feature views, Feast registration, training rows, online store and parity replay of a run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from reelway.platform.cli.terminal import print_status, progress, stdout_console
from reelway.platform.errors import ConfigError
from reelway.platform.run_directory import RunDirectory

if TYPE_CHECKING:
    from reelway.pipelines.features.parity import ParityReport

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
        help="Feast online store: 'sqlite' or 'redis://host:port'. Defaults to SQLite in the run directory.",
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
    _build(RunDirectory(run), cpus, ray_address, online_store, force)


def materialise(
    run: Run = DEFAULT_RUN,
    at: Annotated[
        str | None, typer.Option("--at", help="Point in time of the rows, ISO 8601. Defaults to the end of the data.")
    ] = None,
    publish_registry: Registry = None,
    force: Force = False,
) -> None:
    """Fill the online store with every viewer's row as of one point in time."""
    _materialise(RunDirectory(run), at, force)
    _publish(RunDirectory(run), publish_registry)


def parity(
    run: Run = DEFAULT_RUN,
    log: Annotated[
        Path | None,
        typer.Option("--log", help=f"Vector log of a service, or folder of vector logs. Defaults to RUN/{LOG_FILE}."),
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
    """Replay served feature vectors through the offline join. Exits with code 4 if a value differs.

    Findings are also written to RUN/serving/parity.json, per release and for the whole vector log. A rollout is
    promoted only after vectors of its release were replayed, and is rolled back if one differs. With --interval the
    command repeats until Ctrl-C and reports mismatches without exiting.
    """
    import os
    import signal
    import time

    from reelway.pipelines.features.parity import replay
    from reelway.platform.atomic_files import write_json
    from reelway.platform.rollout.sources.parity_findings import parity_path
    from reelway.platform.rollout.sources.parity_store import write_parity

    directory = RunDirectory(run)
    if every is not None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
        os.nice(19)  # the service has priority over its monitoring
    while True:
        report = replay(directory.features, log or directory.path / LOG_FILE, tolerance)
        findings = report.by_release(time.time())
        write_json(parity_path(directory), findings)
        if report_to is not None:
            write_parity(report_to, findings)
        _show_parity(report, show)
        if every is None:
            report.raise_if_bad()
            return
        time.sleep(every)


def _show_parity(report: ParityReport, show: int) -> None:
    stdout_console.print(
        f"{report.vectors} vectors, {report.values} values, {len(report.mismatches)} mismatches", highlight=False
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

    run.record("dataset")
    dimensions = read_dimensions(run.dataset)
    settings = BatchSettings(ViewSettings(dimensions), cpus=cpus, ray_address=ray_address)
    path = run.features / TRAINING_ROWS_FILE
    with run.step(
        "features",
        config={"views": asdict(settings.views), "online_store": online_store or "sqlite"},
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

    at_s = _parse_time(at) if at else float(run.record("features")["summary"]["until_s"])
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
