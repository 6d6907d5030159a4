"""The canary rules of other tools, written from their documentation, for comparison on the same data.

- Argo Rollouts, docs/features/analysis.md: a background AnalysisRun takes a measurement every ``interval``; one that
  does not meet ``successCondition`` is a failure; more than ``failureLimit`` failures in total fail the run and abort
  the rollout. More than ``consecutiveErrorLimit`` (default 4) consecutive errors of the measurement abort it as well.
- Flagger, usage/how-it-works: every ``interval`` the metrics are checked against ``thresholdRange``; a passed check
  raises the weight by ``stepWeight`` up to ``maxWeight``; a check that fails, or finds no value, halts the advancement
  and counts, and ``threshold`` failed checks roll back.
- Kayenta, Spinnaker's canary judgment guide: points of the two time series since the start are compared by a
  Mann-Whitney U test at 98 % confidence; a metric is Low when the whole confidence interval of the Hodges-Lehmann shift
  lies below ``-0.25 * |estimate|``; a Low critical metric fails the analysis. The judgment is repeated every interval.

None of the three uses viewers. All three get the series that their users would provide, with one point per reconcile.
The array code returns the reconcile at which each rollout would have been rolled back, -1 for never.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

NEVER = -1


def _first(failed: NDArray[np.bool_]) -> I64:
    """Returns the index of the first True along the last axis, NEVER if there is none."""
    return np.where(failed.any(-1), failed.argmax(-1), NEVER).astype(np.int64)


def _windowed(series: F64, every: int) -> F64:
    """Returns sums over complete windows of ``every`` reconciles: [..., reconciles] -> [..., reconciles // every]."""
    complete = series.shape[-1] // every * every
    return series[..., :complete].reshape(*series.shape[:-1], -1, every).sum(-1)


@dataclass(frozen=True)
class ArgoRollouts:
    """``successCondition: canary >= (1 - tolerance) * stable`` over each interval."""

    tolerance: float = 0.05
    interval: int = 5
    failure_limit: int = 3
    consecutive_error_limit: int = 4

    def rolled_back_at(self, canary_y: F64, canary_x: F64, stable_y: F64, stable_x: F64) -> I64:
        """Returns the reconcile of the abort. Arguments: sums per reconcile [rollouts, reconciles]."""
        y, x, sy, sx = (_windowed(s, self.interval) for s in (canary_y, canary_x, stable_y, stable_x))
        error = (x <= 0) | (sx <= 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            failure = ~error & (y / x < (1.0 - self.tolerance) * sy / sx)
        aborted = np.cumsum(failure, axis=-1) > self.failure_limit
        aborted |= _run_length(error) > self.consecutive_error_limit
        at = _first(aborted)
        return np.where(at == NEVER, NEVER, (at + 1) * self.interval - 1)


@dataclass(frozen=True)
class Flagger:
    """``thresholdRange.min: (1 - tolerance) * stable``, checked on every reconcile."""

    tolerance: float = 0.05
    threshold: int = 5
    step_weight: int = 5
    max_weight: int = 50

    def rolled_back_at(self, canary_y: F64, canary_x: F64, stable_y: F64, stable_x: F64) -> I64:
        """Returns the reconcile of the rollback, NEVER if there is none."""
        with np.errstate(divide="ignore", invalid="ignore"):
            passed = canary_y / canary_x >= (1.0 - self.tolerance) * stable_y / stable_x
        passed &= (canary_x > 0) & (stable_x > 0)
        return _first(np.cumsum(~passed, axis=-1) >= self.threshold)

    def promoted_at(self, canary_y: F64, canary_x: F64, stable_y: F64, stable_x: F64) -> I64:
        """Returns the reconcile at which the weight would exceed ``max_weight``, if no rollback came before it."""
        with np.errstate(divide="ignore", invalid="ignore"):
            passed = canary_y / canary_x >= (1.0 - self.tolerance) * stable_y / stable_x
        passed &= (canary_x > 0) & (stable_x > 0)
        return _first(np.cumsum(passed, axis=-1) * self.step_weight > self.max_weight)


@dataclass(frozen=True)
class Kayenta:
    """One point per reconcile and arm, judged every ``interval`` reconciles over the last ``lookback``."""

    z: float = 2.3263478740408408  # 98 % two-sided
    tolerance: float = 0.25
    interval: int = 15
    lookback: int = 60

    def rolled_back_at(self, canary_y: F64, canary_x: F64, stable_y: F64, stable_x: F64) -> I64:
        """Returns the reconcile of the first judgment that classifies the canary as Low."""
        with np.errstate(divide="ignore", invalid="ignore"):
            canary, stable = canary_y / canary_x, stable_y / stable_x
        at = np.full(len(canary), NEVER, dtype=np.int64)
        for end in range(self.interval, canary.shape[-1] + 1, self.interval):
            open_ = np.flatnonzero(at == NEVER)
            begin = max(0, end - self.lookback)
            if not len(open_):
                break
            low = self.is_low(canary[open_, begin:end], stable[open_, begin:end])
            at[open_[low]] = end - 1
        return at

    def is_low(self, canary: F64, stable: F64) -> NDArray[np.bool_]:
        """Returns which rows of points are Low. The interval is the normal approximation of ``wilcox.test``."""
        n = canary.shape[-1]
        shifts = np.sort((canary[:, :, None] - stable[:, None, :]).reshape(len(canary), -1), axis=-1)
        estimate = np.median(shifts, axis=-1)
        skip = int(np.clip(n * n / 2 - self.z * np.sqrt(n * n * (2 * n + 1) / 12), 0, n * n - 1))
        upper = shifts[:, n * n - 1 - skip]
        return upper < -self.tolerance * np.abs(estimate)


def _run_length(flags: NDArray[np.bool_]) -> I64:
    """Returns the number of consecutive True values that end at each position."""
    count = np.cumsum(flags, axis=-1)
    return count - np.maximum.accumulate(np.where(flags, 0, count), axis=-1)
