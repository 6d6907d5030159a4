"""The training step of a run: reads the training rows and writes ``models/``, under Ray Train or in this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import torch

from reelway.pipelines.training.artifacts import TrainedModels, TrainingInfo, save_models
from reelway.pipelines.training.batches import ranking_tensors
from reelway.pipelines.training.calibration import HeadReport, calibrate
from reelway.pipelines.training.config import TrainingConfig
from reelway.pipelines.training.fit import (
    FittedModels,
    TrainingSplit,
    base_rates,
    constant_heads,
    embed_needed_viewers,
    fit,
    make_training_split,
)
from reelway.pipelines.training.inference import embed_videos, score
from reelway.pipelines.training.loop import OnEpoch
from reelway.pipelines.training.negatives import PointInTimeLookup, RankerRows, impression_rows, negative_rows
from reelway.pipelines.training.rows import I64, TrainingRows, load_rows
from reelway.platform.contracts.calibration import Calibration
from reelway.platform.contracts.feature_names import BINARY_TASKS, RANKER_INPUTS
from reelway.platform.features.dimensions import read_dimensions
from reelway.platform.run_directory import RunDirectory

ProgressCallback = Callable[[str], None]

ROWS_FILE = "training_rows.parquet"


@dataclass(frozen=True)
class Resources:
    """Workers and GPUs of a training."""

    workers: int = 2
    gpus: int = 0
    ray: bool = True
    """Whether to train under Ray Train; otherwise one worker in this process trains."""


def train_run(
    run: RunDirectory,
    config: TrainingConfig,
    resources: Resources,
    *,
    on_epoch: OnEpoch | None = None,
    on_progress: ProgressCallback = lambda _: None,
    as_of: PointInTimeLookup | None = None,
) -> TrainedModels:
    """Trains on ``run.features / ROWS_FILE`` and writes ``run.models``.

    Args:
        as_of: point-in-time lookup for sampled negatives; by default the run's feature store.
    """
    clock = _StepTimer()
    rows = load_rows(run.features / ROWS_FILE, read_dimensions(run.features))
    window = make_training_split(rows, config)
    on_progress(f"{len(rows):,} rows, {len(rows.viewers.viewer_dense):,} requests, {len(rows.video_ids):,} videos")
    candidates = ranker_rows_of(rows, window, config, as_of or partial(_store_as_of, run))
    learn = candidates.select(candidates.event_time_s < window.calibration_s)
    clock.mark("rows")
    notes = [
        f"head {task!r} has one class only in the training window; it outputs its base rate"
        for task in constant_heads(learn.labels)
    ]
    for line in notes:
        on_progress(f"warning: {line}")
    fitted = _fit_somewhere(run, rows, learn, window, config, resources, on_epoch)
    clock.mark("fit")
    calibration, reports = calibrate_on(
        rows, candidates.select(candidates.event_time_s >= window.calibration_s), fitted, config
    )
    clock.mark("calibration")
    info = TrainingInfo(
        seed=config.seed,
        window_start_s=float(rows.event_time_s[0]),
        window_end_s=window.cut_s,
        calibration_start_s=window.calibration_s,
        config=config.model_dump(),
        curves=fitted.curves,
        base_rates=base_rates(learn.labels),
        calibration=[report.to_dict() for report in reports],
        notes=[
            *notes,
            *(f"{report.task}: probabilities are not calibrated: {report.note}" for report in reports if report.note),
        ],
        rows={"training": len(window.training(rows)), "ranker": len(learn), "all": len(rows)},
        elapsed_s=clock.marks,
    )
    models = TrainedModels(fitted.two_tower, fitted.ranker, calibration, info)
    save_models(models, run.models)
    return models


def ranker_rows_of(
    rows: TrainingRows, window: TrainingSplit, config: TrainingConfig, as_of: PointInTimeLookup
) -> RankerRows:
    """Returns the window's impressions from ``ranker_s`` on, and sampled negatives if configured."""
    index = window.training(rows)
    shown = impression_rows(rows, index[rows.event_time_s[index] >= window.ranker_s])
    if not config.sampled_negatives:
        return shown
    return shown.concat(
        negative_rows(rows, index, config.sampled_negatives, as_of, seed=config.seed, from_s=window.ranker_s)
    )


def calibrate_on(
    rows: TrainingRows, held_out: RankerRows, fitted: FittedModels, config: TrainingConfig
) -> tuple[Calibration, list[HeadReport]]:
    """Fits calibration curves on held-out rows, scored without positions as in serving."""
    viewer_VD = embed_needed_viewers(fitted.ranker_tower, rows, held_out.viewer_row)
    video_MD = embed_videos(fitted.ranker_tower, rows.videos)
    batch = ranking_tensors(rows, held_out, viewer_VD, video_MD, np.arange(len(held_out)))
    inputs = {name: batch[name].numpy() for name in RANKER_INPUTS}
    outputs = score(fitted.ranker, inputs, batch["row_viewer"].numpy())
    return calibrate(
        outputs, held_out.labels[:, : len(BINARY_TASKS)], method=config.calibration_method, seed=config.seed
    )


def _fit_somewhere(
    run: RunDirectory,
    rows: TrainingRows,
    learn: RankerRows,
    window: TrainingSplit,
    config: TrainingConfig,
    resources: Resources,
    on_epoch: OnEpoch | None,
) -> FittedModels:
    if not resources.ray:
        device = torch.device("cuda" if resources.gpus else "cpu")
        return fit(rows, learn, window, config, device=device, on_epoch=on_epoch)
    from reelway.pipelines.training.ray_train import RayResources, fit_on_ray

    return fit_on_ray(
        rows,
        learn,
        window,
        config,
        RayResources(resources.workers, resources.gpus),
        storage=run.models / "checkpoints",
        on_epoch=on_epoch,
    )


def _store_as_of(run: RunDirectory, view: str, entities: I64, at_us: I64) -> pa.Table:
    from reelway.pipelines.features.point_in_time import join_view
    from reelway.platform.features.feast_store import open_feature_store

    return join_view(open_feature_store(run.features), view, entities, at_us)


class _StepTimer:
    def __init__(self) -> None:
        self.marks: dict[str, float] = {}
        self._last = time.perf_counter()

    def mark(self, name: str) -> None:
        now = time.perf_counter()
        self.marks[name], self._last = round(now - self._last, 3), now
