"""Heartbeats: records without events, by which time advances in partitions that nothing else is appended to.

A row is due at a point of the finest grid, and is written when every input has a record from after that point. So a
member appends heartbeats right after each point, to those partitions whose newest record is from before it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from uuid import uuid4

import pyarrow as pa

from reelway.pipelines.features.stream.metrics import StreamMetrics
from reelway.platform.errors import ReelwayError
from reelway.platform.eventlog import EventLog, LogRecord
from reelway.platform.eventlog.arrow_records import encode_rows
from reelway.platform.eventlog.exposure_events import EXPOSURE_EVENT_SCHEMA
from reelway.platform.eventlog.outcome_events import OUTCOME_EVENT_SCHEMA
from reelway.platform.eventlog.topics import Topic

log = logging.getLogger(__name__)

AFTER_POINT_S: Final = 0.02
"""Delay of heartbeats after a grid point."""
REPEAT_S: Final = 0.25
"""Delay until heartbeats are due again, if those before did not pass the point: the broker's clock may be behind."""
ANY_HEARTBEAT_S: Final = 5.0
"""Interval of heartbeats to all partitions, so that an assignment of a quiet partition is noticed."""
_OWN_S: Final = 30.0
_BACKLOG_US: Final = 2_000_000
_IDLE_S: Final = 0.5
_SCHEMAS: Final = {Topic.EXPOSURES: EXPOSURE_EVENT_SCHEMA, Topic.OUTCOMES: OUTCOME_EVENT_SCHEMA}


@dataclass(frozen=True)
class LastRead:
    """The last record that a member read from a partition.

    Args:
        time_us: its append time.
        read_s: when it was read, in monotonic seconds.
    """

    next_offset: int
    time_us: int
    read_s: float

    def is_own(self, now_s: float) -> bool:
        """Returns whether the partition most likely belongs to the member still."""
        return now_s - self.read_s < _OWN_S

    def is_of_backlog(self, point_us: int, now_s: float) -> bool:
        """Returns whether older records are being read, behind which a heartbeat would wait."""
        return self.time_us < point_us - _BACKLOG_US and now_s - self.read_s < _IDLE_S


LastReads = Mapping[tuple[str, int], LastRead]
"""(topic, partition) -> its last record."""


@dataclass(frozen=True)
class HeartbeatGrid:
    """Grid points in the log's time: all multiples of ``grid_us`` plus ``offset_us``."""

    grid_us: int
    offset_us: int = 0

    def last_point_us(self, now_us: int) -> int:
        """Returns the newest point that is not after a time."""
        return (now_us - self.offset_us) // self.grid_us * self.grid_us + self.offset_us

    def wait_s(self, now_us: int) -> float:
        """Returns how long to wait until heartbeats are due again."""
        after_next_us = self.last_point_us(now_us) + self.grid_us - now_us + int(AFTER_POINT_S * 1e6)
        return min(REPEAT_S, after_next_us / 1e6)


def partitions_behind(topic: str, partitions: int, reads: LastReads, point_us: int, now_s: float) -> list[int]:
    """Returns the member's partitions that were read to the end, and whose last record is from before a grid point."""
    lasts = {partition: reads[topic, partition] for partition in range(partitions) if (topic, partition) in reads}
    return [
        partition
        for partition, last in lasts.items()
        if last.is_own(now_s) and last.time_us < point_us and not last.is_of_backlog(point_us, now_s)
    ]


def send_heartbeats(
    logs: Mapping[Topic, EventLog],
    last_reads: Callable[[], LastReads],
    grid: HeartbeatGrid,
    metrics: StreamMetrics,
    stop: threading.Event,
) -> None:
    """Appends heartbeats until ``stop`` is set."""
    payloads = {topic: encode_rows(_empty(schema)) for topic, schema in _SCHEMAS.items()}
    next_all_s = time.monotonic()
    while not stop.wait(grid.wait_s(time.time_ns() // 1000)):
        now_s, point_us = time.monotonic(), grid.last_point_us(time.time_ns() // 1000)
        reads = last_reads()
        to_all = now_s >= next_all_s
        next_all_s = now_s + ANY_HEARTBEAT_S if to_all else next_all_s
        for topic, events in logs.items():
            all_of_topic = range(events.partitions)
            due = all_of_topic if to_all else partitions_behind(topic, len(all_of_topic), reads, point_us, now_s)
            _append(events, [LogRecord(uuid4().hex, partition, payloads[topic]) for partition in due], metrics)
        if to_all:
            _record_lag(logs, reads, metrics)


def _append(events: EventLog, records: list[LogRecord], metrics: StreamMetrics) -> None:
    try:
        events.append(records)
    except ReelwayError as error:  # the next heartbeat follows soon
        metrics.count_fault()
        log.error("heartbeat not sent: %s", error)


def _record_lag(logs: Mapping[Topic, EventLog], reads: LastReads, metrics: StreamMetrics) -> None:
    try:
        metrics.record_lag(_lag(logs, reads))
    except ReelwayError as error:  # heartbeats matter more
        metrics.count_fault()
        log.error("number of unread records not known: %s", error)


def _lag(logs: Mapping[Topic, EventLog], reads: LastReads) -> dict[tuple[str, int], int]:
    """Returns the number of unread records of the partitions that this member reads."""
    now_s = time.monotonic()
    return {
        (topic, partition): end - reads[topic, partition].next_offset
        for topic, events in logs.items()
        for partition, end in events.end_offsets().items()
        if (topic, partition) in reads and reads[topic, partition].is_own(now_s)
    }


def _empty(schema: pa.Schema) -> Any:
    return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)
