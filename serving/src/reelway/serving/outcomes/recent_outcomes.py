"""The outcomes that a process appended to the log lately, so that a repeated one is not appended again.

A client repeats a request whose answer it did not get. Only the process that appended the outcome recognises it, and
only for a while; readers of the log recognise every other repetition by its id.
"""

# Shapes: N outcomes

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

I64 = NDArray[np.int64]
Bools = NDArray[np.bool_]

MAX_IDS: Final = 500_000
"""Ids in memory: 4 MB, and 50 s of 10,000 outcomes per second."""


class RecentOutcomes:
    """The ids of the last ``max_ids / 2`` to ``max_ids`` outcomes. One thread uses it."""

    def __init__(self, max_ids: int = MAX_IDS) -> None:
        self._half = max(max_ids // 2, 1)
        self._newer: I64 = np.empty(0, np.int64)  # sorted, as the other
        self._older: I64 = np.empty(0, np.int64)

    def are_new(self, id_N: I64) -> Bools:
        """Returns which outcomes are neither known nor repeated among those before them."""
        first_N = np.zeros(len(id_N), bool)
        first_N[np.unique(id_N, return_index=True)[1]] = True
        return first_N & ~_contains(self._newer, id_N) & ~_contains(self._older, id_N)

    def add(self, id_N: I64) -> None:
        """Adds outcomes that are new."""
        if len(self._newer) + len(id_N) > self._half:
            self._older, self._newer = self._newer, np.empty(0, np.int64)
        added = np.sort(id_N)
        self._newer = np.insert(self._newer, np.searchsorted(self._newer, added), added)


def _contains(sorted_ids: I64, id_N: I64) -> Bools:
    if not len(sorted_ids):
        return np.zeros(len(id_N), bool)
    place_N = np.minimum(np.searchsorted(sorted_ids, id_N), len(sorted_ids) - 1)
    return np.asarray(sorted_ids[place_N] == id_N)
