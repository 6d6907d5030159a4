"""Ranking: one gather, one model call and one calibrated value per candidate.

Ranking neither removes nor reorders candidates. A ``Ranker`` hides where the model runs: in this process
(``LocalRanker``) or behind KServe.

A new input is a field of ``RankingInput`` (``stages/arrays.py``) and an entry of the dictionary in ``Ranking.rank``.
"""

# Shapes: C candidates, K tasks

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from reelway.platform.contracts.blend import RankingSettings
from reelway.platform.contracts.calibration import Calibration
from reelway.platform.features.scoring import head_predictions, video_value
from reelway.serving.onnx_model import OnnxModel
from reelway.serving.stages.arrays import F32, NOT_RANKED, RankingInput
from reelway.serving.video_table import VideoTable


class Ranker(Protocol):
    """The ranker of a release, in any process. Inputs and output are those of ``ranker.onnx``."""

    async def score(self, inputs: Mapping[str, NDArray[Any]], within_s: float | None = None) -> F32:
        """Returns the model's outputs for all candidates, ``[C, K]``.

        Args:
            within_s: timeout in seconds.

        Raises:
            ServingError: if the ranker returns no output, or one that is not finite.
            TimeoutError: if the ranker does not answer in time.
        """
        ...


class LocalRanker:
    """The ranker's ONNX model in this process. A call never waits."""

    def __init__(self, graph: OnnxModel) -> None:
        self._graph = graph

    async def score(self, inputs: Mapping[str, NDArray[Any]], within_s: float | None = None) -> F32:  # noqa: ARG002
        return self._graph.run(inputs)


class Ranking:
    """The ranking stage of one release."""

    def __init__(self, ranker: Ranker, table: VideoTable, calibration: Calibration, settings: RankingSettings) -> None:
        self._ranker = ranker
        self._table = table
        self._calibration = calibration
        self._settings = settings

    async def rank(self, ranking_input: RankingInput) -> F32:
        """Returns the value of each candidate, ``[C]``. Values are comparable within one request only.

        A candidate that this process's table does not have yet gets ``NOT_RANKED``.

        The viewer's arrays are a batch of one. The model computes the viewer's part once, not once per candidate.

        Raises:
            ServingError: if the model's outputs are not finite, or the ranker is unreachable.
            TimeoutError: if the ranker does not answer within ``ranking_input.timeout_s``.
        """
        known = self._table.has_rows(ranking_input.rows)
        if not known.all():
            value = np.full(len(ranking_input), NOT_RANKED)
            if known.any():
                value[known] = await self.rank(ranking_input.where(known))
            return value
        inputs: dict[str, NDArray[Any]] = {
            "viewer_dense": ranking_input.viewer_dense,
            "viewer_categories": ranking_input.viewer_categories,
            "viewer_embedding": ranking_input.viewer_embedding,
            **self._table.gather(ranking_input.rows, ranking_input.now_s).as_inputs(),
        }
        outputs_CK = await self._ranker.score(inputs, ranking_input.timeout_s)
        predictions_CK = head_predictions(outputs_CK, self._calibration)
        return video_value(predictions_CK, ranking_input.similarity, self._settings)
