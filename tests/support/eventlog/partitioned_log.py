"""An event log with several partitions in memory, whose reads may return nothing for a while, as Kafka's may."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from reelway.platform.eventlog.event_log import LogRecord, Offsets, ReadBatch, StoredRecord

MAX_TIME_US = 1 << 62


class PartitionedLog:
    """An ``EventLog``. A read returns records of one partition, the last partition's first.

    Args:
        records: append time and payload of each record, by partition.
        first_offsets: offsets before these are deleted.
        empty_reads: number of reads that return nothing while a partition has no leader.
    """

    name = "partitioned"
    max_record_bytes = 1 << 20

    def __init__(
        self,
        records: Mapping[int, Sequence[tuple[int, bytes]]],
        *,
        first_offsets: Mapping[int, int] | None = None,
        empty_reads: int = 0,
    ) -> None:
        self.partitions = len(records)
        self._records = {
            partition: [StoredRecord(partition, offset, *one) for offset, one in enumerate(some)]
            for partition, some in records.items()
        }
        self._first_offsets = first_offsets or {}
        self._empty_reads = empty_reads
        self.reads = 0

    def append(self, records: Sequence[LogRecord]) -> list[int]:
        raise NotImplementedError("a log to read")

    def read(self, position: Offsets, *, limit: int, wait_s: float = 0.0) -> ReadBatch:  # noqa: ARG002  # nothing is appended meanwhile
        self.reads += 1
        if self.reads <= self._empty_reads:
            return ReadBatch([], dict(position), 0)
        at = {
            partition: max(position.get(partition, 0), self._first_offsets.get(partition, 0))
            for partition in self._records
        }
        for partition in sorted(self._records, reverse=True):
            found = self._records[partition][at[partition] :][:limit]
            if found:
                return ReadBatch(found, {**at, partition: found[-1].offset + 1}, found[-1].time_us)
        return ReadBatch([], at, MAX_TIME_US)

    def offsets_at(self, time_us: int) -> Offsets:
        return {
            partition: next((one.offset for one in some if one.time_us >= time_us), len(some))
            for partition, some in self._records.items()
        }

    def end_offsets(self) -> Offsets:
        return {partition: len(some) for partition, some in self._records.items()}

    def close(self) -> None:
        pass
