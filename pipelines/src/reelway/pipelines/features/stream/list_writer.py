"""The list task: reads exposures and outcomes from the event log and replaces ``lists.arrow`` every few seconds.

The loop of the process that writes the overlay calls ``ListWriter.poll``. The state is stored in one file together with
the offsets of the next records. A restart resumes from that file, so records after it are counted again and none twice.
Records that are older than the windows are not read. While the task catches up, it writes no lists, since readers would
not use them. A record that cannot be read is logged, counted and skipped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
from prometheus_client import CollectorRegistry

from reelway.pipelines.features.stream.lists import BUCKET_US, DAY_BUCKETS, ListWindows
from reelway.pipelines.features.stream.log_records import read_erasures
from reelway.pipelines.features.stream.recent_ids import I64
from reelway.platform.errors import DataError
from reelway.platform.eventlog import EventLog, ReadBatch, StoredRecord
from reelway.platform.eventlog.exposure_events import EXPOSURE_EVENT_SCHEMA, decode_exposures
from reelway.platform.eventlog.live_lists_file import MAX_AGE_S, LiveListsFile
from reelway.platform.eventlog.outcome_events import OUTCOME_EVENT_SCHEMA, decode_outcomes
from reelway.platform.eventlog.topics import Topic, open_topic
from reelway.platform.telemetry import counter, gauge

log = logging.getLogger(__name__)

WRITE_INTERVAL_S: Final = 2.0
SAVE_INTERVAL_S: Final = 60.0
READ_LIMIT: Final = 500
"""Records of one read of a topic."""
READS_PER_POLL: Final = 2
"""Reads of a topic in one ``poll``, so that the caller's loop goes on while the task catches up."""
_NEVER: Final = float("-inf")


class ListMetrics:
    """Exports the metrics ``reelway_lists_*``."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.age = gauge("reelway_lists_age_seconds", "Age of the time that the lists describe.", [], registry)
        self.refused = gauge(
            "reelway_lists_refused_values", "Regions and languages of exposures that found no free list.", [], registry
        )
        self.events = counter(
            "reelway_lists_events_total", "Events of the log by kind; an event that was appended twice is repeated.",
            ["kind", "result"], registry,
        )  # fmt: skip
        self.unreadable = counter(
            "reelway_lists_unreadable_records_total", "Records that are no batch of events.", ["kind"], registry
        )
        self.dropped = gauge(
            "reelway_lists_dropped_rows", "Pairs of list and video that did not fit into the state.", [], registry
        )
        for kind in (Topic.EXPOSURES, Topic.OUTCOMES):
            self.unreadable.labels(kind)

    def count_events(self, kind: Topic, total: int, new: int) -> None:
        self.events.labels(kind, "counted").inc(new)
        self.events.labels(kind, "repeated").inc(total - new)


class ListWriter:
    """Follows both topics and writes the lists.

    Args:
        events: address of the event log.
        overlay: folder of ``lists.arrow``, a path or fsspec URL.
        state: file of the state, on a disk of this process.
        registry: registry of the metrics.
        clock: Unix seconds.
        log_clock: clock of the log; see ``open_topic``.

    Raises:
        StorageError: if a topic cannot be opened or the state cannot be read.
        MalformedFileError: if ``state`` is not a state of this task.
    """

    def __init__(
        self,
        events: str | Path,
        overlay: str | Path,
        state: Path,
        registry: CollectorRegistry,
        *,
        clock: Callable[[], float] = time.time,
        log_clock: Callable[[], float] = time.time,
    ) -> None:
        self._windows = ListWindows()
        self._state = state
        self._offsets: dict[str, dict[int, int]] = {Topic.EXPOSURES: {}, Topic.OUTCOMES: {}}
        self._offsets |= self._windows.restore(state)
        self._file = LiveListsFile(overlay)
        self._metrics = ListMetrics(registry)
        self._clock = clock
        self._written_s = self._saved_s = _NEVER
        self._as_of_us = self._described_us = 0
        self._metrics.age.set_function(lambda: max(self._clock() - self._described_us / 1e6, 0.0))
        self._exposures = open_topic(events, Topic.EXPOSURES, log_clock)
        self._outcomes = open_topic(events, Topic.OUTCOMES, log_clock)
        self._skip_old_records()

    def poll(self) -> int:
        """Reads what is new, and writes the lists if they are due. Returns the number of new events.

        Raises:
            StorageError: if the log cannot be read or a file cannot be written; the next call tries again.
        """
        # Exposures first: an outcome counts for the region of its viewer's latest exposure.
        exposures_us, exposures = self._read(Topic.EXPOSURES, self._exposures)
        outcomes_us, outcomes = self._read(Topic.OUTCOMES, self._outcomes)
        self._as_of_us = max(self._as_of_us, min(exposures_us, outcomes_us))
        now_s = self._clock()
        try:
            if now_s - self._written_s >= WRITE_INTERVAL_S and self._as_of_us:
                self._written_s = now_s
                self._write(now_s)
        finally:
            if now_s - self._saved_s >= SAVE_INTERVAL_S:
                self.save()
        return exposures + outcomes

    def save(self) -> None:
        """Stores the state, from which a restart resumes."""
        self._windows.save(self._state, dict(self._offsets))
        self._saved_s = self._clock()

    def close(self) -> None:
        """Stores the state and closes the topics."""
        try:
            self.save()
        finally:
            self._exposures.close()
            self._outcomes.close()

    def _write(self, now_s: float) -> None:
        """Writes the lists unless they are too old to be used, and exports what they describe."""
        if now_s - self._as_of_us / 1e6 <= MAX_AGE_S:
            self._file.write(self._windows.lists(self._as_of_us))
        self._described_us = self._as_of_us
        self._metrics.dropped.set(self._windows.dropped_rows)
        self._metrics.refused.set(self._windows.refused_values)

    def _skip_old_records(self) -> None:
        """Moves the offsets to the first records that the longest window may count."""
        oldest_us = int(self._clock() * 1e6) - (DAY_BUCKETS + 1) * BUCKET_US
        for topic, events in ((Topic.EXPOSURES, self._exposures), (Topic.OUTCOMES, self._outcomes)):
            stored = self._offsets[topic]
            self._offsets[topic] = {p: max(stored.get(p, 0), at) for p, at in events.offsets_at(oldest_us).items()}

    def _read(self, topic: Topic, events: EventLog) -> tuple[int, int]:
        """Counts the new records of one topic. Returns the log's watermark in microseconds and the new events."""
        new = 0
        for _ in range(READS_PER_POLL):
            batch = events.read(self._offsets[topic], limit=READ_LIMIT)
            new += self._count(topic, batch)
            self._offsets[topic] = dict(batch.next_offsets)
            if len(batch.records) < READ_LIMIT:
                break
        return batch.watermark_us, new

    def _count(self, topic: Topic, batch: ReadBatch) -> int:
        if not batch.records:
            return 0
        is_outcomes = topic is Topic.OUTCOMES
        if len(gone := read_erasures(batch.records)):
            self._windows.erase(gone)
        rows, time_us = self._decode(topic, batch.records)
        new = self._windows.add_outcomes(rows, time_us) if is_outcomes else self._windows.add_exposures(rows, time_us)
        self._metrics.count_events(topic, rows.num_rows, new)
        return new

    def _decode(self, topic: Topic, records: Sequence[StoredRecord]) -> tuple[pa.Table, I64]:
        """Returns the rows of all records with their append times."""
        schema = OUTCOME_EVENT_SCHEMA if topic is Topic.OUTCOMES else EXPOSURE_EVENT_SCHEMA
        decode = decode_outcomes if topic is Topic.OUTCOMES else decode_exposures
        tables, times = [schema.empty_table()], [np.empty(0, np.int64)]
        for record in records:
            if not record.payload:
                continue
            try:
                rows = decode(record.payload)
            except DataError as error:
                self._metrics.unreadable.labels(topic).inc()
                log.warning("%s, partition %d, offset %d: %s", topic, record.partition, record.offset, error)
                continue
            tables.append(rows)
            times.append(np.full(rows.num_rows, record.time_us, dtype=np.int64))
        return pa.concat_tables(tables), np.concatenate(times)
