"""Which proposals may not be shown, and why each left. What left is counted apart from what was selected.

| kind           | left because                                                          |
|----------------|-----------------------------------------------------------------------|
| seen           | it is in the viewer's history                                         |
| not_interested | it is in the history with a negative weight: skipped, hidden, reported |
| unservable     | a list names it and the release's video table does not have it        |
| duplicate      | another source has it among the candidates (see ``blending``)         |
| over_quota     | its source's places, and those left over, were taken                  |
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from reelway.serving.stages.arrays import Rows, ViewerQuery
from reelway.serving.video_table import ABSENT

_KINDS: Final = ("allowed", "seen", "not_interested", "unservable")
_SEEN, _NOT_INTERESTED, _UNSERVABLE = 1, 2, 3


def allowed(rows: Rows, query: ViewerQuery) -> tuple[NDArray[np.bool_], dict[str, int]]:
    """Which of ``rows`` may be shown to this viewer, and how many may not, by kind. Shapes: ``[P] -> [P]``."""
    # Looked up in the history, which is short, and not in a mark per video of the catalogue, which may be long.
    first = np.lexsort((query.history_weights >= 0, query.history_rows))  # by row; a dislike before everything else
    past = query.history_rows[first]
    found = np.searchsorted(past, rows)
    found[found == len(past)] = 0
    kind = np.zeros(len(rows), dtype=np.int8)
    if len(past):
        disliked = query.history_weights[first] < 0
        kind = (past[found] == rows) * np.where(disliked, _NOT_INTERESTED, _SEEN).astype(np.int8)[found]
    kind[rows == ABSENT] = _UNSERVABLE
    counts = np.bincount(kind, minlength=len(_KINDS)).tolist()
    return kind == 0, dict(zip(_KINDS[1:], counts[1:], strict=True))
