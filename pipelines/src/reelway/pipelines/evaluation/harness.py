"""Ranking evaluation on a temporal split: rankings are compared with later long watches.

The split fixes the evaluated viewers, the catalogue, the relevant videos and the seen videos, so that all recommenders
are compared on the same task. A recommender never receives data from after the cut.
"""

# Shapes: B viewers, M videos of the catalogue, K positions, N events

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.pipelines.evaluation import metrics
from reelway.pipelines.evaluation.metrics import PAD, BootstrapEstimate
from reelway.pipelines.features.labels import times_us
from reelway.platform.errors import EmptyDatasetError

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

RECALL_K: Final = 50
NDCG_K: Final = 10
RANKING_DEPTH: Final = 50
"""Number of ranked positions that are evaluated."""
MIN_EVENTS: Final = 5
MAX_VIEWERS: Final = 2000


class Recommender(Protocol):
    """Ranks videos for viewers with the data before the cut."""

    def rank(self, viewer_ids: I64, k: int) -> I64:
        """Returns the ids of the best ``k`` unseen videos per viewer, best first, ``[B, k]``, padded with ``PAD``."""
        ...


@dataclass(frozen=True)
class ViewerVideoPairs:
    """A set of (viewer, video) pairs as sorted integer keys, for vectorised membership tests."""

    videos: I64  # [M] ascending: the catalogue
    keys: I64

    @classmethod
    def of(cls, viewer_id: I64, video_id: I64, videos: I64) -> ViewerVideoPairs:
        """Returns the pairs whose video is in the catalogue."""
        row = catalogue_rows(videos, video_id)
        return cls(videos, np.unique(viewer_id[row != PAD] * len(videos) + row[row != PAD]))

    def has(self, viewer_ids_B: I64, rows_BK: I64) -> NDArray[np.bool_]:
        """Returns which videos (catalogue rows or ``PAD``) form a pair with their viewer, ``[B, K]``."""
        if not len(self.keys):
            return np.zeros(rows_BK.shape, dtype=np.bool_)
        keys = viewer_ids_B[:, None] * len(self.videos) + rows_BK
        present = self.keys[np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)] == keys
        return np.asarray(present & (rows_BK != PAD))

    def rows_of(self, viewer_id: int) -> I64:
        """Returns the catalogue rows of one viewer."""
        first, last = np.searchsorted(self.keys, [viewer_id * len(self.videos), (viewer_id + 1) * len(self.videos)])
        return np.asarray(self.keys[first:last] - viewer_id * len(self.videos))

    def counts(self, viewer_ids_B: I64) -> I64:
        """Returns the number of videos per viewer, ``[B]``."""
        edges = np.stack([viewer_ids_B, viewer_ids_B + 1]) * len(self.videos)
        first, last = np.searchsorted(self.keys, edges)
        return np.asarray(last - first)


@dataclass(frozen=True)
class TemporalSplit:
    """A temporal split of the events: data before the cut for recommenders, later data as ground truth."""

    cut_s: float
    viewer_ids: I64  # [B] evaluated viewers
    videos: I64  # [M] catalogue: every video that was shown before the cut
    seen: ViewerVideoPairs  # before the cut; never relevant
    relevant: ViewerVideoPairs  # after the cut
    before: pa.Table  # labelled impressions before the cut

    @property
    def cut_us(self) -> int:
        return round(self.cut_s * 1e6)


def catalogue_rows(videos: I64, video_id: NDArray[Any]) -> I64:
    """Returns the row of each id in ascending ``videos``, or ``PAD`` for an unknown id."""
    if not len(videos):
        return np.full(np.shape(video_id), PAD, dtype=np.int64)
    row = np.minimum(np.searchsorted(videos, video_id), len(videos) - 1)
    return np.where(videos[row] == video_id, row, PAD)


def make_temporal_split(
    labels: pa.Table,
    cut_s: float,
    *,
    until_s: float = float("inf"),
    min_events: int = MIN_EVENTS,
    max_viewers: int = MAX_VIEWERS,
    seed: int = 0,
) -> TemporalSplit:
    """Splits labelled impressions (``features.labels.LABELLED_SCHEMA``) at ``cut_s``.

    A video is relevant if the viewer watched it long for the first time in ``[cut_s, until_s)`` and any viewer had seen
    it before the cut. Evaluated viewers have at least ``min_events`` impressions before the cut and a relevant video.

    Args:
        max_viewers: size of the seeded sample that is evaluated if there are more viewers.

    Raises:
        EmptyDatasetError: if no viewer can be evaluated.
    """
    time_s = times_us(labels["event_time"]) / 1e6
    viewer, video = labels["viewer_id"].to_numpy(), labels["video_id"].to_numpy()
    early = time_s < cut_s
    enjoyed = ~early & (time_s < until_s) & (labels["long_watch"].to_numpy() > 0)
    videos = np.unique(video[early])
    seen = ViewerVideoPairs.of(viewer[early], video[early], videos)
    later = ViewerVideoPairs.of(viewer[enjoyed], video[enjoyed], videos)
    relevant = ViewerVideoPairs(videos, np.setdiff1d(later.keys, seen.keys, assume_unique=True))
    ids, events = np.unique(viewer[early], return_counts=True)
    evaluated = ids[(events >= min_events) & (relevant.counts(ids) > 0)]
    if not len(evaluated):
        raise EmptyDatasetError(
            f"evaluation split: none of {len(ids)} viewers has {min_events} impressions before the cut and a new long "
            "watch after it, expected at least one; use more data or a smaller train_fraction"
        )
    if len(evaluated) > max_viewers:
        evaluated = np.sort(np.random.default_rng([seed, 4]).choice(evaluated, max_viewers, replace=False))
    return TemporalSplit(cut_s, evaluated, videos, seen, relevant, labels.filter(pa.array(early)))


def top_unseen(scores_BM: NDArray[np.floating[Any]], viewer_ids: I64, seen: ViewerVideoPairs, k: int) -> I64:
    """Returns the ids of the ``k`` best-scored unseen videos per viewer, ``[B, k]``; ties are ordered by id."""
    videos = len(seen.videos)
    allowed_BM = np.array(scores_BM, dtype=np.float64)
    allowed_BM[seen.has(viewer_ids, np.broadcast_to(np.arange(videos), allowed_BM.shape))] = -np.inf
    rows_BK = np.argsort(-allowed_BM, axis=1, kind="stable")[:, :k]
    ids_BK = seen.videos[rows_BK]
    ids_BK[~np.isfinite(np.take_along_axis(allowed_BM, rows_BK, axis=1))] = PAD
    return np.pad(ids_BK, ((0, 0), (0, max(0, k - videos))), constant_values=PAD)


@dataclass(frozen=True)
class RankingResult:
    """Metrics of one recommender: per viewer, for paired comparisons, and over all viewers."""

    recall: F64  # [B] at RECALL_AT
    ndcg: F64  # [B] at NDCG_AT
    coverage: float
    estimates: dict[str, BootstrapEstimate]


def evaluate_ranking(
    recommender: Recommender,
    split: TemporalSplit,
    *,
    content_MD: NDArray[np.floating[Any]] | None = None,
    seed: int = 0,
) -> RankingResult:
    """Ranks the catalogue for every viewer of the split and compares the ranking with later long watches.

    Args:
        content_MD: content vector of each catalogue video, for slate diversity; the metric is left out without them.
    """
    ranked_BK = recommender.rank(split.viewer_ids, RANKING_DEPTH)
    rows_BK = catalogue_rows(split.videos, ranked_BK)
    _check_unseen(split, rows_BK)
    hits_BK = split.relevant.has(split.viewer_ids, rows_BK)
    relevant_B = split.relevant.counts(split.viewer_ids)
    recall_B = metrics.recall(hits_BK, relevant_B, RECALL_K)
    ndcg_B = metrics.ndcg(hits_BK, relevant_B, NDCG_K)
    per_viewer: dict[str, F64] = {
        f"recall_at_{RECALL_K}": recall_B,
        f"ndcg_at_{NDCG_K}": ndcg_B,
        "mrr": metrics.reciprocal_rank(hits_BK, relevant_B),
    }
    if content_MD is not None:
        per_viewer["diversity_at_10"] = metrics.intra_list_diversity(rows_BK[:, :10], content_MD)
    estimates = {name: metrics.mean_estimate(values_B, seed=seed) for name, values_B in per_viewer.items()}
    covered = metrics.coverage(rows_BK, len(split.videos))
    return RankingResult(recall_B, ndcg_B, covered, estimates)


def evaluate_all(
    recommenders: Mapping[str, Recommender],
    split: TemporalSplit,
    *,
    content_MD: NDArray[np.floating[Any]] | None = None,
    seed: int = 0,
) -> dict[str, RankingResult]:
    """Evaluates several recommenders on the same split."""
    return {
        name: evaluate_ranking(recommender, split, content_MD=content_MD, seed=seed)
        for name, recommender in recommenders.items()
    }


def _check_unseen(split: TemporalSplit, rows_BK: I64) -> None:
    if split.seen.has(split.viewer_ids, rows_BK).any():
        raise ValueError("recommender: it returned videos that the viewer has already seen; rank unseen videos only")
