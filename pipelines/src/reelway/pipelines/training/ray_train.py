"""Runs ``fit.fit`` under Ray Train, which adds workers, shared checkpoints and restarts.

The rows reach the workers as memory-mapped files on the shared storage. Each epoch's metrics return through a file
there, one line per epoch.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    CheckpointUploadMode,
    FailureConfig,
    RunConfig,
    ScalingConfig,
)
from ray.train.torch import TorchConfig, TorchTrainer

from reelway.pipelines.training.checkpoint_files import read_state
from reelway.pipelines.training.config import TrainingConfig
from reelway.pipelines.training.fit import FittedModels, TrainingSplit, fit, fitted_from
from reelway.pipelines.training.loop import EpochReport, OnEpoch, State
from reelway.pipelines.training.negatives import FIELDS, RankerRows
from reelway.pipelines.training.rows import TrainingRows, digest_of_arrays, digest_of_rows, map_arrays, save_arrays
from reelway.platform.errors import TrainingError
from reelway.platform.run_directory import digest_of
from reelway.platform.stop_signals import preserved_stop_signals
from reelway.platform.supervised_thread import SupervisedThread

STATE_FILE = "state.pt"
MAX_FAILURES = 3
INTERRUPTED_RETENTION_S = 86_400.0
"""Seconds for which the checkpoints of an interrupted training stay when another one is started."""
_POLL_S = 0.2
_HEALTH_CHECK_SETTINGS = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.05"}


@dataclass(frozen=True)
class RayResources:
    """Resources requested from Ray."""

    workers: int = 2
    gpus: int = 0
    """GPUs, with one worker each; 0 trains on CPUs."""
    threads: int | None = None
    """Torch threads per worker; None divides this machine's cores among the workers."""


def fit_on_ray(
    rows: TrainingRows,
    ranker_rows: RankerRows,
    window: TrainingSplit,
    config: TrainingConfig,
    resources: RayResources,
    *,
    storage: Path,
    on_epoch: OnEpoch | None = None,
) -> FittedModels:
    """Runs ``fit.fit`` on data-parallel workers. After a worker's death, training resumes from the last checkpoint.

    An interrupted training resumes only with the same configuration and the same values in every row.

    Args:
        storage: folder that all nodes can read; it holds rows, checkpoints and progress during training.

    Raises:
        TrainingError: if training failed more than ``MAX_FAILURES`` times; the message contains the cause.
    """
    workers = resources.gpus or resources.workers
    name = checkpoints_name(rows, ranker_rows, window, config, workers)
    input_folder = storage / f"{name}.input"
    prune_interrupted(storage, name, time.time())
    _write_input(input_folder, rows, ranker_rows)
    with (
        _ray_runtime(workers, resources.gpus),
        _fast_health_checks(),
        preserved_stop_signals(),  # Ray Train's handler would call its controller, which has ended by then
        _tail_progress(input_folder / "progress.jsonl", on_epoch),
    ):
        trainer = TorchTrainer(
            _train_worker,
            train_loop_config={
                "input": str(input_folder),
                "window": asdict(window),
                "config": config.model_dump(),
                "threads": resources.threads or max(1, (os.cpu_count() or 1) // workers),
            },
            torch_config=TorchConfig(backend="nccl" if resources.gpus else "gloo"),
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=resources.gpus > 0),
            run_config=RunConfig(
                name=name,
                storage_path=str(storage.absolute()),
                failure_config=FailureConfig(max_failures=MAX_FAILURES),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
            ),
        )
        fitted = fitted_from(_finished_state(trainer), config, rows.dimensions)
    shutil.rmtree(input_folder)
    shutil.rmtree(storage / name)
    return fitted


def checkpoints_name(
    rows: TrainingRows, ranker_rows: RankerRows, window: TrainingSplit, config: TrainingConfig, workers: int
) -> str:
    """Returns the name under which Ray Train finds the checkpoints of an interrupted training of the same inputs."""
    content = [digest_of_rows(rows), digest_of_arrays({name: getattr(ranker_rows, name) for name in FIELDS})]
    identity = [config.model_dump(), asdict(rows.dimensions), asdict(window), content, workers]
    return f"fit-{digest_of(identity)[:12]}"


def prune_interrupted(storage: Path, name: str, now_s: float) -> list[str]:
    """Removes rows and checkpoints of other trainings that were interrupted long ago. Returns the folders' names.

    Args:
        name: the training that is about to run; its folders stay.
    """
    removed = []
    for folder in sorted(storage.glob("fit-*")):
        written_s = max((path.stat().st_mtime for path in [folder, *folder.rglob("*")]), default=now_s)
        if folder.name.removesuffix(".input") != name and written_s < now_s - INTERRUPTED_RETENTION_S:
            shutil.rmtree(folder)
            removed.append(folder.name)
    return removed


def _finished_state(trainer: TorchTrainer) -> State:
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise TrainingError(f"Ray Train failed after {MAX_FAILURES} restarts: {error}") from error
    if result.checkpoint is None:
        raise TrainingError("Ray Train ended without a checkpoint; see the workers' logs")
    with result.checkpoint.as_directory() as folder:
        return read_state(Path(folder) / STATE_FILE)


def _train_worker(settings: dict[str, Any]) -> None:
    """Entry point of a worker process."""
    torch.set_num_threads(settings["threads"])
    input_folder = Path(settings["input"])
    context = ray.train.get_context()

    def write_report(report: EpochReport) -> None:
        if context.get_world_rank() == 0:
            with (input_folder / "progress.jsonl").open("a") as lines:
                lines.write(json.dumps(asdict(report)) + "\n")

    fit(
        map_arrays(input_folder / "rows"),
        RankerRows(**{name: np.load(input_folder / f"{name}.npy", mmap_mode="r") for name in FIELDS}),
        TrainingSplit(**settings["window"]),
        TrainingConfig(**settings["config"]),
        device=ray.train.torch.get_device(),
        checkpoints=RayCheckpoints(),
        on_epoch=write_report,
    )


class RayCheckpoints:
    """Checkpoints in Ray Train's storage. All workers report; worker 0 attaches the state."""

    def save(self, state: State, metrics: dict[str, float]) -> None:
        """Reports the metrics, with the state from worker 0."""
        if ray.train.get_context().get_world_rank() != 0:
            ray.train.report(metrics)
            return
        folder = tempfile.mkdtemp(prefix="reelway-checkpoint-")
        torch.save(state, Path(folder) / STATE_FILE)
        ray.train.report(
            metrics,
            checkpoint=Checkpoint.from_directory(folder),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,  # copied while the next epoch runs
            delete_local_checkpoint_after_upload=True,
        )

    def load(self) -> State | None:
        """Returns the newest reported state after a restart, or None."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as folder:
            return read_state(Path(folder) / STATE_FILE)


def _write_input(folder: Path, rows: TrainingRows, ranker_rows: RankerRows) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    save_arrays(rows, folder / "rows")
    for name in FIELDS:
        np.save(folder / f"{name}.npy", getattr(ranker_rows, name), allow_pickle=False)


@contextmanager
def _ray_runtime(workers: int, gpus: int) -> Iterator[None]:
    """Uses this process's Ray runtime or the cluster of ``RAY_ADDRESS``; else starts a local one and ends it after."""
    if ray.is_initialized():
        yield
        return
    with preserved_stop_signals():
        if address := os.environ.get("RAY_ADDRESS"):
            ray.init(address=address)
        else:
            ray.init(
                address="local",
                num_cpus=workers,
                num_gpus=gpus or None,
                include_dashboard=False,
                logging_level="ERROR",
                log_to_driver=False,  # progress arrives through the file, a failure's traceback through the exception
            )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _fast_health_checks() -> Iterator[None]:
    """Shortens the health-check interval of Ray Train's controller, unless the environment sets it.

    The controller accepts a worker's report at its next health check, 2 s apart by default, and the worker's next
    report waits for that. An epoch can be shorter than 2 s.
    """
    set_here = [name for name in _HEALTH_CHECK_SETTINGS if name not in os.environ]
    os.environ.update({name: _HEALTH_CHECK_SETTINGS[name] for name in set_here})
    try:
        yield
    finally:
        for name in set_here:
            del os.environ[name]


@contextmanager
def _tail_progress(path: Path, on_epoch: OnEpoch | None) -> Iterator[None]:
    """Passes each new line of the progress file to ``on_epoch``."""
    if on_epoch is None:
        yield
        return
    ended = threading.Event()
    reported = 0

    def report_new_lines() -> None:
        nonlocal reported
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        complete = [line for line in lines if line.endswith("\n")]
        for line in complete[reported:]:
            on_epoch(EpochReport(**json.loads(line)))
        reported = len(complete)

    def follow() -> None:
        while not ended.wait(_POLL_S):
            report_new_lines()

    thread = SupervisedThread(follow, name="training-progress", daemon=True, stop=ended)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        report_new_lines()
