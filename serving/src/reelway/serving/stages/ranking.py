"""Ranking: one gather, one model call, one calibrated value per candidate. It removes and reorders nothing."""

# Shapes: C candidates, D embedding, K tasks

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from reelway.platform.contracts.blend import RankingBlend
from reelway.platform.contracts.calibration import Calibration
from reelway.platform.features.scoring import head_predictions, video_value
from reelway.serving.sessions import Graph
from reelway.serving.stages.arrays import F32, Rows
from reelway.serving.video_table import VideoTable


class Ranking:
    """The stage: ``rank`` is the whole of it."""

    def __init__(self, ranker: Graph, table: VideoTable, calibration: Calibration, settings: RankingBlend) -> None:
        self._ranker = ranker
        self._table = table
        self._calibration = calibration
        self._settings = settings

    def rank(
        self,
        viewer_dense: F32,
        viewer_categories: NDArray[np.int64],
        viewer_embedding: F32,
        rows: Rows,
        similarity: F32,
        now_s: float,
    ) -> F32:
        """The value of each candidate, comparable within this request only.

        Shapes: ``[1, ...], [1, ...], [1, D], [C], [C] -> [C]``. The viewer's side is a batch of one, which the graph
        works out once and not per candidate.

        Raises:
            ServingError: the model's outputs are not finite.
        """
        inputs: dict[str, NDArray[Any]] = {
            "viewer_dense": viewer_dense,
            "viewer_categories": viewer_categories,
            "viewer_embedding": viewer_embedding,
            **self._table.gather(rows, now_s).as_inputs(),
        }
        predictions_CK = head_predictions(self._ranker.run(inputs), self._calibration)
        return video_value(predictions_CK, similarity, self._settings)
