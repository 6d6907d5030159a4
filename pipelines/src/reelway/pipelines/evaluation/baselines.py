"""Baseline recommenders: recent popularity, all-time popularity and tuned matrix factorisation (ALS).

Baselines read only labelled impressions before the cut. ALS is tuned on an earlier cut within those impressions.
"""

# Shapes: B viewers, M videos, N impressions, U known viewers, F factors

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import scipy.sparse as sp
from numpy.typing import NDArray

from reelway.pipelines.evaluation.harness import (
    RANKING_DEPTH,
    RECALL_K,
    TemporalSplit,
    ViewerVideoPairs,
    catalogue_rows,
    make_temporal_split,
    top_unseen,
)
from reelway.pipelines.evaluation.metrics import PAD, ndcg, recall
from reelway.pipelines.features.labels import times_us
from reelway.platform.errors import EmptyDatasetError

I64 = NDArray[np.int64]
F64 = NDArray[np.float64]

RECENT_SHARE: Final = 0.1
VALIDATION_SHARE: Final = 0.1


class PopularityRecommender:
    """Ranks videos by their number of long watches in the last ``share`` of the impressions before the cut."""

    def __init__(self, split: TemporalSplit, share: float = 1.0) -> None:
        self.seen = split.seen
        self.counts_M = popularity_counts(split, share)

    def rank(self, viewer_ids: I64, k: int) -> I64:
        return top_unseen(
            np.broadcast_to(self.counts_M, (len(viewer_ids), len(self.counts_M))), viewer_ids, self.seen, k
        )


def popularity_counts(split: TemporalSplit, share: float) -> F64:
    """Returns long watches per catalogue video, ``[M]``, in the last ``share`` of the impressions before the cut."""
    order = np.argsort(times_us(split.before["event_time"]), kind="stable")
    late = order[len(order) - max(1, round(len(order) * share)) :]
    row = catalogue_rows(split.videos, split.before["video_id"].to_numpy()[late])
    enjoyed = (split.before["long_watch"].to_numpy()[late] > 0) & (row != PAD)
    return np.bincount(row[enjoyed], minlength=len(split.videos)).astype(np.float64)


@dataclass(frozen=True)
class AlsSettings:
    """Hyperparameters of ALS (Hu, Koren and Volinsky 2008). A positive has confidence ``1 + alpha``."""

    factors: int
    regularization: float
    alpha: float
    iterations: int = 15


ALS_GRID: Final = tuple(
    AlsSettings(factors, regularization, alpha)
    for factors, regularization, alpha in itertools.product((16, 32, 64), (0.01, 0.1, 1.0, 10.0), (1.0, 10.0))
)


class AlsRecommender:
    """Implicit-feedback matrix factorisation over long watches."""

    def __init__(self, split: TemporalSplit, settings: AlsSettings, *, seed: int = 0) -> None:
        from implicit.cpu.als import AlternatingLeastSquares

        self.seen, self.settings = split.seen, settings
        self.known, matrix = _matrix(split)
        model = AlternatingLeastSquares(
            factors=settings.factors,
            regularization=settings.regularization,
            alpha=settings.alpha,
            iterations=settings.iterations,
            random_state=seed,
            num_threads=1,
        )
        with _one_blas_thread():
            model.fit(matrix, show_progress=False)
        self.viewer_UF, self.video_MF = model.user_factors, model.item_factors
        # An unknown viewer gets the mean viewer vector.
        self.mean_F = self.viewer_UF.mean(axis=0)

    def scores(self, viewer_ids: I64) -> NDArray[np.floating[Any]]:
        """Returns scores over the catalogue of the split, ``[B, M]``."""
        row = catalogue_rows(self.known, viewer_ids)
        vectors_BF = np.where((row >= 0)[:, None], self.viewer_UF[row], self.mean_F)
        return np.asarray(vectors_BF @ self.video_MF.T)

    def rank(self, viewer_ids: I64, k: int) -> I64:
        return top_unseen(self.scores(viewer_ids), viewer_ids, self.seen, k)


def tune_als(split: TemporalSplit, *, grid: Sequence[AlsSettings] = ALS_GRID, seed: int = 0) -> AlsRecommender:
    """Returns ALS fitted before the cut, with the settings that were best on the last tenth of that period.

    The score of a setting is recall plus NDCG. If the validation split has no viewer to evaluate, the setting in the
    middle of the grid is used.
    """
    try:
        inner = validation_split(split, seed=seed)
    except EmptyDatasetError:
        return AlsRecommender(split, grid[len(grid) // 2], seed=seed)
    best = max(grid, key=lambda settings: _quality(AlsRecommender(inner, settings, seed=seed), inner))
    return AlsRecommender(split, best, seed=seed)


def validation_split(split: TemporalSplit, *, share: float = VALIDATION_SHARE, seed: int = 0) -> TemporalSplit:
    """Returns an earlier split for tuning: the last ``share`` of the period before the cut is its evaluation period."""
    time_s = np.sort(times_us(split.before["event_time"])) / 1e6
    cut_s = float(time_s[min(len(time_s) - 1, round(len(time_s) * (1 - share)))])
    return make_temporal_split(split.before, cut_s, seed=seed)


def _quality(recommender: AlsRecommender, split: TemporalSplit) -> float:
    rows_BK = catalogue_rows(split.videos, recommender.rank(split.viewer_ids, RANKING_DEPTH))
    hits_BK = split.relevant.has(split.viewer_ids, rows_BK)
    relevant_B = split.relevant.counts(split.viewer_ids)
    return float(np.mean(recall(hits_BK, relevant_B, RECALL_K)) + np.mean(ndcg(hits_BK, relevant_B, 10)))


def _matrix(split: TemporalSplit) -> tuple[I64, Any]:
    """Returns the viewers with a long watch before the cut and the binary viewer-video matrix."""
    before = split.before.filter(pa.array(split.before["long_watch"].to_numpy() > 0))
    pairs = ViewerVideoPairs.of(before["viewer_id"].to_numpy(), before["video_id"].to_numpy(), split.videos)
    viewer, row = np.divmod(pairs.keys, len(split.videos))
    known, viewer_row = np.unique(viewer, return_inverse=True)
    values = np.ones(len(row), dtype=np.float32)
    return known, sp.csr_matrix((values, (viewer_row, row)), shape=(len(known), len(split.videos)))


@contextmanager
def _one_blas_thread() -> Iterator[None]:
    """Limits BLAS to one thread, because ALS runs its own threads."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(1, "blas"):
        yield
