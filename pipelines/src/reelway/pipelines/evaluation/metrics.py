"""Ranking metrics per viewer, probability metrics per row, and confidence intervals over viewers.

Impressions of one viewer are correlated, so every interval resamples viewers instead of rows (clustered bootstrap;
Field and Welsh 2007). An undefined metric is NaN, never 0: a viewer without a relevant video has no recall, and a head
with one class has no AUC.
"""

# Shapes: B viewers, K positions of a slate, M videos, N rows, G resamples, T tie groups

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Bools = NDArray[np.bool_]

RESAMPLES: Final = 1000
ROW_RESAMPLES: Final = 200
"""Resamples for metrics over rows, where each resample is a pass over all rows."""
PAD: Final = -1
"""Marks a position without a video."""


@dataclass(frozen=True)
class BootstrapEstimate:
    """A metric with its 95 % bootstrap interval; all values are NaN if the metric is undefined."""

    value: float
    low: float
    high: float
    viewers: int

    def to_dict(self) -> dict[str, float | int | None]:
        """Returns JSON-compatible values; NaN becomes ``None``."""
        plain: dict[str, float | int | None] = {"viewers": self.viewers}
        for name in ("value", "low", "high"):
            number = float(getattr(self, name))
            plain[name] = number if np.isfinite(number) else None
        return plain


# Ranking metrics, one value per viewer.


def recall(hits_BK: Bools, relevant_B: I64, k: int) -> F64:
    """Returns the share of each viewer's relevant videos in the first ``k`` positions, ``[B]``; NaN without any."""
    hits_B = hits_BK[:, :k].sum(axis=1).astype(np.float64)
    return _safe_ratio(hits_B, relevant_B.astype(np.float64))


def ndcg(hits_BK: Bools, relevant_B: I64, k: int) -> F64:
    """Returns binary normalised discounted cumulative gain (Järvelin and Kekäläinen 2002), ``[B]``.

    The ideal ranking has ``min(k, relevant)`` hits on top. NaN without a relevant video.
    """
    discount_K = 1.0 / np.log2(np.arange(2, k + 2))
    gain_B = hits_BK[:, :k] @ discount_K[: hits_BK[:, :k].shape[1]]
    ideal_K = np.concatenate([[0.0], np.cumsum(discount_K)])
    return _safe_ratio(gain_B, ideal_K[np.minimum(relevant_B, k)])


def reciprocal_rank(hits_BK: Bools, relevant_B: I64) -> F64:
    """Returns 1 / position of the first hit, ``[B]``; 0 without a hit, NaN without a relevant video."""
    first_B = np.argmax(hits_BK, axis=1) if hits_BK.shape[1] else np.zeros(len(hits_BK), dtype=np.int64)
    any_B = hits_BK.any(axis=1)
    return np.where(relevant_B > 0, any_B / (first_B + 1.0), np.nan)


def intra_list_diversity(ranked_BK: I64, vectors_MD: NDArray[np.floating[Any]]) -> F64:
    """Returns one minus the mean pairwise cosine of each slate (Ziegler et al. 2005), ``[B]``; NaN below two videos.

    Args:
        ranked_BK: rows of ``vectors_MD``; shorter slates are padded with ``PAD``.
    """
    norm_M1 = np.linalg.norm(vectors_MD, axis=1, keepdims=True)
    unit_MD = vectors_MD / np.where(norm_M1 > 0, norm_M1, 1.0)
    present_BK = ranked_BK != PAD
    slate_BKD = unit_MD[np.where(present_BK, ranked_BK, 0)] * present_BK[..., None]
    # The sum over ordered pairs is the squared sum minus the product of each vector with itself.
    squared_sum_B = (slate_BKD.sum(axis=1) ** 2).sum(axis=-1)
    alone_B = (slate_BKD**2).sum(axis=(1, 2))
    count_B = present_BK.sum(axis=1).astype(np.float64)
    return 1.0 - _safe_ratio(squared_sum_B - alone_B, count_B * (count_B - 1.0))


def coverage(ranked_BK: I64, catalogue: int) -> float:
    """Returns the share of the catalogue that is in at least one slate."""
    shown = np.unique(ranked_BK[ranked_BK != PAD])
    return len(shown) / catalogue if catalogue else float("nan")


# Probability metrics over rows.


def area_under_curve(scores_N: F64, labels_N: F64, weights_N: F64 | None = None) -> float:
    """Returns the probability that a positive scores above a negative; ties count half, NaN with only one class."""
    return float(_SortedScores(scores_N, labels_N).auc(np.ones(len(labels_N)) if weights_N is None else weights_N))


def log_loss(probability_N: F64, labels_N: F64, weights_N: F64 | None = None) -> float:
    """Returns the mean negative log-likelihood in nats; NaN without rows."""
    clipped_N = np.clip(probability_N, 1e-7, 1 - 1e-7)
    loss_N = -(labels_N * np.log(clipped_N) + (1 - labels_N) * np.log(1 - clipped_N))
    return _weighted_mean(loss_N, weights_N)


def calibration_error(probability_N: F64, labels_N: F64, weights_N: F64 | None = None, *, bins: int = 15) -> float:
    """Returns the weighted mean gap between predicted and observed rates over equal-count bins (Nixon et al. 2019)."""
    if not len(labels_N):
        return float("nan")
    weights_N = np.ones(len(labels_N)) if weights_N is None else weights_N
    order = np.argsort(probability_N, kind="stable")
    bin_N = np.empty(len(order), dtype=np.int64)
    bin_N[order] = np.arange(len(order)) * min(bins, len(order)) // len(order)
    gap = np.bincount(bin_N, weights=weights_N * (probability_N - labels_N))
    total = float(weights_N.sum())
    return float(np.abs(gap).sum() / total) if total > 0 else float("nan")


class _SortedScores:
    """Scores sorted once, so that the AUC of each resample needs one pass over the weights."""

    def __init__(self, scores_N: F64, labels_N: F64) -> None:
        order = np.argsort(scores_N, kind="stable")
        self._order = order
        self._positive_N = labels_N[order] > 0.5
        self._starts_T = np.flatnonzero(np.diff(scores_N[order], prepend=np.nan) != 0)

    def auc(self, weights_N: F64) -> float:
        weights_N = weights_N[self._order]
        if not len(weights_N):
            return float("nan")
        positive_T = np.add.reduceat(weights_N * self._positive_N, self._starts_T)
        negative_T = np.add.reduceat(weights_N * ~self._positive_N, self._starts_T)
        below_T = np.cumsum(negative_T) - 0.5 * negative_T
        pairs = positive_T.sum() * negative_T.sum()
        return float((positive_T * below_T).sum() / pairs) if pairs > 0 else float("nan")


# Confidence intervals.


def mean_estimate(values_B: F64, *, seed: int = 0, resamples: int = RESAMPLES) -> BootstrapEstimate:
    """Returns the mean over viewers with a finite value and its percentile bootstrap interval."""
    known_B = values_B[np.isfinite(values_B)]
    if not len(known_B):
        return BootstrapEstimate(float("nan"), float("nan"), float("nan"), 0)
    means_G = _resampled_counts(len(known_B), resamples, seed) @ known_B / len(known_B)
    low, high = np.quantile(means_G, [0.025, 0.975])
    return BootstrapEstimate(float(known_B.mean()), float(low), float(high), len(known_B))


def paired_difference(values_B: F64, against_B: F64, *, seed: int = 0) -> BootstrapEstimate:
    """Returns the mean difference over the same viewers, with a narrower interval than an unpaired comparison."""
    return mean_estimate(values_B - against_B, seed=seed)


def rows_estimate(
    statistic: Callable[[F64], float], viewer_ids_N: I64, *, seed: int = 0, resamples: int = ROW_RESAMPLES
) -> BootstrapEstimate:
    """Returns a metric over rows with a bootstrap interval over viewers.

    Args:
        statistic: function from row weights ``[N]`` to the metric; a resample weights rows by their viewer's count.
    """
    viewers, viewer_N = np.unique(viewer_ids_N, return_inverse=True)
    value = statistic(np.ones(len(viewer_N)))
    if not len(viewers) or not np.isfinite(value):
        return BootstrapEstimate(float("nan"), float("nan"), float("nan"), len(viewers))
    drawn = np.array([statistic(counts[viewer_N]) for counts in _resampled_counts(len(viewers), resamples, seed)])
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) else (np.nan, np.nan)
    return BootstrapEstimate(value, float(low), float(high), len(viewers))


def auc_estimate(scores_N: F64, labels_N: F64, viewer_ids_N: I64, *, seed: int = 0) -> BootstrapEstimate:
    """Returns ``area_under_curve`` with a bootstrap interval over viewers."""
    return rows_estimate(_SortedScores(scores_N, labels_N).auc, viewer_ids_N, seed=seed)


def _resampled_counts(size: int, resamples: int, seed: int) -> F64:
    """Returns how often each of ``size`` elements is drawn in each bootstrap resample, ``[G, size]``."""
    rng = np.random.default_rng([seed, size])
    counts_GB = rng.multinomial(size, np.full(size, 1.0 / size), size=resamples)
    return np.asarray(counts_GB, dtype=np.float64)


def _safe_ratio(top: F64, bottom: F64) -> F64:
    out: F64 = np.full(len(top), np.nan)
    np.divide(top, bottom, out=out, where=bottom > 0)
    return out


def _weighted_mean(values_N: F64, weights_N: F64 | None) -> float:
    if weights_N is None:
        return float(values_N.mean()) if len(values_N) else float("nan")
    total = float(weights_N.sum())
    return float((values_N * weights_N).sum() / total) if total > 0 else float("nan")
