"""Follows the topic ``takedowns`` and hides videos and creators in every video table of this process.

A table is registered before its release gets traffic. ``hide_in`` returns when the takedowns are read to the end that
the log had at the call, so a release never opens with takedowns unread: not after a replica's start, and not when it is
rolled out later. If the log cannot be read, the last state stays in force, the age metric grows and the failure is
counted.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import closing, suppress
from typing import Final

from prometheus_client import CollectorRegistry

from reelway.platform.errors import ReelwayError, StorageError
from reelway.platform.eventlog.catalogue_events import ChangedStatus, TakedownState, decode_status_changes
from reelway.platform.eventlog.catalogue_log import is_at
from reelway.platform.eventlog.event_log import EventLog, Offsets
from reelway.platform.eventlog.topics import Topic, open_topic
from reelway.platform.supervised_thread import SupervisedThread
from reelway.serving.metrics import TakedownMetrics
from reelway.serving.video_table import VideoTable

log = logging.getLogger(__name__)

POLL_INTERVAL_S: Final = 0.2
"""Longest wait of one read for new takedowns, and the delay after a failed read."""
READ_LIMIT: Final = 250
"""Records of one read. Decoding holds the interpreter's lock, for about 1 ms per read."""
STOP_TIMEOUT_S: Final = 5.0
"""Longest wait for the follower's thread to end."""
READY_TIMEOUT_S: Final = 60.0
"""How long a release waits until the takedowns are read to the log's end before opening it fails."""


class TakedownFollower:
    """The takedowns of one event log.

    Args:
        open_log: opens the topic ``takedowns``; called again after a failure.
        clock: Unix seconds.
    """

    def __init__(
        self, open_log: Callable[[], EventLog], metrics: TakedownMetrics, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._open_log = open_log
        self._metrics = metrics
        self._log: EventLog | None = None
        self._state = TakedownState()
        self._position: Offsets = {}
        self._tables: weakref.WeakSet[VideoTable] = weakref.WeakSet()
        self._behind = False  # whether any table may lack changes of ``_state``
        self._changed = threading.Condition()  # guards state, position, tables and behind
        self._clock = clock
        self._read_to_s = clock()  # no unread record is older, except than the follower itself
        self._stopped = threading.Event()
        self._thread: SupervisedThread | None = None

    def poll(self, wait_s: float = 0.0) -> int:
        """Reads new records and applies them to all tables. Returns the number of records.

        A table that fails does not delay the others. The next call reads the same records again, and applies all
        takedowns to all tables.

        Raises:
            StorageError: if the log cannot be read.
        """
        if self._log is None:
            self._log = self._open_log()
        read = self._log.read(self._position, limit=READ_LIMIT, wait_s=wait_s)
        changes, unreadable = decode_status_changes(read.records)
        if unreadable:
            log.error("takedowns: %d records are unreadable and have no effect", unreadable)
            self._metrics.unreadable.inc(unreadable)
        with self._changed:
            changed = self._state.apply(change for change in changes if change is not None)
            if changed or self._behind:
                self._apply(None if self._behind else changed)
            self._position = read.next_offsets
            self._changed.notify_all()
        self._read_to_s = max(self._read_to_s, read.watermark_us / 1e6)
        self._export_age()
        return len(read.records)

    def _apply(self, changed: ChangedStatus | None) -> None:
        """Applies the state to all tables, and then raises the first failure. ``changed`` as in ``take_down``."""
        self._behind = True
        failures: list[Exception] = []
        for table in list(self._tables):
            try:
                table.take_down(self._state.taken_down(), changed)
            except Exception as error:  # the other tables must not show what was taken down
                failures.append(error)
        if failures:
            try:
                raise failures[0]
            finally:
                failures.clear()  # a cycle of this frame and the traceback would keep closed tables in memory
        self._behind = False

    def follow(self) -> None:
        """Polls until ``stop``, and then closes the log."""
        failed = False
        while not self._stopped.is_set():
            try:
                self.poll(POLL_INTERVAL_S)
                failed = False
            except Exception as error:  # the thread must go on: without it, takedowns would have no effect
                if not failed:
                    log.error("takedowns are not read: %s", error, exc_info=not isinstance(error, ReelwayError))
                failed = True
                self._close_log()
                self._metrics.faults.inc()
                self._stopped.wait(POLL_INTERVAL_S)
            self._export_age()
        self._close_log()

    def _export_age(self) -> None:
        self._metrics.age.set(max(self._clock() - self._read_to_s, 0.0))

    def _close_log(self) -> None:
        if self._log is not None:
            with suppress(ReelwayError):
                self._log.close()
        self._log = None

    def start(self) -> TakedownFollower:
        """Starts a thread that follows the log until the process ends or ``stop`` is called."""
        self._thread = SupervisedThread(self.follow, name="takedowns", daemon=True, stop=self._stopped)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ends the thread, which closes the log. A read that takes longer than ``STOP_TIMEOUT_S`` ends later."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(STOP_TIMEOUT_S)

    def hide_in(self, table: VideoTable, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Hides what is taken down in a table, from now on and until the table is released.

        Blocks until the thread has read the takedowns to the log's present end.

        Raises:
            StorageError: if the log cannot be read within the time.
        """
        deadline = time.monotonic() + timeout_s
        end = self._end_offsets(deadline)
        with self._changed:
            self._tables.add(table)
            table.take_down(self._state.taken_down())
            if not self._changed.wait_for(lambda: is_at(self._position, end), max(deadline - time.monotonic(), 0.0)):
                raise StorageError(
                    f"takedowns: not read to the end of the log within {timeout_s:g} s; a release is opened only with "
                    "all takedowns, check the event log"
                )

    def _end_offsets(self, deadline: float) -> Offsets:
        while True:
            try:
                with closing(self._open_log()) as events:
                    return events.end_offsets()
            except StorageError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(POLL_INTERVAL_S)


def follow_takedowns(events: str, registry: CollectorRegistry) -> TakedownFollower:
    """Starts to follow the takedowns of an event log."""
    return TakedownFollower(lambda: open_topic(events, Topic.TAKEDOWNS), TakedownMetrics(registry)).start()
