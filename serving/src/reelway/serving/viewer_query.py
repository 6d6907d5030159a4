"""Builds the ``ViewerQuery`` of a request from the viewer's row. An unknown viewer has an empty history."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from reelway.platform.contracts.api import RequestContext
from reelway.platform.contracts.blend import RetrievalSettings
from reelway.platform.contracts.feature_names import VIEWER_VIEWS, VIEWS
from reelway.platform.features.assembly import assemble_viewers, columns_from_row
from reelway.platform.features.viewer_memory import NO_IDS, ViewerMemoryState
from reelway.platform.features.watched_filter import generation_at
from reelway.serving.stages.arrays import I64, NO_EXCLUSIONS, Candidates, Exclusions, RankingInput, ViewerQuery
from reelway.serving.video_table import ABSENT, VideoTable

_FIELDS: Final = tuple(name for view in VIEWER_VIEWS for name in VIEWS[view])


def is_cold_start(viewer_row: Mapping[str, Any]) -> bool:
    """Whether the viewer's row has no history."""
    videos = viewer_row.get("history_videos")
    return videos is None or len(videos) == 0


def viewer_query(
    viewer_row: Mapping[str, Any],
    context: RequestContext,
    now_s: float,
    table: VideoTable,
    seed: int,
    exclusions: Exclusions = NO_EXCLUSIONS,
    count: int = 0,
    followed_creators: I64 = NO_IDS,
) -> ViewerQuery:
    """Returns the viewer at the moment of the request.

    Args:
        viewer_row: field name -> value of ``VIEWER_VIEWS``; ``None`` or missing if unknown. The request's region and
            language are used if the row has none.
        now_s: Unix seconds.
        table: video table of the release; history videos that it lacks are left out.
        seed: seed of every random choice in this request.
        exclusions: see ``exclusions_of``.
        count: videos requested.
        followed_creators: creators that the viewer follows.
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
        language=row["language"],
        now_s=now_s,
        seed=seed,
        exclusions=exclusions,
        count=count,
        followed_creators=followed_creators,
    )


def exclusions_of(memory: ViewerMemoryState, policy: RetrievalSettings, now_s: float, table: VideoTable) -> Exclusions:
    """Returns what the release's policy leaves out of a viewer's memory.

    A video that was shown twice, or that is in the store and in the router's own memory, counts once, at its last time.

    Args:
        now_s: Unix seconds of the clock that the memory was written by.
        table: video table of the release; shown videos that it lacks are left out.
    """
    first = int(np.searchsorted(memory.shown_at_s, now_s - policy.shown_hours * 3600.0, side="right"))
    videos = _last_occurrences(memory.shown_ids[first:])
    shown = table.rows_of(videos[max(len(videos) - policy.shown_videos, 0) :])
    watched = memory.watched
    if len(watched):
        oldest = generation_at(now_s - policy.watched_days * 86_400.0) if policy.watched_days else math.inf
        watched = watched[memory.watched_generations >= oldest]
    return Exclusions(shown[shown != ABSENT], watched, memory.blocked_creators, memory.blocked_topics)


def _last_occurrences(ids: I64) -> I64:
    """Returns each id once, in the order of the last occurrences."""
    _, from_end = np.unique(ids[::-1], return_index=True)
    return ids[np.sort(len(ids) - 1 - from_end)]


def cold_start_query(table: VideoTable) -> ViewerQuery:
    """Returns a viewer without a history, to warm up a stage with."""
    return viewer_query({}, RequestContext(), time.time(), table, seed=0)


def warm_up_input(query: ViewerQuery, table: VideoTable) -> RankingInput:
    """Returns an input of ranking with as many videos as a usual request has, to warm up the stage with."""
    rows = np.arange(min(len(table), 500), dtype=np.int32)
    embedding = np.zeros((1, table.embedding.shape[1]), dtype=np.float32)
    candidates = Candidates(
        rows=rows,
        source=np.zeros(len(rows), np.int8),
        similarity=np.zeros(len(rows), np.float32),
        trigger_rows=np.full(len(rows), ABSENT, np.int32),
        viewer_embedding=embedding,
    )
    return RankingInput.of(query, candidates)
