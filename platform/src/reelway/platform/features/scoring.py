"""From the ranker's outputs to one value per video: the same lines in evaluation and in serving."""

# Shapes: C candidates, K tasks

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from reelway.platform.contracts.blend import RankingBlend
from reelway.platform.contracts.calibration import Calibration
from reelway.platform.contracts.features import BINARY_TASKS, RANKER_TASKS

F32 = NDArray[np.float32]


def head_predictions(outputs_CK: F32, calibration: Calibration) -> F32:
    """Ranker outputs as calibrated probabilities, with ``watch_s`` left as log1p(seconds).

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


def video_value(predictions_CK: F32, similarity_C: F32, blend: RankingBlend) -> F32:
    """Weighted value of each candidate: what the slate is ordered by before diversity.

    Args:
        predictions_CK: from ``head_predictions``.
        similarity_C: retrieval inner product, 0 where a source has none.
    """
    weights = np.array([blend.value_weights.get(task, 0.0) for task in RANKER_TASKS], dtype=np.float32)
    return np.asarray(predictions_CK @ weights + np.float32(blend.retrieval_weight) * similarity_C, dtype=np.float32)
