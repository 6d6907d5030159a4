"""Converts numpy arrays to columns of the event schema; ``store.cast_to_schema`` and ``checks`` validate them."""

# Shapes: N rows, D embedding

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.platform.contracts.events import STRING_DICTIONARY_TYPE, TIMESTAMP_TYPE

I64 = NDArray[np.int64]


def time_column(time_us: I64) -> pa.Array:
    """Returns microseconds since 1970 as a time column."""
    return pa.array(time_us.astype(np.int64, copy=False), pa.int64()).cast(TIMESTAMP_TYPE)


def float32_column(values: NDArray[np.float64]) -> pa.Array:
    """Returns values in single precision. A value beyond its range becomes infinite, which the data checks reject."""
    with np.errstate(over="ignore"):
        return pa.array(values.astype(np.float32))


def dictionary_column(codes: NDArray[np.integer[Any]], vocabulary: Sequence[str]) -> pa.Array:
    """Returns codes into ``vocabulary`` as a dictionary column."""
    return pa.DictionaryArray.from_arrays(
        pa.array(codes.astype(np.int32, copy=False)), pa.array(list(vocabulary), pa.string())
    ).cast(STRING_DICTIONARY_TYPE)


def constant_column(value: str, rows: int) -> pa.Array:
    return dictionary_column(np.zeros(rows, dtype=np.int32), [value])


def list_column(values_ND: NDArray[np.float32], present: NDArray[np.bool_] | None = None) -> pa.Array:
    """Returns the rows of a matrix as a list column; null where ``present`` is false."""
    rows, width = values_ND.shape
    if present is None:
        present = np.ones(rows, dtype=np.bool_)
    offsets = np.concatenate([[0], np.cumsum(present * width)]).astype(np.int32)
    flat = pa.array(np.ascontiguousarray(values_ND[present], dtype=np.float32).ravel())
    return pa.ListArray.from_arrays(pa.array(offsets), flat, mask=pa.array(~present))


def earliest_by_key(keys: I64, time_us: I64) -> tuple[I64, I64]:
    """Returns distinct keys, ascending, and the earliest time of each. Shapes: ``[N], [N] -> [K], [K]``."""
    order = np.lexsort((time_us, keys))
    keys, time_us = keys[order], time_us[order]
    first = np.ones(len(keys), dtype=np.bool_)
    first[1:] = keys[1:] != keys[:-1]
    return keys[first], time_us[first]
