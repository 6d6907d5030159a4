"""Decides which outcomes of an impression count: the first of each type, and only one of a skip and a long watch.

Pure functions on arrays. An impression's counted types are bits, which the outcome store keeps until a further
outcome of the impression would be late.
"""

# Shapes: R outcomes, I impressions

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from reelway.platform.contracts.events import OutcomeType
from reelway.platform.eventlog.outcome_events import OUTCOME_TYPES
from reelway.platform.rollout.metric_names import RECEIVED_OUTCOMES

I64 = NDArray[np.int64]
Bools = NDArray[np.bool_]

COUNTED, DUPLICATE, CONTRADICTING = (
    RECEIVED_OUTCOMES.index(name) for name in ("counted", "duplicate", "contradicting")
)
_SKIP: Final = OUTCOME_TYPES.index(OutcomeType.SKIP)
_LONG_WATCHED: Final = 1 << 32
"""Bit of an impression whose watch was a long one. The bits of the types are below."""
_NEVER: Final = np.iinfo(np.int64).max


def judge_types(kind: I64, long_watch: Bools, owner: I64, before: I64) -> tuple[I64, I64]:
    """Returns the status of each outcome ``[R]``, and the counted types of each impression afterwards ``[I]``.

    A further outcome of a type is a duplicate. Of a skip and a long watch only the earlier one counts; the other one is
    contradicting. Its type is recorded as if it had counted, so the result does not depend on how outcomes are batched.

    Args:
        kind: index into ``OUTCOME_TYPES``, in the order of arrival.
        owner: index of the outcome's impression.
        before: counted types of each impression so far.
    """
    bit = 1 << kind
    status = np.full(len(kind), DUPLICATE)
    _, earliest = np.unique(owner * len(OUTCOME_TYPES) + kind, return_index=True)
    fresh = earliest[(before[owner[earliest]] & bit[earliest]) == 0]
    of = owner[fresh]
    skip, long = kind[fresh] == _SKIP, long_watch[fresh]
    skipped_at = np.where(before & (1 << _SKIP), -1, _first_position(of[skip], fresh[skip], len(before)))
    long_at = np.where(before & _LONG_WATCHED, -1, _first_position(of[long], fresh[long], len(before)))
    contradicts = (skip & (long_at[of] < fresh)) | (long & (skipped_at[of] < fresh))
    status[fresh] = np.where(contradicts, CONTRADICTING, COUNTED)
    after = before.copy()
    np.bitwise_or.at(after, of, bit[fresh] | np.where(long, _LONG_WATCHED, 0))
    return status, after


def _first_position(owner: I64, position: I64, owners: int) -> I64:
    """Returns the lowest position of each owner; the largest integer if it has none."""
    first = np.full(owners, _NEVER)
    np.minimum.at(first, owner, position)
    return first
