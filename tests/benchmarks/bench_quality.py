"""Measures quality on MovieLens-100K by the full pipeline: import, features, training, evaluation; three seeds.

``python -m tests.benchmarks.bench_quality [seeds]``. ``REELWAY_ML100K_DIR`` must name the folder of MovieLens-100K.
Models are trained on the first 80 % of the events by time. Evaluated are viewers with at least 5 training events who
later watched a video that is new to them and known to training. Videos that a viewer has seen are excluded.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tests.support.bench_results import Row, write_report

from reelway.pipelines.evaluation.harness import RankingResult
from reelway.pipelines.evaluation.metrics import mean_estimate, paired_difference
from reelway.pipelines.evaluation.report import (
    ALL_TIME_POPULARITY,
    ALS,
    RECENT_POPULARITY,
    RETRIEVAL_ONLY,
    TWO_STAGE,
    evaluate_run,
)
from reelway.pipelines.training.config import load_config
from reelway.pipelines.training.train_run import Resources, train_run
from reelway.platform.cli.processes import reelway_command, run_command
from reelway.platform.cli.terminal import print_status
from reelway.platform.errors import ConfigError
from reelway.platform.run_directory import RunDirectory

VARIABLE = "REELWAY_ML100K_DIR"
METRICS = ("recall", "ndcg")
NAMES = {"recall": "Recall@50", "ndcg": "NDCG@10"}
REFERENCE = {RECENT_POPULARITY: {"recall": 0.355, "ndcg": 0.222}, ALS: {"recall": 0.255, "ndcg": 0.188}}
"""Baselines measured independently of this code, which breaks ties differently. The bar is the higher value."""


def data_folder() -> Path:
    """Returns the folder of MovieLens-100K.

    Raises:
        ConfigError: if the environment variable does not name a folder.
    """
    folder = os.environ.get(VARIABLE, "")
    if not folder or not Path(folder).is_dir():
        raise ConfigError(f"{VARIABLE}: {folder!r} is not a folder; set it to the folder of MovieLens-100K")
    return Path(folder)


def measure(run: RunDirectory, seed: int) -> dict[str, RankingResult]:
    """Trains with one seed and evaluates every recommender."""
    print_status(f"seed {seed}: training")
    train_run(run, load_config("ml-100k", seed=seed), Resources(ray=False))
    return evaluate_run(run).ranking


def rows_of(rankings: Sequence[dict[str, RankingResult]]) -> list[Row]:
    """Returns every recommender per seed, the mean over seeds, and the bars."""
    rows: list[Row] = []
    for metric in METRICS:
        for seed, ranking in enumerate(rankings):
            for name in (TWO_STAGE, RETRIEVAL_ONLY):
                rows.append(_row(f"{NAMES[metric]}: {name}, seed {seed}", getattr(ranking[name], metric)))
        for name in (ALL_TIME_POPULARITY, RECENT_POPULARITY, ALS):
            rows.append(_row(f"{NAMES[metric]}: {name}", getattr(rankings[0][name], metric)))
        models_B = np.mean([getattr(ranking[TWO_STAGE], metric) for ranking in rankings], axis=0)
        for name in (RECENT_POPULARITY, ALS):
            baseline_B = np.mean([getattr(ranking[name], metric) for ranking in rankings], axis=0)
            lead = paired_difference(models_B, baseline_B)
            bar = max(float(baseline_B.mean()), REFERENCE[name][metric])
            rows.append(
                Row(
                    f"{NAMES[metric]}: {TWO_STAGE}, mean of {len(rankings)} seeds",
                    float(models_B.mean()),
                    f"lead {lead.value:+.3f} [{lead.low:+.3f}, {lead.high:+.3f}]",
                    f"> {bar:.3f} ({name})",
                    bool(models_B.mean() > bar),
                )
            )
    return rows


def _row(name: str, values_B: np.ndarray) -> Row:
    estimate = mean_estimate(values_B)
    return Row(name, estimate.value, f"[{estimate.low:.3f}, {estimate.high:.3f}], {estimate.viewers} viewers")


def main(seeds: int) -> None:
    folder = data_folder()
    with tempfile.TemporaryDirectory() as name:
        run = RunDirectory(Path(name) / "run")
        run_command(reelway_command("import", "ml-100k", str(folder), "--run", str(run.path)))
        run_command(reelway_command("features", "build", "--run", str(run.path)))
        write_report("quality", rows_of([measure(run, seed) for seed in range(seeds)]))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
