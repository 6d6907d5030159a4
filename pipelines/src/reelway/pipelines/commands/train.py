"""``reelway train``: options, progress and the step record of training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from reelway.platform.cli.supervisor import supervise
from reelway.platform.cli.terminal import print_status, progress, stdout_console
from reelway.platform.run_directory import RunDirectory
from reelway.platform.stop_signals import STOP_LIMIT_S

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from reelway.pipelines.training.artifacts import TrainedModels
    from reelway.pipelines.training.loop import EpochReport

_EXAMPLES = """
Train the two-tower retrieval model and the multi-task ranker on a run's training rows.

\b
Examples:
  reelway train --run runs/demo                              two CPU workers under Ray Train
  reelway train --run runs/demo --workers 1 --no-ray         the same loop in this process
  reelway train --run runs/big --gpus 4 --epochs 10          one worker per GPU, bf16
  reelway train --run runs/ml --preset ml-100k --set two_tower.dim=96 --set ranker.kind=shared_bottom

Writes RUN/models: weights, calibration.json and training.json (window, seed, configuration, loss curves).
Training resumes from the last checkpoint when a worker dies, or when the command is run again after an interruption.
"""


def register(app: typer.Typer) -> None:
    """Adds ``reelway train``."""

    @app.command(help=_EXAMPLES)
    def train(
        run: Path = typer.Option(Path("runs/default"), help="Run directory with training rows."),
        workers: int = typer.Option(2, min=1, help="Number of data-parallel CPU workers."),
        gpus: int = typer.Option(0, min=0, help="Number of GPUs, with one worker each; 0 trains on CPUs."),
        epochs: int | None = typer.Option(
            None, min=1, help="Number of epochs of both models; by default that of the preset."
        ),
        preset: str = typer.Option("demo", help="Preset of all settings: demo or ml-100k."),
        config: Path | None = typer.Option(None, help="YAML file with settings that override the preset."),
        override: list[str] = typer.Option(
            [], "--set", help="Value of one setting, such as two_tower.dim=64; overrides preset and file. Repeatable."
        ),
        seed: int = typer.Option(0, help="Random seed of initial weights, row order and dropout."),
        ray: bool = typer.Option(
            True, "--ray/--no-ray", help="Train under Ray Train; --no-ray trains with one worker in this process."
        ),
        force: bool = typer.Option(False, help="Train again even if the inputs have not changed."),
    ) -> None:
        supervise(STOP_LIMIT_S)
        train_command(RunDirectory(run), workers, gpus, epochs, preset, config, override, seed, ray, force)


def train_command(
    run: RunDirectory,
    workers: int,
    gpus: int,
    epochs: int | None,
    preset: str,
    config: Path | None,
    override: list[str],
    seed: int,
    ray: bool,
    force: bool,
) -> None:
    """Runs the step ``train``, unless it was completed with the same inputs."""
    from reelway.pipelines.training.config import load_config
    from reelway.pipelines.training.train_run import Resources, train_run

    if epochs is not None:
        override = [*override, f"two_tower_loop.epochs={epochs}", f"ranker_loop.epochs={epochs}"]
    settings = load_config(preset, config, override, seed=seed)
    resources = Resources(workers=workers, gpus=gpus, ray=ray)
    identity = {**settings.model_dump(), "workers": (gpus or workers) if ray else 1, "gpus": gpus}
    outputs = [run.models / name for name in ("training.json", "two_tower.npz", "ranker.npz", "calibration.json")]
    with run.step("train", config=identity, after=("features",), outputs=outputs, force=force) as step:
        if step.cached:
            print_status("train: already done with the same inputs, skipped (use --force to redo)")
            return
        location = (
            f"Ray Train, {gpus} GPUs" if ray and gpus else f"Ray Train, {workers} CPU workers" if ray else "no Ray"
        )
        print_status(f"train: preset {preset}, seed {seed}, {location}")
        with progress() as bar:
            models = train_run(run, settings, resources, on_epoch=_EpochBars(bar), on_progress=print_status)
        step.summary.update(_summary(models))
        _show(models, run)


class _EpochBars:
    """Progress on the terminal: a bar per model, a line per epoch."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, report: EpochReport) -> None:
        if report.stage not in self.tasks:
            self.tasks[report.stage] = self.bar.add_task(report.stage, total=report.epochs)
        metrics = ", ".join(f"{name} {report.metrics[name]:.4f}" for name in ("loss", "top1") if name in report.metrics)
        print_status(f"  {report.stage} epoch {report.epoch + 1}/{report.epochs}: {metrics} ({report.elapsed_s:.1f} s)")
        self.bar.update(self.tasks[report.stage], completed=report.epoch + 1)


def _summary(models: TrainedModels) -> dict[str, object]:
    info = models.info
    last = {stage: curve[-1]["loss"] for stage, curve in info.curves.items() if curve}
    return {"rows": info.rows, "loss": last, "notes": info.notes, "elapsed_s": info.elapsed_s}


def _show(models: TrainedModels, run: RunDirectory) -> None:
    from rich.table import Table

    table = Table(title="Ranker heads: calibration on held-out rows", title_justify="left")
    for column in ("head", "method", "rows", "positives", "error before", "error after"):
        table.add_column(column, justify="left" if column in ("head", "method") else "right")
    for head in models.info.calibration:
        table.add_row(
            head["task"], head["method"], f"{head['rows']:,}", f"{head['positives']:,}",
            f"{head['error_before']:.4f}", f"{head['error_after']:.4f}",
        )  # fmt: skip
    stdout_console.print(table)
    for line in models.info.notes:
        print_status(f"note: {line}")
    stdout_console.print(f"models: {run.models}")
