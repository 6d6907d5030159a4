"""Filters proposals that may not be shown to the viewer and counts them by kind.

| kind           | reason                                                                            |
|----------------|-----------------------------------------------------------------------------------|
| shown          | the viewer was shown the video lately (``retrieval.shown_hours``)                 |
| watched        | the viewer watched the video to the end (``retrieval.watched_days``)              |
| seen           | the video is in the viewer's history                                              |
| not_interested | the video is in the history with a negative weight: skipped, hidden or reported   |
| blocked        | the viewer blocked the video's creator or topic                                   |
| unservable     | the release's video table does not have the video, or the video was taken down    |
| duplicate      | the video is already a candidate of another source (counted by ``retrieval``)     |
| over_quota     | the source's quota, and the unused quota of others, is full (``retrieval``)       |

The index search leaves out shown and blocked videos itself, so these are counted for the other sources.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from reelway.platform.features.watched_filter import is_watched
from reelway.serving.stages.arrays import Codes, Rows, ViewerQuery
from reelway.serving.video_table import ABSENT, VideoTable

ALLOWED, SHOWN, WATCHED, SEEN, NOT_INTERESTED, BLOCKED, UNSERVABLE = range(7)
_KINDS: Final = ("shown", "watched", "seen", "not_interested", "blocked", "unservable")


def allowed_candidates(rows: Rows, query: ViewerQuery, table: VideoTable) -> tuple[NDArray[np.bool_], dict[str, int]]:
    """Returns a mask of the ``rows`` that may be shown, and the others' number by kind. Shapes: ``[P] -> [P]``."""
    kind = kinds_of(rows, query, table)
    counts = np.bincount(kind, minlength=len(_KINDS) + 1).tolist()
    return kind == ALLOWED, dict(zip(_KINDS, counts[1:], strict=True))


def kinds_of(rows: Rows, query: ViewerQuery, table: VideoTable) -> Codes:
    """Returns why each row may not be shown, or ``ALLOWED``. Of several reasons the last of the table above counts."""
    kind = np.zeros(len(rows), dtype=np.int8)
    exclusions = query.exclusions
    if len(exclusions.shown_rows):
        kind[_is_in(rows, np.sort(exclusions.shown_rows))] = SHOWN
    if len(exclusions.watched):
        kind[is_watched(exclusions.watched, table.video_id[rows])] = WATCHED
    _mark_history(kind, rows, query)
    if len(exclusions.blocked_creators):
        kind[_is_in(table.creator_id[rows], exclusions.blocked_creators)] = BLOCKED
    if len(exclusions.blocked_topics):
        kind[_is_in(table.topic[rows], exclusions.blocked_topics)] = BLOCKED
    kind[rows == ABSENT] = UNSERVABLE
    return kind


def _mark_history(kind: Codes, rows: Rows, query: ViewerQuery) -> None:
    # A search in the short history, because a mask over the whole catalogue would grow with the catalogue.
    first = np.lexsort((query.history_weights >= 0, query.history_rows))  # by row; negative weights first
    past = query.history_rows[first]
    if len(past):
        index = np.searchsorted(past, rows)
        index[index == len(past)] = 0
        disliked = query.history_weights[first] < 0
        is_past = past[index] == rows
        kind[is_past] = np.where(disliked, NOT_INTERESTED, SEEN).astype(np.int8)[index[is_past]]


def _is_in(values: NDArray[np.integer], ascending: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Whether each value is among ``ascending``, which is not empty. Shapes: ``[P] -> [P]``."""
    index = np.searchsorted(ascending, values)
    index[index == len(ascending)] = 0
    found: NDArray[np.bool_] = ascending[index] == values
    return found
