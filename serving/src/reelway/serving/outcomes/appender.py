"""Outcomes on their way to the event log: what the stream processor makes features of.

A thread of its own, so that the log's disk (or brokers) and the collector's work at the same time, and many requests
share one append. It refuses what it cannot take at once; what it took is in the log, or its caller hears of it. An
outcome may be there twice (a client that got no answer sends again); readers know by its id.
"""

# Shapes: N outcomes of one append

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.platform.contracts.events import TIME
from reelway.platform.errors import ServingError
from reelway.platform.eventlog import EventLog
from reelway.platform.eventlog.outcome_events import LOGGED_OUTCOMES, outcome_ids, records_of
from reelway.serving.outcomes.reported import KINDS, OutcomeColumns

log = logging.getLogger(__name__)

MAX_WAITING: Final = 500_000
"""Outcomes in the queue beyond which nothing more is taken."""
MOST_PER_APPEND: Final = 20_000
_KIND_WORDS: Final = tuple(str(kind) for kind in KINDS)


@dataclass(slots=True)
class _Job:
    outcomes: OutcomeColumns
    done: Future[None] = field(default_factory=Future)


class OutcomeAppender:
    """Appends outcomes to a log, which it closes at its own end.

    Args:
        clock: Unix seconds; what is appended now counts from now.
        append_every_s: shortest time between two appends; the first after a rest is at once.
    """

    def __init__(
        self, events: EventLog, *, clock: Callable[[], float] = time.time, append_every_s: float = 0.05
    ) -> None:
        self._events = events
        self._clock = clock
        self._every_s = append_every_s
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._gate = threading.Lock()  # of the two below
        self._waiting = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="outcome-log", daemon=True)
        self._thread.start()

    def append(self, outcomes: OutcomeColumns) -> Future[None]:
        """The future ends when the outcomes are in the log, or with a ``StorageError``: then send them again.

        Raises:
            ServingError: too much waits, or the appender is closed. Nothing of it was taken.
        """
        job = _Job(outcomes)
        with self._gate:
            if self._closed:
                raise ServingError("the event log is closed; send it again in a moment")
            if self._waiting and self._waiting + len(outcomes) > MAX_WAITING:
                raise ServingError(f"{self._waiting} outcomes wait for the event log, at most {MAX_WAITING} may")
            self._waiting += len(outcomes)
            job.done.set_running_or_notify_cancel()
            self._jobs.put(job)
        return job.done

    def close(self) -> None:
        """Take nothing more, finish what was taken. A second call does nothing."""
        with self._gate:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        not_before, going = 0.0, True
        try:
            while going:
                jobs, going = self._gather(not_before)
                if jobs:
                    self._append(jobs)
                    not_before = time.monotonic() + self._every_s
        finally:
            self._events.close()

    def _gather(self, not_before: float) -> tuple[list[_Job], bool]:
        job = self._jobs.get()
        jobs, rows = [], 0
        while job is not None:
            jobs.append(job)
            rows += len(job.outcomes)
            if rows >= MOST_PER_APPEND:
                return jobs, True
            try:
                job = self._jobs.get(timeout=max(not_before - time.monotonic(), 0.0))
            except queue.Empty:
                return jobs, True
        return jobs, False

    def _append(self, jobs: Sequence[_Job]) -> None:
        try:
            self._append_all([job.outcomes for job in jobs if len(job.outcomes)])
        except Exception as error:  # every caller must hear of it, and the next append may go well again
            log.exception("%d requests' outcomes are not in the event log", len(jobs))
            for job in jobs:
                job.done.set_exception(error)
            return
        finally:
            with self._gate:
                self._waiting -= sum(len(job.outcomes) for job in jobs)
        for job in jobs:
            job.done.set_result(None)

    def _append_all(self, parts: Sequence[OutcomeColumns]) -> None:
        if not parts:
            return
        now_us = int(self._clock() * 1e6)
        outcomes = logged_outcomes(parts, now_us)
        self._events.append(list(records_of(outcomes, self._events.partitions, now_us)))


def logged_outcomes(parts: Sequence[OutcomeColumns], now_us: int) -> pa.RecordBatch:
    """The outcomes in the schema ``LOGGED_OUTCOMES``, known from ``now_us`` on. ``parts`` is not empty."""

    def joined(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(part, name) for part in parts])

    done_at = joined("done_at")
    given = np.isfinite(done_at)
    impression, kind = joined("impression_id"), joined("kind")
    columns = {
        "outcome_id": outcome_ids(impression, kind),
        "impression_id": impression,
        "request_id": joined("request_id"),
        "viewer_id": joined("viewer_id"),
        "video_id": joined("video_id"),
        "position": joined("position").astype(np.int16),
        "shown_at": _times(joined("issued_at") * 1e6),
        "release": _words([(part.arm, [arm.release for arm in part.arms]) for part in parts]),
        "arm": _words([(part.arm, [arm.arm.value for arm in part.arms]) for part in parts]),
        "source": _words([(part.source, part.sources) for part in parts]),
        "propensity": joined("propensity").astype(np.float32),
        "type": _words([(kind, _KIND_WORDS)]),
        "value": joined("value").astype(np.float32),
        "event_time": _times(np.full(len(impression), now_us)),
        "done_at": _times(np.where(given, done_at, 0.0) * 1e6, ~given),
    }
    arrays = [pa.array(column) if isinstance(column, np.ndarray) else column for column in columns.values()]
    return pa.RecordBatch.from_arrays(arrays, schema=LOGGED_OUTCOMES)


def _times(micros: NDArray[Any], missing: NDArray[np.bool_] | None = None) -> pa.Array:
    return pa.array(micros.astype(np.int64), pa.int64(), mask=missing).cast(TIME)


def _words(parts: Sequence[tuple[NDArray[np.int64], Sequence[str]]]) -> pa.Array:
    """Codes with a table of words each, as one dictionary array."""
    table: dict[str, int] = {}
    codes = []
    for code_N, words in parts:
        into = np.array([table.setdefault(word, len(table)) for word in words], np.int32)
        codes.append(into[code_N])
    return pa.DictionaryArray.from_arrays(pa.array(np.concatenate(codes)), pa.array(list(table), pa.string()))
