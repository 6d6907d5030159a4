"""The stream's state as its tasks see it: tables of byte strings by integer key. The host provides transactions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from reelway.pipelines.features.windows import I64


class KeyedStore(Protocol):
    """The state of one partition. All changes between two commits of the host are kept, or none is."""

    def get_many(self, table: str, keys: I64) -> list[bytes | None]:
        """Returns the value of each key, ``None`` for an absent one."""
        ...

    def put_many(self, table: str, keys: I64, values: Sequence[bytes]) -> None: ...

    def delete_many(self, table: str, keys: I64) -> None:
        """Deletes keys. An absent key is no error."""
        ...


def get_integers(store: KeyedStore, table: str, key: int = 0) -> I64 | None:
    """Returns an array that ``put_integers`` stored."""
    (value,) = store.get_many(table, np.array([key], dtype=np.int64))
    return None if value is None else np.frombuffer(value, dtype=np.int64)


def put_integers(store: KeyedStore, table: str, values: Sequence[int] | I64, key: int = 0) -> None:
    store.put_many(table, np.array([key], dtype=np.int64), [np.asarray(values, dtype=np.int64).tobytes()])


class TimedLists:
    """Lists of byte strings, one list per point in time. An append writes only what is new.

    The list of point ``t`` has its length under the key ``t`` and its entries under ``t + 1``, ``t + 2``, ... So points
    are at least a second apart, and a list has fewer than a million entries.
    """

    def __init__(self, store: KeyedStore, table: str) -> None:
        self._store, self._table = store, table

    def append(self, point_us: int, value: bytes) -> None:
        length = self._length(point_us)
        keys = np.array([point_us + 1 + length, point_us], dtype=np.int64)
        self._store.put_many(self._table, keys, [value, np.int64(length + 1).tobytes()])

    def pop(self, point_us: int) -> list[bytes]:
        """Returns the list of a point in its order, and deletes it."""
        length = self._length(point_us)
        if not length:
            return []
        keys = point_us + 1 + np.arange(length, dtype=np.int64)
        found = self._store.get_many(self._table, keys)
        self._store.delete_many(self._table, np.append(keys, point_us))
        return [value for value in found if value is not None]

    def _length(self, point_us: int) -> int:
        stored = get_integers(self._store, self._table, point_us)
        return 0 if stored is None else int(stored[0])
