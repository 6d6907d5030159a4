"""Recommenders for evaluation that use the trained models: retrieval followed by ranking.

Features come from the feature store of the run as of the cut; later data is never read. The value of a candidate is
computed by the same code as in serving.
"""

# Shapes: B viewers, M videos of the catalogue, C candidates, D embedding, K tasks

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.pipelines.evaluation.baselines import RECENT_SHARE, popularity_counts
from reelway.pipelines.evaluation.harness import TemporalSplit, ViewerVideoPairs, top_unseen
from reelway.pipelines.evaluation.metrics import PAD
from reelway.platform.contracts.blend import Blend
from reelway.platform.features.assembly import (
    VideoArrays,
    ViewerArrays,
    assemble_videos,
    assemble_viewers,
    columns_from_table,
)
from reelway.platform.features.scoring import head_predictions, video_value

if TYPE_CHECKING:
    from reelway.pipelines.training.artifacts import TrainedModels

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

UNKNOWN_DEVICE: Final = "unknown"
_VIEWERS_AT_ONCE: Final = 64


@dataclass(frozen=True)
class VideoCatalogue:
    """Videos that can be recommended at a given time, with their features and embeddings."""

    video_ids: I64  # [M] ascending
    arrays: VideoArrays
    embedding: F32  # [M, D]
    content: F32  # [M, visual + audio + text]: for slate diversity
    creator_ids: I64  # [M]

    def __len__(self) -> int:
        return len(self.video_ids)


def make_catalogue(models: TrainedModels, snapshot: pa.Table, at_s: float) -> VideoCatalogue:
    """Builds the catalogue from a snapshot of video features (``features.training_rows.video_snapshot``)."""
    from reelway.pipelines.training.inference import embed_videos

    columns = columns_from_table(snapshot)
    arrays = assemble_videos(columns, np.full(snapshot.num_rows, at_s), models.dimensions)
    content = np.concatenate([arrays.visual, arrays.audio, arrays.text], axis=1)
    creator = np.asarray(columns["creator_id"], dtype=np.float64)
    return VideoCatalogue(
        video_ids=snapshot["video_id"].to_numpy(),
        arrays=arrays,
        embedding=embed_videos(models.two_tower, arrays),
        content=content.astype(np.float32),
        creator_ids=np.where(np.isnan(creator), PAD, creator).astype(np.int64),
    )


def make_viewers(
    models: TrainedModels, snapshot: pa.Table, at_s: float | F64, device: Sequence[str | None] | None = None
) -> ViewerArrays:
    """Converts a snapshot of viewer features to model inputs."""
    moment_s = np.broadcast_to(np.asarray(at_s, dtype=np.float64), snapshot.num_rows)
    devices = [UNKNOWN_DEVICE] * snapshot.num_rows if device is None else device
    return assemble_viewers(columns_from_table(snapshot), moment_s, devices, models.dimensions)


def latest_devices(before: pa.Table, viewer_ids: I64) -> list[str | None]:
    """Returns the device of each viewer's latest impression, or ``unknown`` without one."""
    viewer = before["viewer_id"].to_numpy()
    device = before["device"].cast(pa.string()).combine_chunks()
    last = dict(zip(viewer.tolist(), range(len(viewer)), strict=True))
    return [device[last[v]].as_py() if v in last else UNKNOWN_DEVICE for v in viewer_ids.tolist()]


class TwoStageRecommender:
    """Candidates of the two-tower model and of popularity, ordered by the value that the ranker predicts."""

    def __init__(self, models: TrainedModels, catalogue: VideoCatalogue, blend: Blend | None = None) -> None:
        self.models, self.catalogue = models, catalogue
        self.blend = blend or Blend()

    def embed(self, viewers: ViewerArrays) -> F32:
        """Returns viewer embeddings, ``[B, D]``."""
        from reelway.pipelines.training.inference import embed_viewers

        return embed_viewers(self.models.two_tower, viewers)

    def candidates(self, similarity_BM: F32, allowed_BM: NDArray[np.bool_], popularity_M: F64) -> I64:
        """Returns catalogue rows ``[B, C]``, padded with ``PAD``.

        The quota of the popularity sources is filled with the most popular videos, the rest with the most similar.
        """
        positions = min(self.blend.retrieval.candidates, similarity_BM.shape[1])
        quotas = self.blend.retrieval.quotas
        popular_positions = round(positions * (quotas.get("popular", 0.0) + quotas.get("trending", 0.0)))
        order_BM = np.where(allowed_BM, similarity_BM.astype(np.float64), -np.inf)
        if popular_positions:
            liked_BM = np.where(allowed_BM, popularity_M, -np.inf)
            top_BP = np.argpartition(-liked_BM, popular_positions - 1, axis=1)[:, :popular_positions]
            lift_BP = np.where(np.take_along_axis(allowed_BM, top_BP, axis=1), 1e3, -np.inf)
            np.put_along_axis(order_BM, top_BP, lift_BP, axis=1)
        rows_BC = np.argpartition(-order_BM, positions - 1, axis=1)[:, :positions]
        rows_BC = np.sort(rows_BC, axis=1)
        return np.where(np.take_along_axis(allowed_BM, rows_BC, axis=1), rows_BC, PAD)

    def values(self, viewers: ViewerArrays, embedding_BD: F32, rows_BC: I64) -> F32:
        """Returns the value of each candidate as in serving, ``[B, C]``; ``-inf`` for padding."""
        from reelway.pipelines.training.inference import ranker_inputs, score

        present_BC = rows_BC != PAD
        viewer_N, row_N = np.nonzero(present_BC)[0], rows_BC[present_BC]
        video_ND = self.catalogue.embedding[row_N]
        inputs = ranker_inputs(viewers, embedding_BD, _select_rows(self.catalogue.arrays, row_N), video_ND)
        predictions_NK = head_predictions(score(self.models.ranker, inputs, viewer_N), self.models.calibration)
        similarity_N = np.einsum("nd,nd->n", embedding_BD[viewer_N], video_ND)
        values_BC = np.full(rows_BC.shape, -np.inf, dtype=np.float32)
        values_BC[present_BC] = video_value(predictions_NK, similarity_N, self.blend.ranking)
        return values_BC

    def order(self, viewers: ViewerArrays, allowed_BM: NDArray[np.bool_], popularity_M: F64, k: int) -> tuple[I64, F32]:
        """Returns the best ``k`` catalogue rows and their values, ``[B, k]``, padded with ``PAD`` and ``-inf``."""
        rows_BK = np.full((len(viewers.viewer_dense), k), PAD, dtype=np.int64)
        values_BK = np.full(rows_BK.shape, -np.inf, dtype=np.float32)
        for start in range(0, len(rows_BK), _VIEWERS_AT_ONCE):
            part = slice(start, start + _VIEWERS_AT_ONCE)
            chunk = _select_rows(viewers, part)
            embedding_BD = self.embed(chunk)
            rows_BC = self.candidates(embedding_BD @ self.catalogue.embedding.T, allowed_BM[part], popularity_M)
            values_BC = self.values(chunk, embedding_BD, rows_BC)
            best_BK = np.argsort(-values_BC, axis=1, kind="stable")[:, :k]
            rows_BK[part, : best_BK.shape[1]] = np.take_along_axis(rows_BC, best_BK, axis=1)
            values_BK[part, : best_BK.shape[1]] = np.take_along_axis(values_BC, best_BK, axis=1)
        return rows_BK, values_BK


class RankingRecommender:
    """Retrieval and ranking over the catalogue of a split, as a ``Recommender``."""

    def __init__(self, stages: TwoStageRecommender, viewers: ViewerArrays, split: TemporalSplit) -> None:
        self.stages, self.viewers, self.split = stages, viewers, split
        self.popularity_M = popularity_counts(split, RECENT_SHARE)

    def rank(self, viewer_ids: I64, k: int) -> I64:
        _check_viewers(viewer_ids, self.split)
        shape = (len(viewer_ids), len(self.stages.catalogue))
        allowed_BM = ~self.split.seen.has(viewer_ids, np.broadcast_to(np.arange(shape[1]), shape))
        rows_BK, _ = self.stages.order(self.viewers, allowed_BM, self.popularity_M, k)
        return np.where(rows_BK == PAD, PAD, self.stages.catalogue.video_ids[rows_BK])


class RetrievalOnlyRecommender:
    """Two-tower similarity without ranking, as a ``Recommender``."""

    def __init__(self, stages: TwoStageRecommender, viewers: ViewerArrays, split: TemporalSplit) -> None:
        self.stages, self.viewers, self.split = stages, viewers, split

    def rank(self, viewer_ids: I64, k: int) -> I64:
        _check_viewers(viewer_ids, self.split)
        similarity_BM = self.stages.embed(self.viewers) @ self.stages.catalogue.embedding.T
        return top_unseen(similarity_BM, viewer_ids, self.split.seen, k)


def recommenders_at_cut(
    models: TrainedModels, features_dir: Path, split: TemporalSplit, blend: Blend | None = None
) -> tuple[RankingRecommender, RetrievalOnlyRecommender, VideoCatalogue]:
    """Returns both recommenders and their catalogue, with features as of the cut."""
    from reelway.pipelines.features.training_rows import video_snapshot, viewer_snapshot

    videos = video_snapshot(features_dir, split.cut_s)
    videos = videos.filter(pa.array(np.isin(videos["video_id"].to_numpy(), split.videos)))
    # A video whose first impression precedes its upload time (clock skew) has no feature row and cannot be recommended.
    catalogue = make_catalogue(models, videos, split.cut_s)
    if len(catalogue) != len(split.videos):
        split = _restricted_split(split, catalogue.video_ids)
    snapshot = viewer_snapshot(features_dir, split.viewer_ids, split.cut_s)
    viewers = make_viewers(models, snapshot, split.cut_s, latest_devices(split.before, split.viewer_ids))
    stages = TwoStageRecommender(models, catalogue, blend)
    return RankingRecommender(stages, viewers, split), RetrievalOnlyRecommender(stages, viewers, split), catalogue


def _restricted_split(split: TemporalSplit, videos: I64) -> TemporalSplit:
    def pairs(wide: ViewerVideoPairs) -> ViewerVideoPairs:
        viewer, row = np.divmod(wide.keys, len(wide.videos))
        return ViewerVideoPairs.of(viewer, wide.videos[row], videos)

    return dataclasses.replace(split, videos=videos, seen=pairs(split.seen), relevant=pairs(split.relevant))


def _check_viewers(viewer_ids: I64, split: TemporalSplit) -> None:
    if not np.array_equal(viewer_ids, split.viewer_ids):
        raise ValueError("viewer_ids: they differ from the viewers of the split; pass its viewer_ids")


def _select_rows(arrays: Any, index: I64 | slice) -> Any:
    return type(arrays)(**{f.name: getattr(arrays, f.name)[index] for f in dataclasses.fields(arrays)})
