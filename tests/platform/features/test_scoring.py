"""Conversion of ranker outputs to one value per video."""

from __future__ import annotations

import numpy as np
import pytest

from reelway.platform.contracts.blend import RankingSettings
from reelway.platform.contracts.calibration import Calibration, CalibrationCurve
from reelway.platform.contracts.feature_names import BINARY_TASKS, RANKER_TASKS
from reelway.platform.features.scoring import head_predictions, video_value

K = len(RANKER_TASKS)


def test_logits_become_probabilities_except_watch_time() -> None:
    outputs = np.zeros((3, K), dtype=np.float32)
    outputs[:, -1] = 2.5
    outputs[1, 0] = 200.0
    outputs[2, 0] = -200.0
    predictions = head_predictions(outputs, Calibration(curves={}))
    assert predictions[0].tolist() == [0.5] * len(BINARY_TASKS) + [2.5]
    assert predictions[1, 0] == 1.0
    assert predictions[2, 0] == 0.0
    assert outputs[0, 0] == 0.0, "the input is not written to"


def test_calibration_changes_only_its_own_head() -> None:
    curve = CalibrationCurve(method="isotonic", probability=(0.0, 0.5, 1.0), rate=(0.0, 0.1, 0.2))
    predictions = head_predictions(np.zeros((1, K), np.float32), Calibration(curves={"like": curve}))
    assert predictions[0, RANKER_TASKS.index("like")] == pytest.approx(0.1)
    assert predictions[0, RANKER_TASKS.index("share")] == 0.5


def test_value_is_the_weighted_sum_with_similarity() -> None:
    blend = RankingSettings(value_weights={"like": 2.0, "skip": -1.0}, retrieval_weight=0.5)
    predictions = np.zeros((2, K), dtype=np.float32)
    predictions[0, RANKER_TASKS.index("like")] = 0.25
    predictions[1, RANKER_TASKS.index("skip")] = 0.5
    assert video_value(predictions, np.array([1.0, 0.0], np.float32), blend).tolist() == [1.0, -0.5]


def test_better_prediction_never_lowers_the_value_of_a_wanted_outcome() -> None:
    blend, predictions = RankingSettings(), np.full((2, K), 0.3, dtype=np.float32)
    predictions[1, RANKER_TASKS.index("long_watch")] = 0.6
    low, high = video_value(predictions, np.zeros(2, np.float32), blend)
    assert high > low
