"""``fit`` in two processes joined by gloo: the expected result of Ray Train with two workers."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as spawned
from tests.support.dimensions import DIMENSIONS

from reelway.pipelines.training.checkpoint_files import FileCheckpoints, read_state
from reelway.pipelines.training.config import TrainingConfig
from reelway.pipelines.training.fit import FittedModels, fit, fitted_from, make_training_split
from reelway.pipelines.training.negatives import impression_rows
from reelway.pipelines.training.rows import load_rows


def fit_in_two_processes(rows_file: Path, config: TrainingConfig, folder: Path) -> FittedModels:
    """Trains in two processes without Ray and returns the models of the last checkpoint."""
    spawned.spawn(_worker, args=(str(rows_file), config.model_dump(), str(folder)), nprocs=2)
    return fitted_from(read_state(sorted(folder.glob("checkpoint-*.pt"))[-1]), config, DIMENSIONS)


def _worker(rank: int, rows_file: str, config: dict[str, object], folder: str) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))  # as in each of Ray's two workers
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    rows, settings = load_rows(Path(rows_file), DIMENSIONS), TrainingConfig.model_validate(config)
    window = make_training_split(rows, settings)
    training = impression_rows(rows, window.training(rows))
    fit(rows, training, window, settings, checkpoints=FileCheckpoints(Path(folder)))
    dist.destroy_process_group()
