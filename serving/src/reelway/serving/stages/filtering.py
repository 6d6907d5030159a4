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

import numpy as np
from numpy.typing import NDArray

from reelway.serving.stages.arrays import Rows, ViewerQuery
from reelway.serving.video_table import ABSENT


def allowed(rows: Rows, query: ViewerQuery) -> tuple[NDArray[np.bool_], dict[str, int]]:
    """Which of ``rows`` may be shown to this viewer, and how many may not, by kind. Shapes: ``[P] -> [P]``."""
    servable = rows != ABSENT
    disliked = np.isin(rows, query.history_rows[query.history_weights < 0])
    watched = np.isin(rows, query.history_rows)
    left = {
        "unservable": int(np.count_nonzero(~servable)),
        "not_interested": int(np.count_nonzero(disliked & servable)),
        "seen": int(np.count_nonzero(watched & ~disliked & servable)),
    }
    return servable & ~watched, left
