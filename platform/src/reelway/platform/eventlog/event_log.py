"""The interface of an event log. Types only; the log does not interpret its payloads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

Offsets = Mapping[int, int]
"""Partition -> offset of the next record to read. An absent partition is read from its beginning."""


class LogRecord(NamedTuple):
    """A record to append. A partition keeps its records in the order in which they were acknowledged."""

    id: str  # SQLite keeps one record per id; Kafka may keep a record that was sent twice
    partition: int  # 0..partitions-1; records whose relative order matters share a partition
    payload: bytes
    key: str = ""  # a compacted topic keeps the newest record of each key; empty: the id is the key


class StoredRecord(NamedTuple):
    """A record with its partition and offset."""

    partition: int
    offset: int
    time_us: int  # when the log appended it; a partition's times do not decrease
    payload: bytes


@dataclass(frozen=True, slots=True)
class ReadBatch:
    """The result of one read, in the order of each partition.

    Offsets without a record, such as those of deleted records, are skipped and do not hold the watermark.

    ``watermark_us``: no unread record was appended before this time. On Kafka, if all partitions are read to their
    ends, this is the reader's clock.
    """

    records: Sequence[StoredRecord]
    next_offsets: Offsets  # where the next read starts
    watermark_us: int


class EventLog(Protocol):
    """One log. Several processes may use it; several threads may call one object.

    Every method raises ``StorageError`` if the log cannot be reached or written.
    """

    @property
    def name(self) -> str:
        """The topic, or the path of the file."""
        ...

    @property
    def partitions(self) -> int: ...

    @property
    def max_record_bytes(self) -> int:
        """The largest payload of a record. An append of a larger one raises ``StorageError``."""
        ...

    def append(self, records: Sequence[LogRecord]) -> list[int]:
        """Appends all records and returns their offsets once they are durable. After an error, any may be."""
        ...

    def read(self, position: Offsets, *, limit: int, wait_s: float = 0.0) -> ReadBatch:
        """Reads at most ``limit`` records from the offsets on; waits up to ``wait_s`` seconds for the first."""
        ...

    def offsets_at(self, time_us: int) -> Offsets:
        """Returns the offset of each partition's first record appended at or after a time; its end if there is none."""
        ...

    def end_offsets(self) -> Offsets:
        """Returns the offsets of the next records to be appended."""
        ...

    def close(self) -> None: ...
