"""Writes catalogue changes to the event log, and repairs the order of versions that compaction depends on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Final, NamedTuple

from reelway.platform.errors import StorageError
from reelway.platform.eventlog.catalogue_events import (
    Restore,
    StatusChange,
    Takedown,
    TakedownState,
    VideoUpsert,
    as_record,
    decode_status_changes,
    topic_of,
)
from reelway.platform.eventlog.event_log import EventLog, Offsets, StoredRecord
from reelway.platform.eventlog.retained_records import WAIT_S, batches_until
from reelway.platform.eventlog.topics import Topic, open_topic

log = logging.getLogger(__name__)

READ_LIMIT: Final = 2_000
"""Records of one read."""
_CHUNK: Final = 1_000
Decoder = Callable[
    [Sequence[StoredRecord]], tuple[Sequence[VideoUpsert | None], int] | tuple[Sequence[StatusChange | None], int]
]


class CataloguePublisher:
    """Appends catalogue changes to the topics ``catalogue`` and ``takedowns``.

    Args:
        events: address of the event log.

    Raises:
        ConfigError: if the address is invalid.
        StorageError: if a topic cannot be opened.
    """

    def __init__(self, events: str | Path) -> None:
        self._stack = ExitStack()
        self._logs = {
            topic: self._stack.enter_context(closing(open_topic(events, topic)))
            for topic in (Topic.CATALOGUE, Topic.TAKEDOWNS)
        }

    def publish(self, changes: Sequence[VideoUpsert | Takedown | Restore]) -> None:
        """Appends the changes and returns once they are durable.

        Raises:
            StorageError: if the log cannot be written; publish all changes again. A repeated change has no effect.
        """
        for start in range(0, len(changes), _CHUNK):
            for topic, topic_log in self._logs.items():
                chunk = [change for change in changes[start : start + _CHUNK] if topic_of(change) is topic]
                if chunk:
                    topic_log.append([as_record(change, topic_log.partitions) for change in chunk])

    def read_takedowns(self) -> TakedownState:
        """Reads all takedowns and restorations to the present end of the log.

        Raises:
            StorageError: if the log cannot be read to its end.
        """
        state = TakedownState()
        topic_log = self._logs[Topic.TAKEDOWNS]
        for read in batches_until(topic_log, {}, topic_log.end_offsets(), limit=READ_LIMIT):
            changes, _ = decode_status_changes(read.records)
            state.apply(change for change in changes if change is not None)
        return state

    def end_offsets(self) -> dict[Topic, Offsets]:
        """Returns the end of each topic."""
        return {topic: topic_log.end_offsets() for topic, topic_log in self._logs.items()}

    def close(self) -> None:
        self._stack.close()


def is_at(position: Offsets, end: Offsets) -> bool:
    """Whether a position has reached the end offsets of all partitions."""
    return all(position.get(partition, 0) >= offset for partition, offset in end.items())


class GuardStep(NamedTuple):
    """Result of one step."""

    read: int  # records
    appended: int  # records appended again
    lost: int  # records to be appended again that are gone from the log


class VersionGuard:
    """Appends the newest record of a key again if an older version was appended after it.

    A compacted topic keeps the last record of a key, not the one with the newest version. One process runs the guard.

    Args:
        topic_log: a topic of catalogue changes.
        decode: ``decode_upserts`` or ``decode_status_changes``, by the topic.
    """

    def __init__(self, topic_log: EventLog, decode: Decoder) -> None:
        self._log = topic_log
        self._decode = decode
        self._position: Offsets = {}
        self._end: Offsets | None = None
        self._newest: dict[str, tuple[tuple[object, ...], int, int]] = {}  # key -> precedence, partition, offset

    @property
    def is_at_end(self) -> bool:
        """Whether the steps have reached the end that the log had at the first step."""
        return self._end is not None and is_at(self._position, self._end)

    def is_newest(self, change: VideoUpsert | StatusChange) -> bool:
        """Whether no newer version of the change's key was read."""
        newest = self._newest.get(change.key)
        return newest is None or change.precedence >= newest[0]

    def step(self) -> GuardStep:
        """Reads new records, and appends those again that an older version displaced.

        Raises:
            StorageError: if the log cannot be read or written; the next step tries again.
        """
        if self._end is None:
            self._end = self._log.end_offsets()
        read = self._log.read(self._position, limit=READ_LIMIT)
        changes, _ = self._decode(read.records)
        displaced: dict[str, None] = {}
        for record, change in zip(read.records, changes, strict=True):
            if change is None:
                continue
            newest = self._newest.get(change.key)
            if newest is None or change.precedence >= newest[0]:
                self._newest[change.key] = (change.precedence, record.partition, record.offset)
                displaced.pop(change.key, None)
            else:
                displaced[change.key] = None
        appended = sum(self._append_again(key) for key in displaced)
        self._position = read.next_offsets
        return GuardStep(len(read.records), appended, len(displaced) - appended)

    def _append_again(self, key: str) -> bool:
        precedence, partition, offset = self._newest[key]
        record = self._record_at(partition, offset)
        (change,), _ = self._decode([record]) if record else ([None], 0)
        if change is None or change.key != key or change.precedence != precedence:
            log.error("event log %s: the newest record of %s is gone; publish it again", self._log.name, key)
            return False
        self._log.append([as_record(change, self._log.partitions)])
        return True

    def _record_at(self, partition: int, offset: int) -> StoredRecord | None:
        """Returns the record at an offset, None if it was deleted. Records of other partitions may be read before."""
        position: Offsets = {**self._log.end_offsets(), partition: offset}
        while position[partition] <= offset:
            read = self._log.read(position, limit=READ_LIMIT, wait_s=WAIT_S)
            for record in read.records:
                if record.partition == partition:
                    return record if record.offset == offset else None
            if not read.records and read.next_offsets[partition] <= offset:
                raise StorageError(
                    f"event log {self._log.name}: partition {partition} cannot be read at offset {offset}; trying again"
                )
            position = read.next_offsets
        return None
