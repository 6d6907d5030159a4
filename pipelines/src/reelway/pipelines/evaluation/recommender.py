"""The trained models as a recommender that evaluation can ask: retrieval, then ranking.

Features are as of the moment asked, from the run's feature store; the arithmetic of the value is the one that serving
uses. It refuses to look at anything later than that moment.
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
from reelway.pipelines.evaluation.harness import Pairs, Question, best_unseen
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
class Catalogue:
    """The videos that may be answered, as of a moment."""

    video_ids: I64  # [M] ascending
    arrays: VideoArrays
    embedding: F32  # [M, D]
    content: F32  # [M, visual + audio + text]: for the diversity of slates
    creator_ids: I64  # [M]

    def __len__(self) -> int:
        return len(self.video_ids)


def make_catalogue(models: TrainedModels, snapshot: pa.Table, at_s: float) -> Catalogue:
    """A snapshot of video features (``features.training_rows.video_snapshot``) with its embeddings."""
    from reelway.pipelines.training.inference import embed_videos

    columns = columns_from_table(snapshot)
    arrays = assemble_videos(columns, np.full(snapshot.num_rows, at_s), models.dimensions)
    content = np.concatenate([arrays.visual, arrays.audio, arrays.text], axis=1)
    creator = np.asarray(columns["creator_id"], dtype=np.float64)
    return Catalogue(
        video_ids=snapshot["video_id"].to_numpy(),
        arrays=arrays,
        embedding=embed_videos(models.two_tower, arrays),
        content=content.astype(np.float32),
        creator_ids=np.where(np.isnan(creator), PAD, creator).astype(np.int64),
    )


def make_viewers(
    models: TrainedModels, snapshot: pa.Table, at_s: float | F64, device: Sequence[str | None] | None = None
) -> ViewerArrays:
    """A snapshot of viewer features as model inputs."""
    moment_s = np.broadcast_to(np.asarray(at_s, dtype=np.float64), snapshot.num_rows)
    devices = [UNKNOWN_DEVICE] * snapshot.num_rows if device is None else device
    return assemble_viewers(columns_from_table(snapshot), moment_s, devices, models.dimensions)


def usual_devices(before: pa.Table, viewer_ids: I64) -> list[str | None]:
    """The device of each viewer's latest impression; unknown without any."""
    viewer = before["viewer_id"].to_numpy()
    device = before["device"].cast(pa.string()).combine_chunks()
    last = dict(zip(viewer.tolist(), range(len(viewer)), strict=True))
    return [device[last[v]].as_py() if v in last else UNKNOWN_DEVICE for v in viewer_ids.tolist()]


class TwoStage:
    """Candidates from the two-tower and from what is popular, ordered by the ranker's value."""

    def __init__(self, models: TrainedModels, catalogue: Catalogue, blend: Blend | None = None) -> None:
        self.models, self.catalogue = models, catalogue
        self.blend = blend or Blend()

    def embed(self, viewers: ViewerArrays) -> F32:
        """``[B, D]``."""
        from reelway.pipelines.training.inference import embed_viewers

        return embed_viewers(self.models.two_tower, viewers)

    def candidates(self, similarity_BM: F32, allowed_BM: NDArray[np.bool_], popularity_M: F64) -> I64:
        """Rows of the catalogue ``[B, C]``, ``PAD`` where fewer are allowed.

        The popular sources' share of the places goes to the most popular, the rest to the most similar.
        """
        places = min(self.blend.retrieval.candidates, similarity_BM.shape[1])
        quotas = self.blend.retrieval.quotas
        popular_places = round(places * (quotas.get("popular", 0.0) + quotas.get("trending", 0.0)))
        order_BM = np.where(allowed_BM, similarity_BM.astype(np.float64), -np.inf)
        if popular_places:
            liked_BM = np.where(allowed_BM, popularity_M, -np.inf)
            top_BP = np.argpartition(-liked_BM, popular_places - 1, axis=1)[:, :popular_places]
            lift_BP = np.where(np.take_along_axis(allowed_BM, top_BP, axis=1), 1e3, -np.inf)
            np.put_along_axis(order_BM, top_BP, lift_BP, axis=1)
        rows_BC = np.argpartition(-order_BM, places - 1, axis=1)[:, :places]
        rows_BC = np.sort(rows_BC, axis=1)
        return np.where(np.take_along_axis(allowed_BM, rows_BC, axis=1), rows_BC, PAD)

    def values(self, viewers: ViewerArrays, embedding_BD: F32, rows_BC: I64) -> F32:
        """The value of each candidate as serving computes it, ``[B, C]``; ``-inf`` at pads."""
        from reelway.pipelines.training.inference import ranker_inputs, score

        there_BC = rows_BC != PAD
        viewer_N, row_N = np.nonzero(there_BC)[0], rows_BC[there_BC]
        video_ND = self.catalogue.embedding[row_N]
        inputs = ranker_inputs(viewers, embedding_BD, _taken(self.catalogue.arrays, row_N), video_ND)
        predictions_NK = head_predictions(score(self.models.ranker, inputs, viewer_N), self.models.calibration)
        similarity_N = np.einsum("nd,nd->n", embedding_BD[viewer_N], video_ND)
        values_BC = np.full(rows_BC.shape, -np.inf, dtype=np.float32)
        values_BC[there_BC] = video_value(predictions_NK, similarity_N, self.blend.ranking)
        return values_BC

    def order(self, viewers: ViewerArrays, allowed_BM: NDArray[np.bool_], popularity_M: F64, k: int) -> tuple[I64, F32]:
        """The best ``k`` rows of the catalogue and their values, ``[B, k]``; ``PAD`` and ``-inf`` where fewer."""
        rows_BK = np.full((len(viewers.viewer_dense), k), PAD, dtype=np.int64)
        values_BK = np.full(rows_BK.shape, -np.inf, dtype=np.float32)
        for start in range(0, len(rows_BK), _VIEWERS_AT_ONCE):
            part = slice(start, start + _VIEWERS_AT_ONCE)
            some = _taken(viewers, part)
            embedding_BD = self.embed(some)
            rows_BC = self.candidates(embedding_BD @ self.catalogue.embedding.T, allowed_BM[part], popularity_M)
            values_BC = self.values(some, embedding_BD, rows_BC)
            best_BK = np.argsort(-values_BC, axis=1, kind="stable")[:, :k]
            rows_BK[part, : best_BK.shape[1]] = np.take_along_axis(rows_BC, best_BK, axis=1)
            values_BK[part, : best_BK.shape[1]] = np.take_along_axis(values_BC, best_BK, axis=1)
        return rows_BK, values_BK


class Ranked:
    """``TwoStage`` behind the harness: retrieval and ranking over the question's catalogue."""

    def __init__(self, stages: TwoStage, viewers: ViewerArrays, question: Question) -> None:
        self.stages, self.viewers, self.question = stages, viewers, question
        self.popularity_M = popularity_counts(question, RECENT_SHARE)

    def rank(self, viewer_ids: I64, k: int) -> I64:
        _refuse_others(viewer_ids, self.question)
        shape = (len(viewer_ids), len(self.stages.catalogue))
        allowed_BM = ~self.question.seen.has(viewer_ids, np.broadcast_to(np.arange(shape[1]), shape))
        rows_BK, _ = self.stages.order(self.viewers, allowed_BM, self.popularity_M, k)
        return np.where(rows_BK == PAD, PAD, self.stages.catalogue.video_ids[rows_BK])


class RetrievedOnly:
    """The two-tower's similarity alone."""

    def __init__(self, stages: TwoStage, viewers: ViewerArrays, question: Question) -> None:
        self.stages, self.viewers, self.question = stages, viewers, question

    def rank(self, viewer_ids: I64, k: int) -> I64:
        _refuse_others(viewer_ids, self.question)
        similarity_BM = self.stages.embed(self.viewers) @ self.stages.catalogue.embedding.T
        return best_unseen(similarity_BM, viewer_ids, self.question.seen, k)


def recommenders_at_cut(
    models: TrainedModels, features_dir: Path, question: Question, blend: Blend | None = None
) -> tuple[Ranked, RetrievedOnly, Catalogue]:
    """Both, with features as of the question's cut, over the question's catalogue."""
    from reelway.pipelines.features.training_rows import video_snapshot, viewer_snapshot

    videos = video_snapshot(features_dir, question.cut_s)
    videos = videos.filter(pa.array(np.isin(videos["video_id"].to_numpy(), question.videos)))
    # a video that was shown before its upload time (clocks disagree) has no row: it cannot be answered by us
    catalogue = make_catalogue(models, videos, question.cut_s)
    if len(catalogue) != len(question.videos):
        question = _narrowed(question, catalogue.video_ids)
    snapshot = viewer_snapshot(features_dir, question.viewer_ids, question.cut_s)
    viewers = make_viewers(models, snapshot, question.cut_s, usual_devices(question.before, question.viewer_ids))
    stages = TwoStage(models, catalogue, blend)
    return Ranked(stages, viewers, question), RetrievedOnly(stages, viewers, question), catalogue


def _narrowed(question: Question, videos: I64) -> Question:
    def pairs(wide: Pairs) -> Pairs:
        viewer, row = np.divmod(wide.keys, len(wide.videos))
        return Pairs.of(viewer, wide.videos[row], videos)

    return dataclasses.replace(question, videos=videos, seen=pairs(question.seen), relevant=pairs(question.relevant))


def _refuse_others(viewer_ids: I64, question: Question) -> None:
    if not np.array_equal(viewer_ids, question.viewer_ids):
        raise ValueError("asked about other viewers than the question's; their features were not read")


def _taken(arrays: Any, index: I64 | slice) -> Any:
    return type(arrays)(**{f.name: getattr(arrays, f.name)[index] for f in dataclasses.fields(arrays)})
