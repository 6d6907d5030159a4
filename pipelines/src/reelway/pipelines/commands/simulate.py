"""``reelway simulate``: simulates a short-video service and writes its log as the run's data set.

The data set passes the same checks as imported data.
"""

from __future__ import annotations

from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    """Adds ``reelway simulate``."""
    app.command()(simulate)


def simulate(
    run: Path = typer.Option(
        Path("runs/default"), "--run", help="Run directory; the data set is written to RUN/dataset."
    ),
    viewers: int = typer.Option(5_000, help="Number of viewers, including those who join during the log."),
    videos: int = typer.Option(5_000, help="Number of videos, including those uploaded during the log."),
    days: int = typer.Option(14, help="Length of the log in days."),
    impressions: int = typer.Option(300_000, help="Total number of impressions, in slates of 10."),
    seed: int = typer.Option(0, min=0, help="Random seed; the same seed and sizes give the same data set."),
    force: bool = typer.Option(False, "--force", help="Simulate again even if a data set of these settings exists."),
) -> None:
    """Simulate viewers, creators, videos and the viewers' reactions to recommendations.

    Tastes drift, trends rise and fall, viewers and videos arrive during the log, and some embeddings are missing or
    poor. Viewers enjoy a video less when they see it again soon. A better recommender earns more watch time, a broken
    one less. Takes seconds.

    \b
    Examples:
      reelway simulate --run runs/small --viewers 500 --videos 800 --impressions 20000
      reelway simulate --run runs/other --seed 7
    """
    from dataclasses import asdict

    from reelway.pipelines.datasets.checks import CheckLimits
    from reelway.pipelines.datasets.dataset_step import write_checked_dataset
    from reelway.pipelines.simulation.config import SimulationConfig
    from reelway.pipelines.simulation.simulate_log import simulate as simulate_log
    from reelway.pipelines.simulation.world_constants import WORLD_VERSION
    from reelway.platform.cli.terminal import print_status, progress
    from reelway.platform.run_directory import RunDirectory

    config = SimulationConfig(viewers=viewers, videos=videos, days=days, impressions=impressions)
    limits = CheckLimits()
    directory = RunDirectory(run)
    identity = {
        "kind": "simulated",
        "seed": seed,
        "simulation": asdict(config),
        "world_version": WORLD_VERSION,
        "limits": asdict(limits),
    }
    outputs = [directory.dataset / "dataset.json"]
    with directory.step("dataset", config=identity, outputs=outputs, force=force) as step:
        if step.cached:
            print_status(
                "dataset: already simulated with the same configuration and seed, skipped (use --force to redo)"
            )
            return
        with progress() as bar:
            task = bar.add_task("simulating requests", total=None)
            dataset = simulate_log(
                config, seed, progress=lambda done, every: bar.update(task, completed=done, total=every)
            )
        step.summary |= write_checked_dataset(
            directory.dataset, dataset.tables, dataset.info, limits, dimensions=dataset.dimensions
        )
    print_status(f"written to {directory.dataset}")
