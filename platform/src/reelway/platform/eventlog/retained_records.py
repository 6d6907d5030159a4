"""Reads the retained records of an event log up to a given end, also while a partition cannot be read for a moment.

A read may return nothing before the end for two reasons: retention has deleted the last records, or no broker leads
the partition at the moment. The watermark tells them apart.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

from reelway.platform.errors import StorageError
from reelway.platform.eventlog.event_log import EventLog, Offsets, ReadBatch, StoredRecord

READ_RECORDS: Final = 500
WAIT_S: Final = 1.0
"""How long a read waits after one that returned nothing."""
MOST_EMPTY_READS: Final = 30


def batches_until(
    topic_log: EventLog, position: Offsets, ends: Offsets, *, limit: int = READ_RECORDS
) -> Iterator[ReadBatch]:
    """Yields what is read from ``position`` on until all partitions have reached ``ends``.

    The last batch may contain records behind the ends.

    Raises:
        StorageError: if the log cannot be read, or ``MOST_EMPTY_READS`` reads return nothing before the ends.
    """
    at = dict(position)
    started_us = time.time_ns() // 1000
    empty_reads = 0
    while unread := [partition for partition, end in ends.items() if at.get(partition, 0) < end]:
        batch = topic_log.read(at, limit=limit, wait_s=WAIT_S if empty_reads else 0.0)
        at |= batch.next_offsets
        yield batch
        if not batch.records and batch.watermark_us >= started_us:
            return  # retention has deleted the records before the ends
        empty_reads = 0 if batch.records else empty_reads + 1
        if empty_reads >= MOST_EMPTY_READS:
            raise StorageError(
                f"{topic_log.name}: partition {unread[0]} ends at offset {ends[unread[0]]}, but nothing can be read "
                f"after offset {at.get(unread[0])}; check the event log"
            )


def records_of_partition(
    topic_log: EventLog, partition: int, first: int | None, ends: Offsets, *, limit: int = READ_RECORDS
) -> Iterator[StoredRecord]:
    """Yields the records of one partition before its end. The other partitions are read from their ends on.

    Args:
        first: offset of the first record; None for the oldest that is retained.
        ends: end offsets of all partitions.

    Raises:
        StorageError: see ``batches_until``.
    """
    position = {other: offset for other, offset in ends.items() if other != partition}
    if first is not None:
        position[partition] = first
    for batch in batches_until(topic_log, position, {partition: ends[partition]}, limit=limit):
        for record in batch.records:
            if record.partition == partition and record.offset < ends[partition]:
                yield record
