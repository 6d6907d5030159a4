"""Keys of viewers, each on one arm, and who of them was on another arm of the rollout before. Pure functions."""

# Shapes: N viewers, U distinct viewers

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

I64 = NDArray[np.int64]
Bools = NDArray[np.bool_]

ARM_SHIFT: Final = 53
"""A viewer's row id is the arm's number above the 53 bits of the viewer id, so one arm's viewers are contiguous."""
_VIEWER_MASK: Final = (1 << ARM_SHIFT) - 1
_NEVER: Final = np.iinfo(np.int64).max


def viewer_keys(arm_ids: I64, viewer_ids: I64) -> I64:
    """Row ids of viewers, each on an arm. Shapes: ``[N], [N] -> [N]``."""
    return np.asarray((arm_ids << ARM_SHIFT) | viewer_ids)


def arm_ids_of(keys: I64) -> I64:
    """The arms' numbers in ``viewer_keys``. Shapes: ``[N] -> [N]``."""
    return np.asarray(keys >> ARM_SHIFT)


def seen_elsewhere(key_U: I64, shown: I64, peers: Mapping[int, Sequence[int]], known: Callable[[I64], Bools]) -> Bools:
    """Returns which viewers were on another arm of the rollout before they were on theirs. Shape: ``[U]``.

    When a weight grows, viewers move from stable to the canary. They are no new viewers of the rollout.

    Args:
        key_U: keys of distinct viewers, ascending.
        shown: keys of impressions that are being counted, in their order; ``key_U`` contains them.
        peers: arm number -> the numbers of the rollout's other arms.
        known: returns which keys were counted before.
    """
    keys, first = np.unique(shown, return_index=True)
    arm_U, viewer_U = arm_ids_of(key_U), key_U & _VIEWER_MASK
    found, elsewhere = [np.zeros(0, np.int64)], np.zeros(len(key_U), bool)
    theirs = [np.zeros(0, np.int64)]
    for arm_id in np.unique(arm_U).tolist():
        index = np.flatnonzero(arm_U == arm_id)
        for peer in peers[arm_id]:
            found.append(index)
            theirs.append(viewer_keys(np.full(len(index), peer), viewer_U[index]))
    index, other = np.concatenate(found), np.concatenate(theirs)
    before = known(other) | (_position(keys, first, other) < _position(keys, first, key_U[index]))
    elsewhere[index[before]] = True
    return elsewhere


def _position(keys: I64, first: I64, wanted: I64) -> I64:
    """Returns ``first`` of each wanted key among the ascending ``keys``; the largest integer for an absent key."""
    if not len(keys):
        return np.full(len(wanted), _NEVER)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, first[at], _NEVER)
