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

from reelway.pipelines.features.stream.time_buckets import LAYOUTS
from reelway.pipelines.features.stream.viewer_task import Cells
from reelway.platform.errors import DataError
from reelway.platform.eventlog.arrow_records import viewer_partitions

PARTITIONER: Final = "consistent"
_VERSION: Final = 1


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


def encode_cells(source: int, settled_us: int, cells: Sequence[Cells]) -> bytes:
    """Encodes cells of one view.

    Args:
        source: partition of viewers that the cells come from.
        settled_us: the source's progress, in the stream's time.
    """
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
