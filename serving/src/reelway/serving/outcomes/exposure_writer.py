"""Appends the slates of a router to the event log, in batches and off the requests' path.

A slate may be in the log twice, because an append without an acknowledgement is repeated; readers recognise it by its
``request_id``. Every slate that was served and is not appended is reported as lost.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from reelway.platform.errors import ServingError, StorageError
from reelway.platform.eventlog.exposure_events import encode_exposures
from reelway.serving.outcomes.append_log import AppendLog, LazyLog
from reelway.serving.outcomes.batch_worker import BatchWorker
from reelway.serving.outcomes.exposures import SlateExposure, exposure_rows

log = logging.getLogger(__name__)

MAX_QUEUED_ROWS: Final = 200_000
"""Queued videos above which slates are lost: 10 s of 1,000 slates of 20 videos per second."""
MAX_ROWS_PER_APPEND: Final = 3_000
"""A row has at most 150 bytes, so an append fits into one record of 1 MiB and no slate is split."""


class ExposureWriter:
    """Appends slates to a log, on a thread of its own, and closes the log at the end.

    Args:
        open_log: opens the log; called by the thread, again after a failure.
        on_lost: called with each slate that was not appended, by any thread.
        append_every_s: shortest time between two appends. After a rest, the first append is immediate.
        retry_for_s: how long an append is repeated before its slates are lost. At shutdown it is repeated once; if it
            fails, all slates that are still queued are lost at once, because each append may take long to fail.
    """

    def __init__(
        self,
        open_log: Callable[[], AppendLog],
        on_lost: Callable[[SlateExposure], None],
        *,
        append_every_s: float = 0.1,
        retry_for_s: float = 60.0,
        retry_delay_s: float = 0.5,
        max_queued_rows: int = MAX_QUEUED_ROWS,
    ) -> None:
        self._log = LazyLog(open_log)
        self._on_lost = on_lost
        self._retry_for_s = retry_for_s
        self._retry_delay_s = retry_delay_s
        self._closing = threading.Event()
        self._gave_up = False  # an append failed at shutdown; belongs to the writer's thread
        self._worker = BatchWorker[SlateExposure, None](
            "exposure writer",
            self._append,
            max_queued_rows=max_queued_rows,
            max_batch_rows=MAX_ROWS_PER_APPEND,
            interval_s=append_every_s,
            on_close=self._log.close,
        )

    def record(self, slate: SlateExposure) -> None:
        """Queues a slate and returns at once. Empty slates have no rows and are ignored."""
        if not len(slate):
            return
        try:
            self._worker.submit(slate, len(slate))
        except ServingError:  # the queue is full, or the router ends
            self._on_lost(slate)

    def close(self) -> None:
        """Appends the queued slates; those that cannot be appended now are lost. A second call does nothing."""
        self._closing.set()
        self._worker.close()

    def _append(self, slates: Sequence[SlateExposure]) -> list[None]:
        try:
            if self._gave_up:
                raise StorageError("the event log accepted nothing at shutdown; check it")
            self._append_with_retries(slates)
        except Exception:  # of whatever kind: the slates are not in the log
            log.exception("%d slates were served and are not in the event log", len(slates))
            for slate in slates:
                self._on_lost(slate)
        return [None] * len(slates)

    def _append_with_retries(self, slates: Sequence[SlateExposure]) -> None:
        rows = exposure_rows(slates)
        records = None
        deadline = time.monotonic() + self._retry_for_s
        while True:
            last_attempt = self._closing.is_set() or time.monotonic() >= deadline
            try:
                events = self._log.get()
                if records is None:  # encoded once: a repeated append has the ids of the first
                    records = list(encode_exposures(rows, events.partitions, events.max_record_bytes))
                events.append(records)
            except StorageError as error:
                if last_attempt:
                    self._gave_up = self._closing.is_set()
                    raise
                log.warning("exposures not appended, trying again: %s", error)
                self._closing.wait(self._retry_delay_s)
            else:
                return
