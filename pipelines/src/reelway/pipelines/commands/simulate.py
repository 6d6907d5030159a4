"""``reelway simulate``: weeks of a small short-video service as the run's data set, checked like anybody's data.

It only wires; the service is in ``pipelines.simulation``.
"""

from __future__ import annotations

from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    """Add ``reelway simulate``."""
    app.command()(simulate)


def simulate(
    run: Path = typer.Option(Path("runs/default"), "--run", help="Run directory; the data set goes to RUN/dataset."),
    viewers: int = typer.Option(5_000, help="Accounts, those that arrive during the log included."),
    videos: int = typer.Option(5_000, help="Videos, those uploaded during the log included."),
    days: int = typer.Option(14, help="Length of the log."),
    impressions: int = typer.Option(300_000, help="Videos shown in all, in slates of 10."),
    seed: int = typer.Option(0, min=0, help="The same seed and sizes give the same data."),
    force: bool = typer.Option(False, "--force", help="Simulate again even if this was done here before."),
) -> None:
    """Simulate viewers, creators, videos and what viewers do with what they are shown.

    Tastes drift, trends rise and fall, new viewers and videos keep arriving, some embeddings are missing or poor.
    A better recommender gets more watch time here, a broken one less. Takes seconds.

    \b
    Examples:
      reelway simulate --run runs/small --viewers 500 --videos 800 --impressions 20000
      reelway simulate --run runs/other --seed 7
    """
    from dataclasses import asdict

    from reelway.pipelines.datasets.checks import CheckLimits
    from reelway.pipelines.datasets.dataset_step import write_checked
    from reelway.pipelines.simulation.config import SimulationConfig
    from reelway.pipelines.simulation.log import simulate as simulate_log
    from reelway.platform.cli.terminal import progress, say
    from reelway.platform.runs import RunDirectory

    config = SimulationConfig(viewers=viewers, videos=videos, days=days, impressions=impressions)
    limits = CheckLimits()
    directory = RunDirectory(run)
    identity = {"kind": "simulated", "seed": seed, "simulation": asdict(config), "limits": asdict(limits)}
    outputs = [directory.dataset / "dataset.json"]
    with directory.step("dataset", config=identity, outputs=outputs, force=force) as step:
        if step.done:
            say("dataset: already simulated with the same configuration and seed, skipped (use --force to redo)")
            return
        with progress() as bar:
            task = bar.add_task("simulating requests", total=None)
            dataset = simulate_log(
                config, seed, progress=lambda done, every: bar.update(task, completed=done, total=every)
            )
        step.summary |= write_checked(
            directory.dataset, dataset.tables, dataset.info, limits, dimensions=dataset.dimensions
        )
    say(f"written to {directory.dataset}")
