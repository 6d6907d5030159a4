"""Measures the overhead of Ray Train: the same ``fit`` with one worker, with Ray and without it, in turns in one run.

``python -m tests.benchmarks.bench_ray_train``. The time of an epoch is from the end of the previous epoch to its own
end. It includes the checkpoint, which both variants write, and Ray's report. Start-up is a separate row, because it
occurs once per training.
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
THREADS = 1  # in both variants; with two threads beside Ray's own processes, the scheduler would dominate


def measure(train: Callable[[OnEpoch], FittedModels]) -> tuple[dict[str, list[float]], float]:
    """Returns the seconds of each epoch by stage, without the first of each stage, and those of the training."""
    ends: dict[str, list[float]] = {TWO_TOWER: [], RANKER: []}

    def note(report: EpochReport) -> None:
        ends[report.stage].append(report.ended_at_s)
        print_status(f"  {report.stage} {report.epoch + 1}/{report.epochs}")

    started = time.perf_counter()
    train(note)
    total_s = time.perf_counter() - started
    return {stage: [b - a for a, b in itertools.pairwise(at)] for stage, at in ends.items()}, total_s


def main() -> None:
    """Runs both variants in turns and compares the medians over all rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=16_000, help="requests of the training data, with 4 rows each")
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
        inputs = (rows, impression_rows(rows, window.training(rows)), window, config)
        plain: dict[str, list[float]] = {TWO_TOWER: [], RANKER: []}
        on_ray: dict[str, list[float]] = {TWO_TOWER: [], RANKER: []}
        totals: dict[str, list[float]] = {"plain": [], "ray": []}
        for number in range(options.rounds):
            checkpoints = FileCheckpoints(Path(folder) / f"plain-{number}")
            storage = Path(folder) / f"ray-{number}"
            variants = [
                (
                    "plain",
                    plain,
                    lambda note, files=checkpoints: fit(*inputs, checkpoints=files, on_epoch=note),
                ),
                (
                    "ray",
                    on_ray,
                    lambda on_epoch, storage=storage: fit_on_ray(
                        *inputs, RayResources(workers=1, threads=THREADS), storage=storage, on_epoch=on_epoch
                    ),
                ),
            ]
            for name, into, train in variants:
                print_status(f"round {number + 1}/{options.rounds}, {name}")
                epochs_s, total_s = measure(train)
                totals[name].append(total_s)
                for stage, seconds in epochs_s.items():
                    into[stage].extend(seconds)
    write_report("ray_train", report_rows(plain, on_ray, totals))
    ray.shutdown()


def report_rows(
    plain: dict[str, list[float]], on_ray: dict[str, list[float]], totals: dict[str, list[float]]
) -> list[Row]:
    """Returns the medians by stage and the overhead. The bar applies to an epoch of both models together."""
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
