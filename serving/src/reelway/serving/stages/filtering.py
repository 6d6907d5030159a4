"""Filters proposals that may not be shown to the viewer and counts them by kind.

| kind           | reason                                                                            |
|----------------|-----------------------------------------------------------------------------------|
| seen           | the video is in the viewer's history                                              |
| not_interested | the video is in the history with a negative weight: skipped, hidden or reported   |
| unservable     | the release's video table does not have the video, or the video was taken down    |
| duplicate      | the video is already a candidate of another source (counted by ``retrieval``)     |
| over_quota     | the source's quota, and the unused quota of others, is full (``retrieval``)       |
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from reelway.serving.stages.arrays import Rows, ViewerQuery
from reelway.serving.video_table import ABSENT

_KINDS: Final = ("allowed", "seen", "not_interested", "unservable")
_SEEN, _NOT_INTERESTED, _UNSERVABLE = 1, 2, 3


def allowed_candidates(rows: Rows, query: ViewerQuery) -> tuple[NDArray[np.bool_], dict[str, int]]:
    """Returns a mask of the ``rows`` that may be shown, and the others' number by kind. Shapes: ``[P] -> [P]``."""
    # A search in the short history, because a mask over the whole catalogue would grow with the catalogue.
    first = np.lexsort((query.history_weights >= 0, query.history_rows))  # by row; negative weights first
    past = query.history_rows[first]
    index = np.searchsorted(past, rows)
    index[index == len(past)] = 0
    kind = np.zeros(len(rows), dtype=np.int8)
    if len(past):
        disliked = query.history_weights[first] < 0
        kind = (past[index] == rows) * np.where(disliked, _NOT_INTERESTED, _SEEN).astype(np.int8)[index]
    kind[rows == ABSENT] = _UNSERVABLE
    counts = np.bincount(kind, minlength=len(_KINDS)).tolist()
    return kind == 0, dict(zip(_KINDS[1:], counts[1:], strict=True))
