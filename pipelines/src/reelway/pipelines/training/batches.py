"""Selects the rows of each training step.

The selection is a pure function of seed, epoch, step and worker, so a restart needs no saved state. A batch consists of
viewer rows (requests) with all their training rows. The viewer tower therefore runs once per request instead of once
per row, with the same result.
"""

# Shapes: R rows of a batch, V viewer rows of a batch, P pool of videos, M all videos

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reelway.pipelines.models.losses import log_inclusion
from reelway.pipelines.training.config import LoopConfig, RetrievalDataConfig
from reelway.pipelines.training.negatives import RankerRows
from reelway.pipelines.training.rows import TrainingRows
from reelway.platform.contracts.feature_names import VIDEO_TOWER_INPUTS, VIEWER_TOWER_INPUTS
from reelway.platform.errors import TrainingError

I64 = NDArray[np.int64]

_DAY_S = 86_400.0


class Batches(Protocol):
    """Batches of one worker. The loop may request them in any order."""

    steps: int
    """Steps per epoch; equal on all workers."""

    def batch(self, epoch: int, step: int) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Worker:
    """Rank and number of the data-parallel workers."""

    rank: int = 0
    world: int = 1


SINGLE_WORKER: Final = Worker()


def as_tensor(values: NDArray[Any]) -> Tensor:
    """Returns a copy as a tensor, integers widened to the 64 bits that embedding lookups require."""
    kind = np.int64 if values.dtype.kind in "iu" else values.dtype
    return torch.from_numpy(np.array(values, dtype=kind))


class GroupedBatchOrder:
    """Order of the rows, grouped by viewer row. Each epoch has its own order of all rows, cut into equal steps."""

    def __init__(self, viewer_row: NDArray[np.int32], loop: LoopConfig, seed: int, worker: Worker) -> None:
        self.members = np.argsort(viewer_row, kind="stable")
        starts = np.flatnonzero(np.diff(viewer_row[self.members], prepend=-1))
        self.starts = np.append(starts, len(viewer_row))
        groups = len(starts)
        if groups < worker.world:
            raise TrainingError(
                f"training has {groups} distinct viewer rows for {worker.world} workers, expected at least one per "
                "worker; use fewer workers (--workers) or more data"
            )
        steps = max(1, round(len(viewer_row) / loop.batch_size))
        self.all_steps = min(steps, groups // worker.world)
        self.steps = min(self.all_steps, loop.max_steps_per_epoch or self.all_steps)
        self.seed, self.worker = seed, worker
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)

    def rows(self, epoch: int, step: int) -> I64:
        """Returns the indices of this worker's rows, group after group."""
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.starts) - 1)
            self._epoch = epoch
        step_groups = np.array_split(self._order, self.all_steps)[step]
        worker_groups = np.array_split(step_groups, self.worker.world)[self.worker.rank]
        lengths = self.starts[worker_groups + 1] - self.starts[worker_groups]
        ends = np.cumsum(lengths)
        take = np.arange(ends[-1]) + np.repeat(self.starts[worker_groups] - (ends - lengths), lengths)
        rows: I64 = self.members[take]
        return rows


class RetrievalBatches:
    """The window's positives and, per step, a pool of in-batch and uniformly drawn videos."""

    def __init__(
        self,
        rows: TrainingRows,
        index: I64,
        data: RetrievalDataConfig,
        loop: LoopConfig,
        *,
        seed: int,
        worker: Worker = SINGLE_WORKER,
    ) -> None:
        self.index = index[rows.weight[index] > 0]
        if not len(self.index):
            raise TrainingError(
                f"none of {len(index)} training rows has a positive outcome weight, and the two-tower learns from "
                "positives; check the data set's outcomes and the training window"
            )
        self.rows, self.data, self.seed, self.worker = rows, data, seed, worker
        self.order = GroupedBatchOrder(rows.viewer_row[self.index], loop, seed, worker)
        self.steps = self.order.steps
        self.weight = np.minimum(rows.weight[self.index], data.weight_cap).astype(np.float32)
        if data.recency_half_life_d is not None:
            age_d = (rows.event_time_s[self.index].max() - rows.event_time_s[self.index]) / _DAY_S
            self.weight *= np.exp2(-age_d / data.recency_half_life_d).astype(np.float32)
        # videos of the window; later videos are unknown at that time
        self.catalogue = np.unique(rows.video_row[index])
        share = np.bincount(rows.video_row[self.index], minlength=len(rows.video_ids)) / len(self.index)
        self.share = torch.from_numpy(share)
        self.video_tensors = {name: as_tensor(getattr(rows.videos, name)) for name in VIDEO_TOWER_INPUTS}

    def batch(self, epoch: int, step: int) -> dict[str, Tensor]:
        """Returns the tensors of ``RetrievalObjective``."""
        chosen = self.order.rows(epoch, step)
        row = self.index[chosen]
        viewer, row_viewer = np.unique(self.rows.viewer_row[row], return_inverse=True)
        video = self.rows.video_row[row]
        pool, log_q = self._pool(video, epoch, step)
        pool_index = torch.from_numpy(pool)
        return {
            **viewer_tensors(self.rows, viewer),
            **{name: values[pool_index] for name, values in self.video_tensors.items()},
            "row_viewer": as_tensor(row_viewer),
            "viewer_id": as_tensor(self.rows.viewer_id[row]),
            "target": as_tensor(np.searchsorted(pool, video)),
            "weight": as_tensor(self.weight[chosen]),
            "log_q": log_q,
        }

    def _pool(self, video: NDArray[np.int32], epoch: int, step: int) -> tuple[I64, Tensor]:
        """Returns ascending, distinct video rows and their log probabilities of being in the pool, scaled."""
        uniform = self.data.uniform_negatives
        if uniform >= len(self.catalogue):
            return self.catalogue.astype(np.int64), torch.zeros(len(self.catalogue))
        random = np.random.default_rng([self.seed, epoch, step, self.worker.rank, 1])
        drawn = self.catalogue[random.integers(0, len(self.catalogue), uniform)]
        pool = np.unique(np.concatenate([video, drawn])).astype(np.int64)
        log_q = log_inclusion(self.share[torch.from_numpy(pool)], len(video), 1 / len(self.catalogue), uniform)
        return pool, log_q * self.data.log_q_power


class RankingBatches:
    """The ranker's rows, with the embeddings of the frozen two-tower."""

    def __init__(
        self,
        rows: TrainingRows,
        ranker_rows: RankerRows,
        viewer_embedding: NDArray[np.float32],
        video_embedding: NDArray[np.float32],
        loop: LoopConfig,
        *,
        seed: int,
        worker: Worker = SINGLE_WORKER,
    ) -> None:
        self.rows, self.ranker_rows = rows, ranker_rows
        self.viewer_embedding, self.video_embedding = viewer_embedding, video_embedding
        self.order = GroupedBatchOrder(ranker_rows.viewer_row, loop, seed, worker)
        self.steps = self.order.steps

    def batch(self, epoch: int, step: int) -> dict[str, Tensor]:
        """Returns the tensors of ``RankingObjective``."""
        chosen = self.order.rows(epoch, step)
        return ranking_tensors(self.rows, self.ranker_rows, self.viewer_embedding, self.video_embedding, chosen)


def ranking_tensors(
    rows: TrainingRows,
    ranker_rows: RankerRows,
    viewer_embedding: NDArray[np.float32],
    video_embedding: NDArray[np.float32],
    chosen: I64,
) -> dict[str, Tensor]:
    """Returns the ranker's inputs for the chosen rows, with positions and labels."""
    viewer, row_viewer = np.unique(ranker_rows.viewer_row[chosen], return_inverse=True)
    video = ranker_rows.video_row[chosen]
    return {
        "viewer_dense": as_tensor(rows.viewers.viewer_dense[viewer]),
        "viewer_categories": as_tensor(rows.viewers.viewer_categories[viewer]),
        "viewer_embedding": as_tensor(viewer_embedding[viewer]),
        "video_dense": as_tensor(ranker_rows.video_dense[chosen]),
        "video_categories": as_tensor(rows.videos.video_categories[video]),
        "creator_codes": as_tensor(rows.videos.creator_codes[video]),
        "video_embedding": as_tensor(video_embedding[video]),
        "row_viewer": as_tensor(row_viewer),
        "position": as_tensor(ranker_rows.position[chosen]),
        "labels": as_tensor(ranker_rows.labels[chosen]),
    }


def viewer_tensors(rows: TrainingRows, viewer: NDArray[Any]) -> dict[str, Tensor]:
    """Returns the viewer tower's inputs for these viewer rows."""
    return {name: as_tensor(getattr(rows.viewers, name)[viewer]) for name in VIEWER_TOWER_INPUTS}


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: values.to(device, non_blocking=True) for name, values in batch.items()}
