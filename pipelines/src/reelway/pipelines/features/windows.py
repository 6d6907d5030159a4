"""Trailing-window sums over events, used by both the batch views and the stream processor.

A window sum is the difference of two prefix sums. Over floats the difference would depend on how events were
partitioned, and the same feature could differ between one core and a cluster. Over integers it is exact. So times and
values must be integers; callers pass fixed point (microseconds, milliseconds, thousandths).
"""

# Shapes: N events, M entity rows, W windows, K values per event

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

I64 = NDArray[np.int64]

ALL_TIME_US = 1 << 61
"""A window longer than any clock value; it gives a cumulative sum."""


def _integers(name: str, values: NDArray[np.generic]) -> I64:
    if not np.issubdtype(values.dtype, np.integer) and values.dtype != np.bool_:
        raise TypeError(f"{name} has type {values.dtype}, expected integers (fixed point); scale and round it first")
    return values.astype(np.int64, copy=False)


def window_sums(
    entities: I64, times_us: I64, values: I64, at_entities: I64, at_times_us: I64, windows_us: Sequence[int]
) -> I64:
    """Sums the values of each entity's events over half-open windows ``(at - window, at]``.

    An event exactly at ``at`` counts; an event exactly one window older does not. So consecutive windows neither
    share nor lose an event. An entity without events sums to 0. Events may come in any order.

    Args:
        entities: ``[N]`` integer ids.
        times_us: ``[N]`` times from which the events count.
        values: ``[N, K]`` integers: counts, flags or fixed-point amounts.
        at_entities: ``[M]`` entity of each requested row.
        at_times_us: ``[M]`` time of each requested row.
        windows_us: W lengths, each above 0.

    Returns:
        ``[M, W, K]`` exact sums.

    Raises:
        TypeError: if times or values are not integers.
        ValueError: if a window is not longer than 0.
    """
    times_us, values = _integers("times_us", times_us), _integers("values", values)
    at_times_us = _integers("at_times_us", at_times_us)
    if shortest := [w for w in windows_us if w <= 0]:
        raise ValueError(f"window of {shortest[0]} us, expected more than 0")
    sums = np.zeros((len(at_entities), len(windows_us), values.shape[1]), dtype=np.int64)
    if not len(entities) or not len(at_entities):
        return sums
    known, entity_index = np.unique(entities, return_inverse=True)
    instants, instant_index = np.unique(times_us, return_inverse=True)
    stride = len(instants) + 1  # one key per (entity, instant), plus one past the last instant
    keys = entity_index * stride + instant_index
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    prefix = np.zeros((len(keys) + 1, values.shape[1]), dtype=np.int64)
    np.cumsum(values[order], axis=0, out=prefix[1:])

    entity_position = np.minimum(np.searchsorted(known, at_entities), len(known) - 1)
    present = known[entity_position] == at_entities
    base = entity_position * stride

    def rows_until(limits_us: I64) -> I64:
        return np.searchsorted(keys, base + np.searchsorted(instants, limits_us, side="right"), side="left")

    upper = prefix[rows_until(at_times_us)]
    for w, window_us in enumerate(windows_us):
        sums[:, w] = upper - prefix[rows_until(at_times_us - window_us)]
    sums[~present] = 0
    return sums
