"""A store in memory for the stream's tasks."""

from __future__ import annotations

from collections.abc import Sequence

from reelway.pipelines.features.stream.keyed_store import PART_BYTES
from reelway.pipelines.features.windows import I64


class MemoryStore:
    """A ``KeyedStore`` that accepts no value which a Kafka message might not hold.

    ``written_bytes`` is the size of all values that were put.
    """

    def __init__(self) -> None:
        self.values: dict[tuple[str, int], bytes] = {}
        self.written_bytes = 0

    def get_many(self, table: str, keys: I64) -> list[bytes | None]:
        """See ``KeyedStore.get_many``."""
        return [self.values.get((table, key)) for key in keys.tolist()]

    def put_many(self, table: str, keys: I64, values: Sequence[bytes]) -> None:
        """See ``KeyedStore.put_many``."""
        for key, value in zip(keys.tolist(), values, strict=True):
            assert len(value) <= PART_BYTES, f"{table} {key}: {len(value)} bytes"
            self.values[table, key] = value
            self.written_bytes += len(value)

    def delete_many(self, table: str, keys: I64) -> None:
        """See ``KeyedStore.delete_many``."""
        for key in keys.tolist():
            self.values.pop((table, key), None)
