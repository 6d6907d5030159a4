"""Calibration: fitted curves, heads that keep their probabilities, and the reported errors."""

from __future__ import annotations

import numpy as np
import pytest

from reelway.pipelines.training.calibration import apply_curve, calibrate, expected_calibration_error
from reelway.platform.contracts.blend import RankingSettings
from reelway.platform.contracts.feature_names import BINARY_TASKS, RANKER_TASKS
from reelway.platform.features.scoring import head_predictions, video_value


def bent(rows: int = 20_000, *, shift: float = 1.0, slope: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Over-confident logits that are too high, with labels drawn from the true probabilities."""
    random = np.random.default_rng(0)
    true_NK = random.normal(-1.5, 1.0, (rows, len(BINARY_TASKS)))
    labels_NK = (random.random(true_NK.shape) < 1 / (1 + np.exp(-true_NK))).astype(np.float32)
    outputs_NK = np.column_stack([slope * true_NK + shift, np.zeros(rows)]).astype(np.float32)
    return outputs_NK, labels_NK


@pytest.mark.parametrize("method", ["isotonic", "platt"])
def test_calibration_lowers_the_error_of_skewed_probabilities(method: str) -> None:
    outputs_NK, labels_NK = bent()
    calibration, reports = calibrate(outputs_NK, labels_NK, method=method)  # type: ignore[arg-type]
    for report in reports:
        assert report.error_before > 0.05
        assert report.error_after < 0.02
        assert report.method == method == calibration.curves[report.task].method


def test_serving_reproduces_the_calibrated_probabilities() -> None:
    outputs_NK, labels_NK = bent()
    calibration, _ = calibrate(outputs_NK, labels_NK)
    served_NK = head_predictions(outputs_NK, calibration)
    for k, task in enumerate(BINARY_TASKS):
        probability = 1 / (1 + np.exp(-outputs_NK[:, k].astype(np.float64)))
        np.testing.assert_allclose(served_NK[:, k], apply_curve(calibration.curves[task], probability), atol=1e-5)
        assert abs(served_NK[:, k].mean() - labels_NK[:, k].mean()) < 0.01
    assert np.isfinite(video_value(served_NK, np.zeros(len(served_NK), np.float32), RankingSettings())).all()
    assert served_NK.shape[1] == len(RANKER_TASKS)


def test_isotonic_curve_keeps_the_order_of_candidates() -> None:
    outputs_NK, labels_NK = bent()
    calibration, _ = calibrate(outputs_NK, labels_NK)
    curve = calibration.curves["like"]
    rates = apply_curve(curve, np.linspace(0, 1, 500))
    assert (np.diff(rates) > 0).all()


def test_head_with_one_class_keeps_its_probabilities() -> None:
    outputs_NK, labels_NK = bent(2000)
    labels_NK[:, 2], labels_NK[:, 3] = 0.0, 1.0
    calibration, reports = calibrate(outputs_NK, labels_NK)
    for task, positives in (("share", 0), ("save", 2000)):
        report = next(report for report in reports if report.task == task)
        assert calibration.curves[task].method == report.method == "identity"
        assert f"{positives} positives of 2000" in report.note
        assert report.error_after == report.error_before


def test_calibration_without_rows_changes_no_head() -> None:
    calibration, reports = calibrate(np.zeros((0, 8), np.float32), np.zeros((0, 7), np.float32))
    assert {curve.method for curve in calibration.curves.values()} == {"identity"}
    assert [report.rows for report in reports] == [0] * 7


def test_calibrated_head_is_not_made_worse() -> None:
    outputs_NK, labels_NK = bent(3000, shift=0.0, slope=1.0)
    _, reports = calibrate(outputs_NK, labels_NK)
    assert all(report.error_after <= report.error_before for report in reports)


def test_head_with_few_positives_gets_a_platt_curve() -> None:
    outputs_NK, labels_NK = bent(1000)
    _, reports = calibrate(outputs_NK, labels_NK, method="isotonic")
    assert {report.method for report in reports} == {"platt"}


def test_calibration_error_is_the_mean_gap_over_equal_bins() -> None:
    probability = np.array([0.1] * 10 + [0.9] * 10)
    label = np.array([0.0] * 10 + [1.0] * 5 + [0.0] * 5)
    assert expected_calibration_error(probability, label, bins=2) == pytest.approx((0.1 + 0.4) / 2)
