"""Fits one monotone calibration curve per head and measures the calibration error before and after.

A head keeps its probabilities, with a note, if a class has too few rows or if the curve would increase the error.
"""

# Shapes: N rows, K tasks

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from reelway.platform.contracts.calibration import Calibration, CalibrationCurve
from reelway.platform.contracts.feature_names import BINARY_TASKS

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Method = Literal["isotonic", "platt"]

MIN_PER_CLASS = 20
"""Fewest held-out rows of each class for which a curve is fitted."""
MIN_ISOTONIC = 300
"""Fewest held-out rows of each class for isotonic regression; with fewer, its steps follow noise, and Platt's two
parameters are fitted instead (Platt 1999)."""
_KNOTS = 64
_FOLDS = 5
_IDENTITY = CalibrationCurve(method="identity", probability=(0.0, 1.0), rate=(0.0, 1.0))


@dataclass(frozen=True)
class HeadReport:
    """Expected calibration error of one head, measured on rows that its curve was not fitted on."""

    task: str
    method: str
    rows: int
    positives: int
    error_before: float
    error_after: float
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def calibrate(
    outputs_NK: F32, labels_NK: F32, *, method: Method = "isotonic", seed: int = 0
) -> tuple[Calibration, list[HeadReport]]:
    """Fits a curve per binary head on held-out rows.

    The error after calibration is cross-fitted: the curve for each fold is fitted on the other folds, so that
    overfitting does not lower the error. The returned curve is fitted on all rows.

    Args:
        outputs_NK: the ranker's raw outputs (logits), heads in the order of ``BINARY_TASKS``.
        labels_NK: 0 or 1.
    """
    folds_N = np.random.default_rng([seed, 3]).integers(0, _FOLDS, len(outputs_NK))
    curves: dict[str, CalibrationCurve] = {}
    reports = []
    for k, task in enumerate(BINARY_TASKS):
        probability_N = 1.0 / (1.0 + np.exp(-outputs_NK[:, k].astype(np.float64)))
        curve, report = _calibrate_head(task, probability_N, labels_NK[:, k].astype(np.float64), folds_N, method)
        curves[task] = curve
        reports.append(report)
    return Calibration(curves=curves), reports


def expected_calibration_error(probability_N: F64, label_N: F64, *, bins: int = 15) -> float:
    """Returns the mean gap between predicted and observed rate over equally filled bins (Nixon et al. 2019)."""
    if not len(probability_N):
        return 0.0
    order = np.argsort(probability_N, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    gaps = [len(part) * abs(float(probability_N[part].mean() - label_N[part].mean())) for part in parts]
    return sum(gaps) / len(order)


def apply_curve(curve: CalibrationCurve, probability_N: F64) -> F64:
    """Returns the rates of a curve, computed as serving does."""
    return np.interp(probability_N, curve.probability, curve.rate)


def _calibrate_head(
    task: str, probability_N: F64, label_N: F64, folds_N: NDArray[np.int64], method: Method
) -> tuple[CalibrationCurve, HeadReport]:
    rows, positives = len(label_N), int(label_N.sum())
    before = expected_calibration_error(probability_N, label_N)
    scarce = min(positives, rows - positives)
    if scarce < MIN_PER_CLASS:
        note = f"{positives} positives of {rows} held-out rows, expected at least {MIN_PER_CLASS} of each class"
        return _IDENTITY, HeadReport(task, "identity", rows, positives, before, before, note)
    if scarce < MIN_ISOTONIC:
        method = "platt"
    crossed_N = np.empty_like(probability_N)
    for fold in range(_FOLDS):
        in_fold = folds_N == fold
        crossed_N[in_fold] = apply_curve(
            _fit(probability_N[~in_fold], label_N[~in_fold], method), probability_N[in_fold]
        )
    after = expected_calibration_error(crossed_N, label_N)
    if after >= before:
        note = (
            f"calibration ({method}) would not lower the calibration error ({before:.4f} to {after:.4f} on unseen rows)"
        )
        return _IDENTITY, HeadReport(task, "identity", rows, positives, before, before, note)
    return _fit(probability_N, label_N, method), HeadReport(task, method, rows, positives, before, after)


def _fit(probability_N: F64, label_N: F64, method: Method) -> CalibrationCurve:
    if len(np.unique(label_N)) < 2:
        return _IDENTITY
    knots = np.unique(np.quantile(probability_N, np.linspace(0, 1, _KNOTS)))
    if method == "platt":
        fitted = LogisticRegression(C=1e6).fit(_logit(probability_N)[:, None], label_N)
        if fitted.coef_[0, 0] <= 0:  # the predictions rank in reverse: no monotone curve helps
            return _IDENTITY
        knots = np.unique(np.concatenate([[0.0], knots, np.linspace(0.01, 0.99, 50), [1.0]]))
        rate = fitted.predict_proba(_logit(knots)[:, None])[:, 1]
    else:
        fitted = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(probability_N, label_N)
        knots = np.unique(np.concatenate([[0.0], knots, [1.0]]))
        # isotonic steps are flat; a small slope keeps the model's order among candidates of one step
        rate = 0.98 * fitted.predict(knots) + 0.02 * knots
    rate = np.clip(np.maximum.accumulate(rate), 0.0, 1.0)
    return CalibrationCurve(method=method, probability=tuple(knots.tolist()), rate=tuple(rate.tolist()))


def _logit(probability_N: F64) -> F64:
    clipped_N = np.clip(probability_N, 1e-7, 1 - 1e-7)
    return np.asarray(np.log(clipped_N / (1 - clipped_N)))
