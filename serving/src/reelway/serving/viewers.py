"""A request and the viewer's row, made into what the stages work on. An unknown viewer is a viewer without a past."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from reelway.platform.contracts.api import RequestContext
from reelway.platform.contracts.features import VIEWER_VIEWS, VIEWS
from reelway.platform.features.assembly import assemble_viewers, columns_from_row
from reelway.serving.stages.arrays import F32, Rows, ViewerQuery
from reelway.serving.video_table import ABSENT, VideoTable

_FIELDS: Final = tuple(name for view in VIEWER_VIEWS for name in VIEWS[view])


def is_cold(viewer_row: Mapping[str, Any]) -> bool:
    """Whether the store knows nothing of the viewer's past."""
    videos = viewer_row.get("history_videos")
    return videos is None or len(videos) == 0


def viewer_query(
    viewer_row: Mapping[str, Any], context: RequestContext, now_s: float, table: VideoTable, seed: int
) -> ViewerQuery:
    """The viewer at the moment of the request.

    Args:
        viewer_row: field name -> value of ``VIEWER_VIEWS``; ``None`` or absent where unknown. Where the row has no
            region or language the request's own are taken.
        now_s: Unix seconds.
        table: of the release, to find the history in.
        seed: of everything random in this request.
    """
    row = {name: value for name in _FIELDS if (value := viewer_row.get(name)) is not None}
    row.setdefault("region", context.region)
    row.setdefault("language", context.language)
    arrays = assemble_viewers(columns_from_row(row), np.array([now_s]), [context.device], table.dimensions)
    history = table.rows_of(np.asarray(row.get("history_videos", ()), dtype=np.int64))
    weights = np.asarray(row.get("history_weights", ()), dtype=np.float32)
    known = history != ABSENT
    return ViewerQuery(
        arrays=arrays,
        history_rows=history[known],
        history_weights=weights[known],
        region=row["region"],
        now_s=now_s,
        seed=seed,
    )


def nobody(table: VideoTable) -> ViewerQuery:
    """A viewer without a past, to try a stage with."""
    return viewer_query({}, RequestContext(), time.time(), table, seed=0)


def first_ranking(query: ViewerQuery, table: VideoTable) -> tuple[F32, NDArray[np.int64], F32, Rows, F32, float]:
    """What a ranking is tried with: the arguments of ``Ranking.rank`` for as many videos as there are in a request."""
    some = np.arange(min(len(table), 500), dtype=np.int32)
    embedding = np.zeros((1, table.embedding.shape[1]), dtype=np.float32)
    viewer = query.arrays
    return (
        viewer.viewer_dense, viewer.viewer_categories, embedding, some, np.zeros(len(some), np.float32), query.now_s,
    )  # fmt: skip
