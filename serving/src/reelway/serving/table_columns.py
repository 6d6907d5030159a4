"""Columns of a video table: the rows of the release, memory-mapped, followed by the rows of the overlay.

One thread appends, any number of threads read. A row never changes once it is appended, and a reader sees complete rows
only, so readers take no lock.
"""

# Shapes: N rows of the release, M rows of the overlay, V videos of the overlay, C requested rows

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

I64 = NDArray[np.int64]
F64 = NDArray[np.float64]
Rows = NDArray[np.int32]
_FIRST_BUFFER_ROWS: Final = 64


class Column:
    """One column, ``[N + M, ...]``.

    Args:
        base: the release's rows, ``[N, ...]``.
    """

    def __init__(self, base: NDArray[Any]) -> None:
        self.base = base
        self.added: NDArray[Any] = base[:0]
        """Rows of the overlay, ``[M, ...]``."""
        self._buffer: NDArray[Any] = base[:0]

    def __len__(self) -> int:
        return len(self.base) + len(self.added)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self.base.shape[1:])

    def take(self, rows: NDArray[np.integer[Any]], axis: int = 0) -> NDArray[Any]:
        """Returns the values at ``rows``. Shapes: ``[C] -> [C, ...]``.

        Raises:
            IndexError: if the table does not have a row.
        """
        split = len(self.base)
        late = np.flatnonzero(rows >= split)
        if not len(late):
            values: NDArray[Any] = self.base.take(rows, axis=axis)
            return values
        values = self.base.take(np.minimum(rows, split - 1), axis=axis)
        values[late] = self.added[rows[late] - split]
        return values

    def __getitem__(self, rows: Any) -> Any:
        if isinstance(rows, np.ndarray) and rows.dtype.kind in "iu":
            return self.take(rows)
        return np.asarray(self)[rows]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        whole = np.concatenate([self.base, self.added]) if len(self.added) else self.base
        return np.array(whole, dtype=dtype, copy=copy)

    def append(self, values: NDArray[Any]) -> None:
        """Adds rows to the overlay, ``[rows, ...]``."""
        count = len(self.added)
        end = count + len(values)
        if end > len(self._buffer):
            size = max(end, 2 * len(self._buffer), _FIRST_BUFFER_ROWS)
            grown = np.empty((size, *self.base.shape[1:]), dtype=self.base.dtype)
            grown[:count] = self.added
            self._buffer = grown
        self._buffer[count:end] = values
        added = self._buffer[:end]
        added.flags.writeable = False
        self.added = added


def index_in_sorted(values: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the index of each wanted value in the ascending ``values``, -1 where it is missing. ``[C] -> [C]``."""
    if not len(values):
        return np.full(wanted.shape, -1, dtype=np.int64)
    index = np.searchsorted(values, wanted)
    index[index == len(values)] = 0
    return np.where(values[index] == wanted, index, -1)


@dataclass(frozen=True)
class Uploads:
    """Indexes of the rows of a table's extension. Each version is immutable."""

    rows: int
    video_id: I64  # [V] ascending
    newest_row: Rows  # [V] row of each video's newest version
    replaced: I64  # indices of the rows that a newer version has replaced
    newest_first: Rows  # [V] ``newest_row`` by upload time, latest first
    uploaded_before: F64  # [V] negative upload time in the order of ``newest_first``, ascending

    @classmethod
    def of(cls, video_id: I64, uploaded_at_s: F64, first_row: int) -> Uploads:
        """Indexes the extension's columns ``[M]``, whose first row has the number ``first_row``."""
        ids, last = np.unique(video_id[::-1], return_index=True)
        newest = len(video_id) - 1 - last
        replaced = np.setdiff1d(np.arange(len(video_id)), newest, assume_unique=True)
        order = newest[np.argsort(-uploaded_at_s[newest], kind="stable")]
        return cls(
            len(video_id), ids, (newest + first_row).astype(np.int32), replaced,
            (order + first_row).astype(np.int32), -uploaded_at_s[order],
        )  # fmt: skip


_NO_IDS: Final = np.empty(0, dtype=np.int64)
NO_UPLOADS: Final = Uploads.of(_NO_IDS, np.empty(0, dtype=np.float64), 0)
