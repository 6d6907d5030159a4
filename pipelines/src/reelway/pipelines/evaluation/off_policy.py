"""Off-policy estimates of a policy's reward from logged impressions and their propensities.

Importance weights are clipped, the effective sample size is always reported, and intervals resample viewers. An action
that the logging policy never took cannot be evaluated.
"""

# Shapes: N logged impressions

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from reelway.pipelines.evaluation.metrics import BootstrapEstimate, rows_estimate
from reelway.platform.errors import DataError

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

DEFAULT_CLIP: Final = 20.0


@dataclass(frozen=True)
class OffPolicyEstimate:
    """Mean reward per impression under the target policy, by three estimators."""

    ips: BootstrapEstimate
    """Inverse propensity score (Horvitz and Thompson 1952): unbiased without clipping, high variance."""
    snips: BootstrapEstimate
    """Self-normalised estimator (Swaminathan and Joachims 2015): lower variance, small bias."""
    doubly_robust: BootstrapEstimate
    """Reward model corrected by weighted residuals (Dudik, Langford and Li 2011): consistent if the model or the
    propensities are."""
    effective_sample_size: float
    """``(sum w)^2 / sum w^2`` (Kish 1965): the equivalent number of unweighted impressions."""
    clipped_share: float
    """Share of impressions with a clipped weight (Ionides 2008); clipping biases ``ips`` downwards."""

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-compatible values."""
        return {
            **{name: getattr(self, name).to_dict() for name in ("ips", "snips", "doubly_robust")},
            "effective_sample_size": self.effective_sample_size,
            "clipped_share": self.clipped_share,
        }


def estimate_off_policy(
    reward_N: F64,
    logged_propensity_N: F64,
    target_propensity_N: F64,
    viewer_ids_N: I64,
    *,
    modelled_logged_N: F64 | None = None,
    modelled_target_N: F64 | None = None,
    clip: float = DEFAULT_CLIP,
    seed: int = 0,
) -> OffPolicyEstimate:
    """Estimates the reward of a target policy from impressions of the logging policy.

    Args:
        reward_N: reward of each impression, such as watch time in seconds.
        logged_propensity_N: probability of this video in this position under the logging policy, in (0, 1].
        target_propensity_N: probability of the same choice under the target policy, in [0, 1].
        viewer_ids_N: viewer of each impression; impressions of one viewer are resampled together.
        modelled_logged_N: predicted reward of the logged video; zeros by default (doubly robust then equals IPS).
        modelled_target_N: predicted reward under the target policy in the same context.
        clip: largest importance weight.

    Raises:
        DataError: if a propensity is outside its range.
    """
    _check_propensities("logged propensity", logged_propensity_N, open_below=True)
    _check_propensities("target propensity", target_propensity_N, open_below=False)
    unclipped_N = target_propensity_N / logged_propensity_N
    weight_N = np.minimum(unclipped_N, clip)
    logged_N = np.zeros(len(reward_N)) if modelled_logged_N is None else modelled_logged_N
    target_N = np.zeros(len(reward_N)) if modelled_target_N is None else modelled_target_N
    corrected_N = target_N + weight_N * (reward_N - logged_N)

    def ips(times_N: F64) -> float:
        return float((times_N * weight_N * reward_N).sum() / times_N.sum())

    def snips(times_N: F64) -> float:
        total = float((times_N * weight_N).sum())
        return float((times_N * weight_N * reward_N).sum() / total) if total > 0 else float("nan")

    def doubly_robust(times_N: F64) -> float:
        return float((times_N * corrected_N).sum() / times_N.sum())

    squares = float((weight_N**2).sum())
    return OffPolicyEstimate(
        ips=rows_estimate(ips, viewer_ids_N, seed=seed),
        snips=rows_estimate(snips, viewer_ids_N, seed=seed),
        doubly_robust=rows_estimate(doubly_robust, viewer_ids_N, seed=seed),
        effective_sample_size=float(weight_N.sum()) ** 2 / squares if squares > 0 else 0.0,
        clipped_share=float((unclipped_N > clip).mean()),
    )


def _check_propensities(name: str, propensity_N: F64, *, open_below: bool) -> None:
    if not len(propensity_N):
        raise DataError(f"{name}: there are no impressions; pass at least one")
    invalid_N = ~np.isfinite(propensity_N) | (propensity_N > 1) | (propensity_N < 0)
    if open_below:
        invalid_N |= propensity_N == 0
    if invalid_N.any():
        row = int(np.argmax(invalid_N))
        bounds = "(0, 1]" if open_below else "[0, 1]"
        raise DataError(
            f"{name} of row {row} is {propensity_N[row]}, expected within {bounds}; "
            "use events of a policy that records its propensities"
        )
