"""Converts the ranker's outputs to one value per video. Evaluation and serving run the same code."""

# Shapes: C candidates, K tasks

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from reelway.platform.contracts.blend import RankingSettings
from reelway.platform.contracts.calibration import Calibration
from reelway.platform.contracts.feature_names import BINARY_TASKS, RANKER_TASKS

F32 = NDArray[np.float32]


def head_predictions(outputs_CK: F32, calibration: Calibration) -> F32:
    """Returns the ranker's outputs as calibrated probabilities; ``watch_s`` remains log1p(seconds).

    Shapes: ``[..., C, K] -> [..., C, K]`` in the order of ``RANKER_TASKS``.
    """
    predictions = np.array(outputs_CK, dtype=np.float32)
    binary = predictions[..., : len(BINARY_TASKS)]
    np.negative(binary, out=binary)
    with np.errstate(over="ignore"):
        np.exp(binary, out=binary)
    binary += 1.0
    np.reciprocal(binary, out=binary)
    for k, task in enumerate(BINARY_TASKS):
        if curve := calibration.curves.get(task):
            binary[..., k] = np.interp(binary[..., k], curve.probability, curve.rate)
    return predictions


def video_value(predictions_CK: F32, similarity_C: F32, blend: RankingSettings) -> F32:
    """Returns the weighted value of each candidate, which orders the slate before diversification.

    Args:
        predictions_CK: result of ``head_predictions``.
        similarity_C: inner product from retrieval, 0 if the source has none.
    """
    weights = np.array([blend.value_weights.get(task, 0.0) for task in RANKER_TASKS], dtype=np.float32)
    return np.asarray(predictions_CK @ weights + np.float32(blend.retrieval_weight) * similarity_C, dtype=np.float32)
