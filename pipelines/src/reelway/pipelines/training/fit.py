"""Fits both models: the two-tower, its embeddings, then the ranker. It uses no Ray and no files.

Every data-parallel worker runs the same function and ends with the same models.
"""

# Shapes: V viewer rows, M videos, D embedding, K tasks

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from reelway.pipelines.models.losses import RankingObjective, RetrievalObjective
from reelway.pipelines.models.ranker import Ranker
from reelway.pipelines.models.two_tower import TwoTower
from reelway.pipelines.training.batches import SINGLE_WORKER, RankingBatches, RetrievalBatches, Worker, as_tensor
from reelway.pipelines.training.config import TrainingConfig
from reelway.pipelines.training.inference import embed_videos, embed_viewers
from reelway.pipelines.training.loop import Checkpoints, NoCheckpoints, OnEpoch, State, current_worker, train
from reelway.pipelines.training.negatives import RankerRows
from reelway.pipelines.training.rows import F32, I64, TrainingRows
from reelway.platform.contracts.feature_dimensions import FeatureDimensions
from reelway.platform.contracts.feature_names import BINARY_TASKS, RANKER_TASKS
from reelway.platform.errors import EmptyDatasetError, TrainingError
from reelway.platform.features.assembly import ViewerArrays

TWO_TOWER = "two_tower"
HOLDOUT_TWO_TOWER = "earlier_two_tower"
RANKER = "ranker"


@dataclass(frozen=True)
class TrainingSplit:
    """Split of the rows by time: training before ``cut_s``, the ranker's rows in ``[ranker_s, calibration_s)``."""

    cut_s: float
    calibration_s: float
    ranker_s: float = -np.inf
    """If above the first row's time, the ranker learns from a two-tower trained on the rows before this time."""

    @property
    def holds_out(self) -> bool:
        """Whether the ranker learns from a two-tower that has not seen the ranker's rows."""
        return self.ranker_s > -np.inf

    def training(self, rows: TrainingRows) -> I64:
        """Returns the indices of the training window's rows."""
        return rows.between(-np.inf, self.cut_s)


def make_training_split(rows: TrainingRows, config: TrainingConfig) -> TrainingSplit:
    """Returns the split that the configuration asks for.

    Raises:
        EmptyDatasetError: if no row lies before the cut, or the holdout leaves no rows for a model.
    """
    cut_s = rows.cut_time_s(config.train_fraction)
    inside = rows.between(-np.inf, cut_s)
    if not len(inside):
        raise EmptyDatasetError(
            f"0 of {len(rows)} rows lie before the cut at {config.train_fraction:g} of the events, so none can be "
            "trained on; check event_time, which may be the same in all rows"
        )
    held_out = round(len(inside) * config.calibration_fraction)
    calibration_s = cut_s if not held_out else float(rows.event_time_s[inside[-held_out]])
    if calibration_s <= rows.event_time_s[inside[0]]:
        calibration_s = cut_s
    if not config.ranker_holdout:
        return TrainingSplit(cut_s, calibration_s)
    ranker_s = float(rows.event_time_s[inside[-max(1, round(len(inside) * config.ranker_holdout))]])
    if not rows.event_time_s[inside[0]] < ranker_s < calibration_s:
        raise EmptyDatasetError(
            f"ranker_holdout {config.ranker_holdout:g} of {len(inside)} rows leaves none for the earlier two-tower or "
            "for the ranker; use more rows, or set ranker_holdout to 0"
        )
    return TrainingSplit(cut_s, calibration_s, ranker_s)


@dataclass(frozen=True)
class FittedModels:
    """Both models and their loss curves."""

    two_tower: TwoTower
    ranker: Ranker
    curves: dict[str, list[dict[str, float]]]
    ranker_tower: TwoTower
    """Two-tower whose similarities the ranker is fitted and calibrated on: ``two_tower``, or the holdout two-tower."""


def fit(
    rows: TrainingRows,
    ranker_rows: RankerRows,
    window: TrainingSplit,
    config: TrainingConfig,
    *,
    device: torch.device | None = None,
    checkpoints: Checkpoints | None = None,
    on_epoch: OnEpoch | None = None,
) -> FittedModels:
    """Trains both models.

    Args:
        ranker_rows: rows in ``[window.ranker_s, window.calibration_s)``, sampled negatives included.
        checkpoints: storage of one checkpoint for all stages; it keeps finished models while the next one trains.
    """
    worker = current_worker()
    stages = _StageCheckpointer(checkpoints or NoCheckpoints())
    loop = partial(train, seed=config.seed, device=device, on_epoch=on_epoch)

    def trained_two_tower(stage: str, until: TrainingSplit) -> TwoTower:
        model = prepared_two_tower(rows, until, config)
        index = until.training(rows)
        batches = RetrievalBatches(
            rows, index, config.retrieval, config.two_tower_loop, seed=config.seed, worker=worker
        )
        objective = RetrievalObjective(model, label_smoothing=config.retrieval.label_smoothing)
        stages.run(stage, objective, partial(loop, objective, batches, config.two_tower_loop))
        return model.cpu().eval()

    two_tower = trained_two_tower(TWO_TOWER, window)
    ranker_tower = two_tower
    if window.holds_out:
        ranker_tower = trained_two_tower(HOLDOUT_TWO_TOWER, TrainingSplit(window.ranker_s, window.ranker_s))

    ranker, ranking = _ranker_and_batches(ranker_tower, rows, ranker_rows, config, worker)
    ranking_objective = RankingObjective(ranker)
    stages.run(RANKER, ranking_objective, partial(loop, ranking_objective, ranking, config.ranker_loop))
    ranker.cpu().eval()
    stages.keep_all()
    return FittedModels(two_tower, ranker, stages.curves, ranker_tower)


def fit_ranker(two_tower: TwoTower, rows: TrainingRows, ranker_rows: RankerRows, config: TrainingConfig) -> Ranker:
    """Trains a ranker on an existing two-tower, in this process and without checkpoints."""
    ranker, ranking = _ranker_and_batches(two_tower, rows, ranker_rows, config, SINGLE_WORKER)
    train(RankingObjective(ranker), ranking, config.ranker_loop, seed=config.seed, stage=RANKER)
    return ranker.cpu().eval()


def _ranker_and_batches(
    two_tower: TwoTower, rows: TrainingRows, ranker_rows: RankerRows, config: TrainingConfig, worker: Worker
) -> tuple[Ranker, RankingBatches]:
    viewer_VD = embed_needed_viewers(two_tower, rows, ranker_rows.viewer_row, worker)
    video_MD = embed_videos(two_tower, rows.videos)
    ranker = prepared_ranker(rows, ranker_rows, config)
    batches = RankingBatches(
        rows, ranker_rows, viewer_VD, video_MD, config.ranker_loop, seed=config.seed, worker=worker
    )
    return ranker, batches


def fitted_from(state: State, config: TrainingConfig, dimensions: FeatureDimensions) -> FittedModels:
    """Returns the models of the last checkpoint of ``fit``.

    Raises:
        TrainingError: if the checkpoint is of a run that has not finished.
    """
    finished = state["finished"]
    towers = [TWO_TOWER, HOLDOUT_TWO_TOWER] if config.ranker_holdout else [TWO_TOWER]
    if missing := {*towers, RANKER} - set(finished):
        raise TrainingError(f"checkpoint lacks {sorted(missing)}: the run has not finished; train again to resume it")
    loaded = {}
    for stage in towers:
        loaded[stage] = TwoTower(config.two_tower, dimensions)
        RetrievalObjective(loaded[stage]).load_state_dict(finished[stage]["objective"])
        loaded[stage].eval()
    ranker = Ranker(config.ranker, config.two_tower.dim, dimensions)
    RankingObjective(ranker).load_state_dict(finished[RANKER]["objective"])
    curves = {stage: stage_state["curve"] for stage, stage_state in finished.items()}
    return FittedModels(loaded[TWO_TOWER], ranker.eval(), curves, loaded[towers[-1]])


def prepared_two_tower(rows: TrainingRows, window: TrainingSplit, config: TrainingConfig) -> TwoTower:
    """Returns an untrained model with the window's statistics and known ids."""
    torch.manual_seed(config.seed)
    model = TwoTower(config.two_tower, rows.dimensions)
    index = window.training(rows)
    viewer_row, video_row = np.unique(rows.viewer_row[index]), np.unique(rows.video_row[index])
    model.viewer_tower.dense.fit(as_tensor(rows.viewers.viewer_dense[viewer_row]))
    model.video_tower.static.fit(as_tensor(rows.videos.video_static_dense[video_row]))
    model.ids.mark_known(as_tensor(rows.videos.video_codes[video_row]))
    model.video_tower.creators.mark_known(as_tensor(rows.videos.creator_codes[video_row]))
    return model


def prepared_ranker(rows: TrainingRows, ranker_rows: RankerRows, config: TrainingConfig) -> Ranker:
    """Returns an untrained ranker with fitted statistics and base rates, and constant heads for one-class labels."""
    torch.manual_seed(config.seed + 1)
    ranker = Ranker(config.ranker, config.two_tower.dim, rows.dimensions)
    ranker.viewer_dense.fit(as_tensor(rows.viewers.viewer_dense[np.unique(ranker_rows.viewer_row)]))
    ranker.video_dense.fit(as_tensor(ranker_rows.video_dense))
    videos = np.unique(ranker_rows.video_row)
    ranker.creators.mark_known(as_tensor(rows.videos.creator_codes[videos]))
    ranker.initialise_output_bias(torch.from_numpy(base_outputs(ranker_rows.labels)))
    for task, logit in constant_heads(ranker_rows.labels).items():
        ranker.set_constant_head(task, logit)
    return ranker


def base_outputs(labels_NK: F32) -> F32:
    """Returns each head's output without any input, ``[K]``: logit of the base rate, or mean of log1p(seconds)."""
    binary = labels_NK[:, : len(BINARY_TASKS)].astype(np.float64)
    rate = (binary.sum(axis=0) + 0.5) / (len(binary) + 1)  # Jeffreys prior: finite for one class
    watch = np.log1p(labels_NK[:, len(BINARY_TASKS)]).mean()
    return np.append(np.log(rate / (1 - rate)), watch).astype(np.float32)


def constant_heads(labels_NK: F32) -> dict[str, float]:
    """Returns the binary heads whose labels have one class only, with the logit of their base rate."""
    outputs_K = base_outputs(labels_NK)
    means_K = labels_NK.mean(axis=0)
    return {task: float(outputs_K[k]) for k, task in enumerate(BINARY_TASKS) if means_K[k] in (0.0, 1.0)}


def base_rates(labels_NK: F32) -> dict[str, float]:
    """Returns the mean label per head."""
    means_K = labels_NK.astype(np.float64).mean(axis=0)
    return {task: float(means_K[k]) for k, task in enumerate(RANKER_TASKS)}


def embed_needed_viewers(
    model: TwoTower, rows: TrainingRows, viewer_row: NDArray[np.int32], worker: Worker = SINGLE_WORKER
) -> F32:
    """Returns ``[V, D]`` with the embeddings of these viewer rows; the other rows are zero.

    Each worker embeds a share, and the workers exchange their shares.
    """
    needed = np.unique(viewer_row)
    out_VD = np.zeros((len(rows.viewers.viewer_dense), model.config.dim), dtype=np.float32)
    shares = np.array_split(needed, worker.world)
    worker_rows = shares[worker.rank]
    worker_embeddings = embed_viewers(model, select_viewers(rows, worker_rows))
    if worker.world == 1:
        out_VD[worker_rows] = worker_embeddings
        return out_VD
    for rank, share in enumerate(shares):
        part = torch.from_numpy(worker_embeddings) if rank == worker.rank else torch.empty(len(share), model.config.dim)
        dist.broadcast(part, src=rank)
        out_VD[share] = part.numpy()
    return out_VD


def select_viewers(rows: TrainingRows, index: NDArray[Any]) -> ViewerArrays:
    viewers = rows.viewers
    return ViewerArrays(
        viewers.viewer_dense[index],
        viewers.viewer_categories[index],
        viewers.history_codes[index],
        viewers.history_weights[index],
        viewers.history_age_h[index],
    )


class _StageCheckpointer:
    """One checkpoint for several stages: weights of the finished stages, and the state of the stage in progress."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.loaded = checkpoints.load() or {"finished": {}, "under_way": None}
        self.finished: dict[str, Any] = dict(self.loaded["finished"])

    @property
    def curves(self) -> dict[str, list[dict[str, float]]]:
        return {stage: stage_state["curve"] for stage, stage_state in self.finished.items()}

    def keep_all(self) -> None:
        """Saves the last checkpoint, in which all stages are finished."""
        self.checkpoints.save({"finished": self.finished, "under_way": None}, {})

    def run(self, stage: str, objective: nn.Module, train_stage: Callable[..., list[dict[str, float]]]) -> None:
        """Trains a stage, or loads it if an earlier run finished it."""
        if stage in self.finished:
            objective.load_state_dict(self.finished[stage]["objective"])
            objective.eval()
            return
        curve = train_stage(stage=stage, checkpoints=_StageCheckpoints(self, stage))
        objective.cpu()
        self.finished[stage] = {"objective": objective.state_dict(), "curve": curve}


class _StageCheckpoints:
    def __init__(self, stages: _StageCheckpointer, stage: str) -> None:
        self.stages, self.stage = stages, stage

    def save(self, state: State, metrics: dict[str, float]) -> None:
        named = {f"{self.stage}/{name}": value for name, value in metrics.items()}
        self.stages.checkpoints.save({"finished": self.stages.finished, "under_way": state}, named)

    def load(self) -> State | None:
        unfinished: State | None = self.stages.loaded["under_way"]
        return unfinished if unfinished is not None and unfinished["stage"] == self.stage else None
