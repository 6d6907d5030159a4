"""Arrow columns of event log records, built from arrays."""

# Shapes: N rows

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.platform.contracts.events import TIMESTAMP_TYPE


def timestamp_column(micros: NDArray[Any], missing: NDArray[np.bool_] | None = None) -> pa.Array:
    """Unix microseconds as timestamps; null where ``missing``. Shape: ``[N]``."""
    return pa.array(micros.astype(np.int64), pa.int64(), mask=missing).cast(TIMESTAMP_TYPE)


def dictionary_column(parts: Sequence[tuple[NDArray[np.integer[Any]], Sequence[str | None]]]) -> pa.Array:
    """Codes as one dictionary array. Each part has its own table of strings, in which None stands for null."""
    table: dict[str, int] = {}
    codes = []
    for code_N, strings in parts:
        new_code_of = [-1 if string is None else table.setdefault(string, len(table)) for string in strings]
        codes.append(np.array(new_code_of, np.int32)[code_N])
    joined = np.concatenate(codes)
    return pa.DictionaryArray.from_arrays(pa.array(joined, mask=joined < 0), pa.array(list(table), pa.string()))
