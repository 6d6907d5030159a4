"""Fixed-size hash tables over ids: which events were counted lately, and where a viewer was seen last.

Both are direct-mapped: an id has one slot, and the newest id of a slot replaces the one before it. Memory does not grow
with the number of ids, and a look-up of a batch is one gather. The price is forgetting: after n newer ids, an id is
known with probability ``(1 - 1/slots) ** n``, which is 0.91 for 100,000 ids and 2^20 slots.
"""

# Shapes: N ids

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from reelway.platform.features.hashing import mix64

I64 = NDArray[np.int64]
I16 = NDArray[np.int16]
Bools = NDArray[np.bool_]

SLOTS: Final = 1 << 20
_FREE: Final = -1


def _slots_of(ids: I64, slots: int) -> I64:
    return np.asarray(mix64(ids.astype(np.uint64)) % np.uint64(slots)).astype(np.int64)


class RecentIds:
    """The ids of recent events, to recognise events that were appended twice.

    Args:
        slots: number of ids that are kept at most; 8 bytes each.
    """

    def __init__(self, slots: int = SLOTS) -> None:
        self._ids: I64 = np.full(slots, _FREE, dtype=np.int64)

    def add(self, ids: I64) -> Bools:
        """Remembers the ids and returns which of them are new: the first of equal ids, unless it is remembered."""
        slot = _slots_of(ids, len(self._ids))
        is_new = np.zeros(len(ids), dtype=np.bool_)
        is_new[np.unique(ids, return_index=True)[1]] = True
        is_new &= self._ids[slot] != ids
        self._ids[slot] = ids
        return is_new

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Returns the remembered ids, without free slots."""
        return {"ids": self._ids[self._ids != _FREE]}

    def restore(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Remembers the ids of ``to_arrays``."""
        self._ids[_slots_of(arrays["ids"], len(self._ids))] = arrays["ids"]


class ViewerPlaces:
    """The region and language that each viewer had in the latest exposure, as codes; code 0 is unknown.

    Args:
        slots: number of viewers that are kept at most; 12 bytes each.
    """

    def __init__(self, slots: int = SLOTS) -> None:
        self._viewers: I64 = np.full(slots, _FREE, dtype=np.int64)
        self._codes: I16 = np.zeros((slots, 2), dtype=np.int16)

    def put(self, viewer_ids: I64, codes_N2: NDArray[np.integer[Any]]) -> None:
        """Stores the codes of region and language; of a repeated viewer the last."""
        slot = _slots_of(viewer_ids, len(self._viewers))
        last = len(slot) - 1 - np.unique(slot[::-1], return_index=True)[1]
        self._viewers[slot[last]] = viewer_ids[last]
        self._codes[slot[last]] = codes_N2[last]

    def get(self, viewer_ids: I64) -> I16:
        """Returns the codes of region and language, ``[N, 2]``; 0 for a viewer who is not known."""
        slot = _slots_of(viewer_ids, len(self._viewers))
        return np.where((self._viewers[slot] == viewer_ids)[:, None], self._codes[slot], np.int16(0))

    def erase(self, viewer_ids: I64) -> int:
        """Forgets viewers. Returns how many were known."""
        gone = np.isin(self._viewers, viewer_ids)
        self._viewers[gone], self._codes[gone] = _FREE, 0
        return int(gone.sum())

    def forget(self, codes: I64) -> None:
        """Makes the codes unknown for all viewers."""
        self._codes[np.isin(self._codes, codes)] = 0

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Returns the known viewers and their codes."""
        used = self._viewers != _FREE
        return {"viewers": self._viewers[used], "codes": self._codes[used]}

    def restore(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Stores the viewers of ``to_arrays``."""
        self.put(arrays["viewers"], arrays["codes"])
