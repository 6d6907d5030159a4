"""Ranking: one gather, one model call, one calibrated value per candidate. It removes and reorders nothing.

Where the model runs is the ``Ranker``'s to know: in this process, or behind KServe. Everything else is the same.
"""

# Shapes: C candidates, D embedding, K tasks

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from reelway.platform.contracts.blend import RankingBlend
from reelway.platform.contracts.calibration import Calibration
from reelway.platform.features.scoring import head_predictions, video_value
from reelway.serving.sessions import Graph
from reelway.serving.stages.arrays import F32, Rows
from reelway.serving.video_table import VideoTable


class Ranker(Protocol):
    """The release's ranker, wherever it runs. Inputs and output are those of ``ranker.onnx``."""

    async def score(self, inputs: Mapping[str, NDArray[Any]], within_s: float | None = None) -> F32:
        """Outputs of all candidates, ``[C, K]``.

        Args:
            within_s: seconds after which nobody waits for the answer.

        Raises:
            ServingError: there is none, or it is not finite.
            TimeoutError: it is late.
        """
        ...


class RankerHere:
    """The graph in this process. It never waits."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    async def score(self, inputs: Mapping[str, NDArray[Any]], within_s: float | None = None) -> F32:  # noqa: ARG002
        return self._graph.run(inputs)


class Ranking:
    """The stage: ``rank`` is the whole of it."""

    def __init__(self, ranker: Ranker, table: VideoTable, calibration: Calibration, settings: RankingBlend) -> None:
        self._ranker = ranker
        self._table = table
        self._calibration = calibration
        self._settings = settings

    async def rank(
        self,
        viewer_dense: F32,
        viewer_categories: NDArray[np.int64],
        viewer_embedding: F32,
        rows: Rows,
        similarity: F32,
        now_s: float,
        within_s: float | None = None,
    ) -> F32:
        """The value of each candidate, comparable within this request only.

        Shapes: ``[1, ...], [1, ...], [1, D], [C], [C] -> [C]``. The viewer's side is a batch of one, which the graph
        works out once and not per candidate.

        Args:
            within_s: seconds left of the request's budget for ranking.

        Raises:
            ServingError: the model's outputs are not finite, or the ranker is gone.
            TimeoutError: the ranker is late.
        """
        inputs: dict[str, NDArray[Any]] = {
            "viewer_dense": viewer_dense,
            "viewer_categories": viewer_categories,
            "viewer_embedding": viewer_embedding,
            **self._table.gather(rows, now_s).as_inputs(),
        }
        predictions_CK = head_predictions(await self._ranker.score(inputs, within_s), self._calibration)
        return video_value(predictions_CK, similarity, self._settings)
