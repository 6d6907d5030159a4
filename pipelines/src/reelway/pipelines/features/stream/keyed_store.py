"""The stream's state as its tasks see it: tables of byte strings by integer key. The host provides transactions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np

from reelway.pipelines.features.windows import I64

PART_BYTES: Final = 256 * 1024
"""Maximum size of a part of something that grows. A change of the state is one Kafka message of at most 1 MB."""


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


class TimedBytes:
    """Byte strings by point in time, which grow by appending. An append writes only what is new.

    The bytes of point ``t`` are stored as parts of at most ``PART_BYTES`` under ``t + 1``, ``t + 2``, ..., and the
    number of parts under ``t``. So points are at least a second apart, and a point has fewer than a million parts.
    """

    def __init__(self, store: KeyedStore, table: str) -> None:
        self._store, self._table = store, table

    def append(self, points_us: I64, values: Sequence[bytes]) -> None:
        """Appends to each point a value of at least one byte. The points are distinct."""
        keys: list[int] = []
        stored: list[bytes] = []
        for point, number, value in zip(points_us.tolist(), self._part_counts(points_us), values, strict=True):
            parts = [value[start : start + PART_BYTES] for start in range(0, len(value), PART_BYTES)]
            keys += [*range(point + 1 + number, point + 1 + number + len(parts)), point]
            stored += [*parts, np.int64(number + len(parts)).tobytes()]
        self._store.put_many(self._table, np.array(keys, dtype=np.int64), stored)

    def pop(self, points_us: I64) -> bytes:
        """Returns the bytes of the points, in the points' order and each in the order of its appends; deletes them."""
        found, keys = self._stored(points_us)
        self._store.delete_many(self._table, keys)
        return found

    def read(self, points_us: I64) -> bytes:
        """Returns the bytes that ``pop`` would return, and keeps them."""
        return self._stored(points_us)[0]

    def _stored(self, points_us: I64) -> tuple[bytes, I64]:
        """Returns the bytes of the points, and the keys that hold them."""
        counts = np.array(self._part_counts(points_us), dtype=np.int64)
        used = counts > 0
        if not used.any():
            return b"", points_us[:0]
        points_us, counts = points_us[used], counts[used]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        keys = np.repeat(points_us, counts) + 1 + within
        found = self._store.get_many(self._table, keys)
        return b"".join(value for value in found if value is not None), np.concatenate([keys, points_us])

    def _part_counts(self, points_us: I64) -> list[int]:
        found = self._store.get_many(self._table, points_us)
        return [0 if value is None else int.from_bytes(value, "little") for value in found]


class LargeValues:
    """A table whose values may be longer than ``PART_BYTES``: further parts are in further tables, under the same key.

    A part of exactly ``PART_BYTES`` is followed by another one if that exists. A stored value is read before the same
    object replaces or deletes it, so it is known how many parts the value had.
    """

    def __init__(self, store: KeyedStore, table: str) -> None:
        self._store, self._table = store, table
        self._parts: dict[int, int] = {}
        """Numbers of parts of the values that were read and have several."""

    def get_many(self, keys: I64) -> list[bytes | None]:
        """See ``KeyedStore.get_many``."""
        found = self._store.get_many(self._table, keys)
        for index, value in enumerate(found):
            if value is not None and len(value) == PART_BYTES:
                found[index] = self._complete(int(keys[index]), value)
        return found

    def put_many(self, keys: I64, values: Sequence[bytes]) -> None:
        """See ``KeyedStore.put_many``."""
        self._store.put_many(self._table, keys, [value[:PART_BYTES] for value in values])
        for key, value in zip(keys.tolist(), values, strict=True):
            if len(value) > PART_BYTES or key in self._parts:
                starts = range(PART_BYTES, len(value), PART_BYTES)
                for number, start in enumerate(starts, 1):
                    part = value[start : start + PART_BYTES]
                    self._store.put_many(self._further(number), np.array([key], dtype=np.int64), [part])
                self._delete_from(key, 1 + len(starts))
                self._parts[key] = 1 + len(starts)

    def delete_many(self, keys: I64) -> None:
        """See ``KeyedStore.delete_many``."""
        self._store.delete_many(self._table, keys)
        for key in self._parts.keys() & set(keys.tolist()):
            self._delete_from(key, 1)
            del self._parts[key]

    def _complete(self, key: int, value: bytes) -> bytes:
        parts = [value]
        while len(parts[-1]) == PART_BYTES:
            (part,) = self._store.get_many(self._further(len(parts)), np.array([key], dtype=np.int64))
            if part is None:
                break
            parts.append(part)
        self._parts[key] = len(parts)
        return b"".join(parts)

    def _delete_from(self, key: int, number: int) -> None:
        for old in range(number, self._parts.get(key, 1)):
            self._store.delete_many(self._further(old), np.array([key], dtype=np.int64))

    def _further(self, number: int) -> str:
        return f"{self._table}.part{number}"
