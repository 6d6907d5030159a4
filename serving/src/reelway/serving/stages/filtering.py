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
    kind_of = np.zeros(max(int(rows.max(initial=0)), int(query.history_rows.max(initial=0))) + 2, dtype=np.int8)
    kind_of[query.history_rows] = _SEEN
    kind_of[query.history_rows[query.history_weights < 0]] = _NOT_INTERESTED
    kind_of[ABSENT] = _UNSERVABLE  # -1 is the last one, which no row reaches
    kind = kind_of[rows]
    counts = np.bincount(kind, minlength=len(_KINDS)).tolist()
    return kind == 0, dict(zip(_KINDS[1:], counts[1:], strict=True))
