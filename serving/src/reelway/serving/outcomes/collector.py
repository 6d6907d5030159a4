"""Follows the event log's exposures and outcomes and sums them, on one thread.

The package's docstring gives the counting rules.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from reelway.platform.contracts.events import Arm
from reelway.platform.errors import DataError, MalformedFileError, StorageError
from reelway.platform.eventlog import EventLog, Offsets, ReadBatch
from reelway.platform.eventlog.erasures import NO_VIEWERS, erased_viewers
from reelway.platform.eventlog.topics import Topic
from reelway.platform.rollout.evidence import ArmStatistics
from reelway.platform.rollout.policy import Slice
from reelway.platform.supervised_thread import SupervisedThread
from reelway.serving.outcomes.exposition import LogReading, prometheus_text
from reelway.serving.outcomes.ledger import Ledger
from reelway.serving.outcomes.log_rows import ExposureRows, OutcomeRows, read_exposure_rows, read_outcome_rows
from reelway.serving.outcomes.outcome_store import OutcomeStore
from reelway.serving.outcomes.viewer_sums import statistics_of

log = logging.getLogger(__name__)

TOPICS: Final = (Topic.EXPOSURES, Topic.OUTCOMES)
RECORDS_PER_COMMIT: Final = 50
WAIT_S: Final = 0.05
"""Longest wait for a record of one topic, and therefore the delay of the other's."""
RETRY_DELAY_S: Final = 1.0
CLEANUP_INTERVAL_S: Final = 60.0
CLEANUP_BATCH_ROWS: Final = 5_000


@dataclass
class _FollowedTopic:
    """A topic and how far it is counted."""

    topic: Topic
    log: EventLog
    position: Offsets
    reading: LogReading
    reads: int = 0


class OutcomeCollector:
    """Sums the exposures and outcomes of rollouts from the event log.

    The position in the log is in the same file and transaction as the sums, so each event is counted once, wherever the
    process ends. With an empty file, the log is read from its beginning.

    Args:
        path: the SQLite file, created when it does not exist. One process at a time holds it.
        open_topic: opens a topic of the event log; called again after a failure.
        clock: Unix seconds, for the age in the metrics only.
        keep_rollouts: how many of the newest rollouts stay in memory and in the metrics.
        wait_s: how long to wait for another process to release the file.
        require_authenticated: whether only viewers who proved their identity are evidence.

    Raises:
        MalformedFileError: if the file is not an outcome store.
        StorageError: if it cannot be opened, is held by another process, or has another schema version.
    """

    def __init__(
        self,
        path: Path,
        open_topic: Callable[[Topic], EventLog],
        *,
        clock: Callable[[], float] = time.time,
        keep_rollouts: int = 4,
        wait_s: float = 30.0,
        require_authenticated: bool = False,
    ) -> None:
        self._store = OutcomeStore(path, wait_s=wait_s)
        self._ledger = Ledger(self._store, keep_rollouts=keep_rollouts, require_authenticated=require_authenticated)
        self._open_topic = open_topic
        self._clock = clock
        self._topics: dict[Topic, _FollowedTopic] = {}
        started_us = round(clock() * 1e6)
        self._readings: dict[str, LogReading] = {topic: LogReading(started_us) for topic in TOPICS}
        self._faults = 0  # failed calls of ``advance``
        self._clean_at = 0.0
        self._ending = threading.Event()
        self._thread: SupervisedThread | None = None

    def start(self) -> None:
        """Follows the log on a thread until ``close`` is called."""
        self._thread = SupervisedThread(self._follow, name="outcome collector", daemon=True, stop=self._ending)
        self._thread.start()

    def advance(self) -> int:
        """Reads and counts the next records of the topic that is furthest behind. Returns their number.

        The topics are read side by side, by their times, so that an outcome is seldom counted long before or after its
        slate, also when the log is read from its beginning.

        Raises:
            StorageError: if the log or the file fails; nothing was counted, and the next call starts from the file.
        """
        try:
            topic = min(self._followed(), key=lambda followed: (followed.reading.read_to_us, followed.reads))
            topic.reads += 1
            batch = topic.log.read(topic.position, limit=RECORDS_PER_COMMIT, wait_s=WAIT_S)
            self._count(topic, batch)
        except BaseException:
            self._faults += 1
            self._close_topics()
            raise
        return len(batch.records)

    def clean(self) -> None:
        """Deletes expired rows. Called regularly while the log is followed."""
        if time.monotonic() < self._clean_at:
            return
        read_to_s = min(reading.read_to_us for reading in self._readings.values()) / 1e6
        deleted = self._ledger.clean(read_to_s, CLEANUP_BATCH_ROWS)
        self._clean_at = time.monotonic() + (1.0 if deleted else CLEANUP_INTERVAL_S)

    def metrics_text(self) -> bytes:
        """Returns the committed counts in Prometheus' text format, with the names of ``metric_names``."""
        return prometheus_text(self._ledger.snapshot, self._readings, self._faults, self._clock())

    def statistics(self, rollout_id: str) -> dict[tuple[Arm, Slice], dict[str, ArmStatistics]]:
        """A rollout's committed statistics by metric; for an arm that changed its release, its first release's."""
        statistics: dict[tuple[Arm, Slice], dict[str, ArmStatistics]] = {}
        for arm, sums_SK in self._ledger.snapshot.sums.items():
            if arm.rollout == rollout_id:
                for slice_, metrics in statistics_of(sums_SK).items():
                    statistics.setdefault((arm.arm, slice_), metrics)
        return statistics

    def close(self) -> None:
        """Ends the thread and closes the file and the log. A second call does nothing."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join()
        self._close_topics()
        self._store.close()

    def _follow(self) -> None:
        while not self._ending.is_set():
            try:
                self.advance()
                self.clean()
            except (StorageError, MalformedFileError) as error:
                log.error("exposures and outcomes are not counted, trying again: %s", error)
                self._ending.wait(RETRY_DELAY_S)
            except Exception:  # the position is unchanged, so nothing is lost if it succeeds later
                log.exception("exposures and outcomes are not counted, trying again")
                self._ending.wait(RETRY_DELAY_S)

    def _followed(self) -> list[_FollowedTopic]:
        for topic in TOPICS:
            if topic not in self._topics:
                events = self._open_topic(topic)
                self._topics[topic] = _FollowedTopic(
                    topic, events, self._start_of(topic, events), self._readings[topic]
                )
        return list(self._topics.values())

    def _start_of(self, topic: Topic, events: EventLog) -> Offsets:
        """The committed position; the beginning if the log is shorter, because it was replaced."""
        position, ends = self._ledger.position(topic), events.end_offsets()
        if any(offset > ends.get(partition, 0) for partition, offset in position.items()):
            log.warning("%s: the log ends before the position %s; reading it from its beginning", topic, dict(position))
            return {}
        return position

    def _close_topics(self) -> None:
        for followed in self._topics.values():
            followed.log.close()
        self._topics.clear()

    def _count(self, followed: _FollowedTopic, batch: ReadBatch) -> list[NDArray[np.int64]]:
        exposures: list[ExposureRows] = []
        outcomes: list[OutcomeRows] = []
        unreadable = 0
        erased: list[NDArray[np.int64]] = [NO_VIEWERS]
        for record in batch.records:
            erased.append(erased_viewers(record.payload))
            try:
                if followed.topic is Topic.EXPOSURES:
                    exposures.append(read_exposure_rows(record))
                else:
                    outcomes.append(read_outcome_rows(record))
            except DataError as error:
                unreadable += 1
                log.error("%s: record %d of partition %d: %s", followed.topic, record.offset, record.partition, error)
        statuses: list[NDArray[np.int64]] = []
        if batch.records:
            statuses = self._ledger.apply(
                exposures, outcomes, {followed.topic: batch.next_offsets}, np.concatenate(erased)
            )
        followed.position = batch.next_offsets
        followed.reading.unreadable += unreadable
        followed.reading.read_to_us = batch.watermark_us
        return statuses
