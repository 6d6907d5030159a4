"""The stream's host on one machine: one process, both halves, and one SQLite file for state, position and rows.

A micro-batch reads both topics and advances the halves up to the time until which both topics are complete. It writes
state, log positions and rows in one transaction, then delivers the rows. After a crash, recorded rows are delivered
(possibly again), and records that were not recorded are read again.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from reelway.pipelines.features.stream.bootstrap import DatasetState, bootstrap_view, initial_watermark_us
from reelway.pipelines.features.stream.entity_views import EmittedRows
from reelway.pipelines.features.stream.log_records import read_erasures, read_records
from reelway.pipelines.features.stream.rules import VIDEO_VIEWS, StreamRules
from reelway.pipelines.features.stream.sinks import FeatureSinks, encode_rows, latest_per_entity, rows_without_viewers
from reelway.pipelines.features.stream.sqlite_store import SqliteStore
from reelway.pipelines.features.stream.time_buckets import STREAMED
from reelway.pipelines.features.stream.video_facts import VideoFacts
from reelway.pipelines.features.stream.video_task import VideoTask
from reelway.pipelines.features.stream.viewer_task import ViewerTask
from reelway.pipelines.features.views import DAY_US, ViewSettings
from reelway.pipelines.features.windows import I64
from reelway.platform.eventlog import EventLog, Offsets
from reelway.platform.eventlog.parked_records import ParkedRecord, ParkedRecords
from reelway.platform.eventlog.retained_records import records_of_partition
from reelway.platform.eventlog.topics import Topic

log = logging.getLogger(__name__)

STALE_DATASET_AGE_US: Final = DAY_US
"""Age of a data set's end from which the stream's time continues from that end."""
MAX_RECORDS: Final = 500
"""Maximum number of records of a topic in one micro-batch."""
POLL_WAIT_S: Final = 0.25

ViewerLogs = Mapping[Topic, EventLog]
"""The logs of exposures and outcomes."""


@dataclass
class MicroBatchResult:
    """What a micro-batch did. ``results``: (exposures or outcomes, result) -> number of events."""

    records: int = 0
    events: Counter[str] = field(default_factory=Counter)
    results: Counter[tuple[str, str]] = field(default_factory=Counter)
    parked: Counter[str] = field(default_factory=Counter)
    watermark_us: int = 0
    steps: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    emitted: list[EmittedRows] = field(default_factory=list)


class LocalStream:
    """The stream of one run. Single-threaded; call ``start``, then ``run_micro_batch`` repeatedly.

    Args:
        ttl_us: TTL of each streamed view.
        sinks: None for a replay, whose micro-batches return every row.
        parked: receives records that cannot be read. By default they are only counted and logged.
    """

    def __init__(
        self,
        logs: ViewerLogs,
        store: SqliteStore,
        sinks: FeatureSinks | None,
        views: ViewSettings,
        ttl_us: Mapping[str, int],
        facts: VideoFacts,
        *,
        max_records: int = MAX_RECORDS,
        clock: Callable[[], float] = time.time,
        parked: ParkedRecords | None = None,
    ) -> None:
        self._logs, self._store, self._sinks, self._facts = logs, store, sinks, facts
        self._views, self._ttl_us = views, ttl_us
        self._max_records, self._clock, self._parked = max_records, clock, parked
        self.settled_us = 0
        self.began_us = 0
        self.behind_us = 0
        self.end_offsets: dict[Topic, Offsets] = {}

    def start(self, load_dataset: Callable[[], DatasetState], behind_us: int | None = None) -> None:
        """Resumes from the state, or begins from the data set.

        Args:
            load_dataset: called if there is no state.
            behind_us: offset of the stream's time in a replay; by default it is derived from clock and log.
        """
        if self._store.get("behind_us") is None:
            dataset = load_dataset()
            rules = StreamRules(self._views, self._ttl_us)
            settled_us = initial_watermark_us(dataset, rules.fine_us, int(self._clock() * 1e6))
            if behind_us is None:
                behind_us = offset_to_dataset_us(self._logs, settled_us, self._clock)
            with self._store.transaction():
                self._make_tasks(behind_us)
                rows = begin(self._viewers, self._videos, dataset, settled_us)
                self._store.put(began_us=settled_us, behind_us=behind_us, positions={})
                self._record(rows, settled_us, {})
        self.resume()
        self._deliver()

    def resume(self) -> None:
        """Returns to the recorded state, after a micro-batch that raised."""
        self._make_tasks(int(self._store.get("behind_us")))
        self.began_us = int(self._store.get("began_us"))
        self.settled_us = self._viewers.settled_us or 0
        stored = self._store.get("positions")
        self.positions: dict[Topic, Offsets] = {
            topic: {int(partition): offset for partition, offset in stored.get(topic, {}).items()}
            for topic in self._logs
        }

    def run_micro_batch(self, *, wait_s: float = POLL_WAIT_S) -> MicroBatchResult:
        """Reads, advances, records and delivers."""
        result = MicroBatchResult(watermark_us=self.settled_us)
        batches = {}
        for topic, events in self._logs.items():
            waits_s = 0.0 if result.records else wait_s / len(self._logs)
            batches[topic] = events.read(self.positions[topic], limit=self._max_records, wait_s=waits_s)
            result.records += len(batches[topic].records)
        positions = {topic: batch.next_offsets for topic, batch in batches.items()}
        complete_us = min(batch.watermark_us for batch in batches.values()) - self.behind_us
        if not result.records and complete_us - self.settled_us < self._viewers.rules.fine_us:
            self.positions = dict(positions)  # past offsets without records
            result.rows = self._deliver()
            return result
        with self._store.transaction():
            erased: set[int] = set()
            for topic, batch in batches.items():
                if len(gone := read_erasures(batch.records)):
                    self._viewers.erase(gone)
                    erased |= set(gone.tolist())
                read, parked = read_records(topic, self._logs[topic].name, batch.records, self._facts)
                result.events[topic] += len(read)
                self._park(parked, result)
                self._viewers.add(read)
            done = self._viewers.advance(complete_us)
            result.emitted = done.rows
            for view, task in self._videos.items():
                result.emitted += task.add(0, done.settled_us, [cells for cells in done.cells if cells.view == view])
            self._record(result.emitted, done.settled_us, positions, sorted(erased))
        self.positions, self.settled_us = dict(positions), done.settled_us
        result.watermark_us, result.steps, result.results = done.settled_us, done.steps, done.results
        if self._sinks is not None:
            result.rows = self._deliver()
            result.emitted = []
        return result

    def lag_records(self) -> dict[tuple[str, int], int]:
        """Returns the number of unread records per topic and partition."""
        return {
            (topic, partition): end - self.positions[topic].get(partition, end)
            for topic, events in self._logs.items()
            for partition, end in events.end_offsets().items()
        }

    def _make_tasks(self, behind_us: int) -> None:
        self.behind_us = behind_us
        rules = StreamRules(self._views, self._ttl_us, behind_us)
        self._viewers = ViewerTask(self._store, rules)
        self._videos = {view: VideoTask(self._store, view, rules, sources=1) for view in VIDEO_VIEWS}

    def _park(self, parked: Sequence[ParkedRecord], result: MicroBatchResult) -> None:
        if not parked:
            return
        result.parked.update(record.kind for record in parked)
        first = parked[0]
        log.warning(
            "records parked: log=%s count=%d, the first: partition=%d offset=%d reason=%s",
            first.log, len(parked), first.partition, first.offset, first.reason,
        )  # fmt: skip
        if self._parked is not None:
            self._parked.park(parked)

    def _record(
        self,
        emitted: Sequence[EmittedRows],
        settled_us: int,
        positions: Mapping[Topic, Offsets],
        erased: Sequence[int] = (),
    ) -> None:
        """Stores positions, undelivered rows and undelivered erasures of viewers, within a transaction."""
        if (emitted or erased) and self._sinks is not None:
            latest = latest_per_entity(emitted)
            sequence = int(self._store.get("change") or 0)
            if any(view in VIDEO_VIEWS for view in latest):
                sequence += 1
                self._store.put(change=sequence)
            self._store.add_undelivered(encode_rows(latest, settled_us, sequence, erased))
        self._store.put(
            positions={
                topic: {str(partition): offset for partition, offset in position.items()}
                for topic, position in positions.items()
            }
        )

    def _deliver(self) -> dict[str, int]:
        rows = dict.fromkeys(STREAMED, 0)
        if self._sinks is None:
            return rows
        for number, content in self._store.undelivered():
            for view, count in self._sinks.deliver(content).items():
                rows[view] += count
            self._store.delete_undelivered(number)
        return rows


def begin(
    viewers: ViewerTask, videos: Mapping[str, VideoTask], dataset: DatasetState, settled_us: int
) -> list[EmittedRows]:
    """Fills empty tasks that own all entities. Returns the row of every entity as of ``settled_us``."""
    entity_views = [*viewers.views.values(), *(task.entities for task in videos.values())]
    rows = [
        rows
        for view in entity_views
        for rows in bootstrap_view(view, dataset, settled_us, lambda ids: np.ones(len(ids), np.bool_))
    ]
    viewers.begin(settled_us)
    for task in videos.values():
        task.begin(settled_us)
    return rows


def erase_from_state(
    store: SqliteStore, views: ViewSettings, ttl_us: Mapping[str, int], viewer_ids: I64, *, dry_run: bool = False
) -> int:
    """Erases viewers from the state of a stream that does not run. Returns the number of deleted entries."""
    behind_us = store.get("behind_us")
    if behind_us is None:
        return 0
    task = ViewerTask(store, StreamRules(views, ttl_us, int(behind_us)))
    with store.erasing(keep=not dry_run):
        erased = task.erase(viewer_ids)
        for number, content in store.undelivered():
            rest, rows = rows_without_viewers(content, viewer_ids)
            erased += rows
            if rows:
                store.replace_undelivered(number, rest)
    return erased


def offset_to_dataset_us(logs: ViewerLogs, settled_us: int, clock: Callable[[], float]) -> int:
    """Returns how long the data set has ended when the stream begins, 0 for less than a day."""
    firsts_us = [time_us for events in logs.values() for time_us in _first_times_us(events)]
    rested_us = min([int(clock() * 1e6), *firsts_us]) - settled_us
    return rested_us if rested_us > STALE_DATASET_AGE_US else 0


def _first_times_us(events: EventLog) -> Iterator[int]:
    """Yields the append time of the oldest record of each partition that has one."""
    ends = events.end_offsets()
    for partition in ends:
        oldest = next(records_of_partition(events, partition, None, ends, limit=1), None)
        if oldest is not None:
            yield oldest.time_us
