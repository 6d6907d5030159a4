"""What Ray Train costs: the same ``fit`` at one worker with and without it, epoch by epoch, side by side in one run.

``python -m tests.benchmarks.bench_ray_train``. An epoch is the time from the end of one to the end of the next, so it
holds the checkpoint (both sides write one) and Ray's report. Start-up is printed apart: it is paid once per training.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ray
import torch
from tests.support.bench_results import Row, write_report
from tests.support.dimensions import DIMENSIONS
from tests.support.pipelines.training_row_fixtures import made_table, write_rows

from reelway.pipelines.training.checkpoint_files import FileCheckpoints
from reelway.pipelines.training.config import load_config
from reelway.pipelines.training.fit import RANKER, TWO_TOWER, FittedModels, fit, make_training_split
from reelway.pipelines.training.loop import EpochReport, OnEpoch
from reelway.pipelines.training.negatives import impression_rows
from reelway.pipelines.training.ray_train import RayResources, fit_on_ray
from reelway.pipelines.training.rows import load_rows
from reelway.platform.cli.terminal import print_status

BAR_RATIO = 1.10
THREADS = 1  # on both sides; two spinning threads beside Ray's own processes would measure the scheduler


def measure(train: Callable[[OnEpoch], FittedModels]) -> tuple[dict[str, list[float]], float]:
    """Seconds of each steady epoch per stage (the first of each stage is left out), and of the whole."""
    ends: dict[str, list[float]] = {TWO_TOWER: [], RANKER: []}

    def note(report: EpochReport) -> None:
        ends[report.stage].append(report.ended_at_s)
        print_status(f"  {report.stage} {report.epoch + 1}/{report.epochs}")

    started = time.perf_counter()
    train(note)
    whole_s = time.perf_counter() - started
    return {stage: [b - a for a, b in itertools.pairwise(at)] for stage, at in ends.items()}, whole_s


def main() -> None:
    """Alternate the two sides and compare medians over all rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=16_000, help="4 rows each")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    epochs = [f"{loop}.epochs={options.epochs}" for loop in ("two_tower_loop", "ranker_loop")]
    config = load_config("demo", overrides=epochs)
    with tempfile.TemporaryDirectory() as folder:
        table = made_table(requests=options.requests, videos=5000, viewers=2000)
        rows = load_rows(write_rows(Path(folder) / "rows.parquet", table), DIMENSIONS)
        window = make_training_split(rows, config)
        given = (rows, impression_rows(rows, window.training(rows)), window, config)
        plain: dict[str, list[float]] = {TWO_TOWER: [], RANKER: []}
        on_ray: dict[str, list[float]] = {TWO_TOWER: [], RANKER: []}
        totals: dict[str, list[float]] = {"plain": [], "ray": []}
        for number in range(options.rounds):
            kept = FileCheckpoints(Path(folder) / f"plain-{number}")
            storage = Path(folder) / f"ray-{number}"
            sides = [
                ("plain", plain, lambda tell, kept=kept: fit(*given, checkpoints=kept, on_epoch=tell)),
                (
                    "ray",
                    on_ray,
                    lambda tell, storage=storage: fit_on_ray(
                        *given, RayResources(workers=1, threads=THREADS), storage=storage, on_epoch=tell
                    ),
                ),
            ]
            for name, into, train in sides:
                print_status(f"round {number + 1}/{options.rounds}, {name}")
                epochs_s, whole_s = measure(train)
                totals[name].append(whole_s)
                for stage, seconds in epochs_s.items():
                    into[stage].extend(seconds)
    write_report("ray_train", report_rows(plain, on_ray, totals))
    ray.shutdown()


def report_rows(
    plain: dict[str, list[float]], on_ray: dict[str, list[float]], totals: dict[str, list[float]]
) -> list[Row]:
    """Medians and their ratio per stage; the bar is on an epoch of both models together."""
    rows = []
    sums = {"plain": 0.0, "ray": 0.0}
    for stage in (TWO_TOWER, RANKER):
        without_s, with_s = statistics.median(plain[stage]), statistics.median(on_ray[stage])
        sums["plain"], sums["ray"] = sums["plain"] + without_s, sums["ray"] + with_s
        rows += [
            Row(f"{stage} epoch without Ray, median of {len(plain[stage])}", without_s, "s"),
            Row(f"{stage} epoch under Ray Train, median of {len(on_ray[stage])}", with_s, "s"),
        ]
    overhead = sums["ray"] / sums["plain"] - 1
    bar = f"under {BAR_RATIO - 1:.0%}"
    rows.append(Row("overhead per epoch, both models", overhead * 100, "%", bar, overhead < BAR_RATIO - 1))
    rows += [
        Row("whole training without Ray, median", statistics.median(totals["plain"]), "s"),
        Row("whole training under Ray Train with start-up, median", statistics.median(totals["ray"]), "s"),
    ]
    return rows


if __name__ == "__main__":
    main()
