"""Cells as records between the halves on a cluster. A record also carries its source's progress.

The record's key decides its partition. Kafka's clients choose the partition of a key as CRC-32 of the key modulo the
number of partitions (librdkafka's partitioner ``consistent``), so each partition has a key that leads to it.
"""

# Shapes: N rows of cells, K columns

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import count
from typing import Final

import numpy as np

from reelway.pipelines.features.stream.keyed_store import PART_BYTES
from reelway.pipelines.features.stream.time_buckets import LAYOUTS
from reelway.pipelines.features.stream.viewer_task import Cells
from reelway.platform.errors import DataError
from reelway.platform.eventlog.arrow_records import viewer_partitions

PARTITIONER: Final = "consistent"
_VERSION: Final = 1
_HEAD_NUMBERS: Final = 2
"""Integers before the rows of a point: the point and the number of its rows."""
_RECORD_NUMBERS: Final = PART_BYTES // 8 - 3
"""Integers of a record after its version, source and progress."""


@cache
def partition_key(partition: int, partitions: int) -> bytes:
    """Returns a key whose records go to the partition."""
    return next(key for n in count() if zlib.crc32(key := b"%d" % n) % partitions == partition)


def split_cells(cells: Sequence[Cells], partitions: int) -> Iterator[list[Cells]]:
    """Yields per partition of entities the cells that it owns."""
    owners = [viewer_partitions(some.entity, partitions) for some in cells]
    for partition in range(partitions):
        yield [
            Cells(some.view, some.point_us, some.entity[mine], some.rows[mine])
            for some, owner in zip(cells, owners, strict=True)
            if (mine := owner == partition).any()
        ]


def encode_cells(source: int, began_us: int, settled_us: int, cells: Sequence[Cells]) -> list[bytes]:
    """Encodes cells of one view as records of at most ``PART_BYTES``.

    Args:
        source: partition of viewers that the cells come from.
        began_us: the source's progress before these cells, in the stream's time. All records but the last state it.
        settled_us: the source's progress with these cells.
    """
    records = list(_split_rows(cells)) or [[]]
    progress = [began_us] * (len(records) - 1) + [settled_us]
    return [_encode_record(source, time_us, some) for time_us, some in zip(progress, records, strict=True)]


def _split_rows(cells: Sequence[Cells]) -> Iterator[list[Cells]]:
    """Yields the cells in lists whose rows fit into a record."""
    record: list[Cells] = []
    free = _RECORD_NUMBERS
    for some in cells:
        start = 0
        while start < len(some.entity):
            rows = (free - _HEAD_NUMBERS) // (1 + some.rows.shape[1])
            if rows < 1:
                yield record
                record, free = [], _RECORD_NUMBERS
                continue
            part = slice(start, start + rows)
            record.append(Cells(some.view, some.point_us, some.entity[part], some.rows[part]))
            free -= _HEAD_NUMBERS + len(record[-1].entity) * (1 + some.rows.shape[1])
            start += rows
    if record:
        yield record


def _encode_record(source: int, settled_us: int, cells: Sequence[Cells]) -> bytes:
    parts = [np.array([_VERSION, source, settled_us], dtype=np.int64)]
    for some in cells:
        parts.append(np.array([some.point_us, len(some.entity)], dtype=np.int64))
        parts.append(np.column_stack([some.entity, some.rows]).ravel())
    return np.concatenate(parts).tobytes()


def decode_cells(view: str, content: bytes) -> tuple[int, int, list[Cells]]:
    """Returns source, progress and cells of one record.

    Raises:
        DataError: if the record has another version.
    """
    flat = np.frombuffer(content, dtype=np.int64)
    if flat[0] != _VERSION:
        raise DataError(f"cells of {view}: a record has version {flat[0]}, expected {_VERSION}; update the stream")
    width = 1 + len(LAYOUTS[view].columns)
    cells, place = [], 3
    while place < len(flat):
        point_us, rows = int(flat[place]), int(flat[place + 1])
        table = flat[place + 2 : place + 2 + rows * width].reshape(rows, width)
        cells.append(Cells(view, point_us, table[:, 0], table[:, 1:]))
        place += 2 + rows * width
    return int(flat[1]), int(flat[2]), cells
