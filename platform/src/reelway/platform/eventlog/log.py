"""What an event log promises, whatever keeps it. Types only; it refuses to know what the records say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

Position = Mapping[int, int]
"""Partition -> offset of the next record to read. A partition that is not named is read from its beginning."""


class LogRecord(NamedTuple):
    """Something to append. The log keeps records of one partition in the order in which it acknowledged them."""

    id: str  # the appender's; SQLite keeps one record of an id, Kafka may keep one that was sent again twice
    partition: int  # 0..partitions-1; records whose order matters to each other go into one
    time_us: int  # when it was handed in, by the appender's clock
    payload: bytes


class StoredRecord(NamedTuple):
    """A record with its place."""

    partition: int
    offset: int
    time_us: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class ReadBatch:
    """What one read found, in the order of each partition.

    ``complete_until_us``: no record that is still unread was handed in before this moment, but for what takes longer
    from its appender's clock to the log than the reader allows for.
    """

    records: Sequence[StoredRecord]
    position: Position  # to read on from
    complete_until_us: int


class EventLog(Protocol):
    """One log. Its methods may be called by several threads, one at a time, and by several processes.

    All of them raise ``StorageError`` when the log cannot be reached or written.
    """

    @property
    def partitions(self) -> int: ...

    def append(self, records: Sequence[LogRecord]) -> list[int]:
        """Append all of them; returns their offsets when they are durable. After an error: some, all or none are."""
        ...

    def read(self, position: Position, *, limit: int, wait_s: float = 0.0) -> ReadBatch:
        """At most ``limit`` records from ``position`` on; waits up to ``wait_s`` for the first."""
        ...

    def position(self, consumer: str) -> Position:
        """Where the consumer has come to; empty for one that never committed."""
        ...

    def commit(self, consumer: str, position: Position) -> None:
        """Note that the consumer needs nothing before ``position`` again."""
        ...

    def end(self) -> Position:
        """The offsets that the next records will get."""
        ...

    def close(self) -> None: ...
