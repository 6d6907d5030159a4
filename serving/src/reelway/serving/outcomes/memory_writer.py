"""Writes what reported outcomes change in the viewers' memories: finished videos, blocks and followed creators.

A thread writes the updates in their order. A write that fails because of the store is repeated until it succeeds, since
no other part writes it: the stream rebuilds the memories from the event log only after the store lost its data. Updates
that arrive while too many wait, and those that still wait when the router ends, are lost and counted.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from reelway.platform.contracts.events import OutcomeType
from reelway.platform.errors import StorageError
from reelway.platform.features.viewer_memory import ViewerMemory
from reelway.platform.supervised_thread import SupervisedThread
from reelway.serving.metrics import IntakeMetrics
from reelway.serving.outcomes.reported import OutcomeColumns

log = logging.getLogger(__name__)

MAX_WAITING: Final = 200_000
"""Entries that may wait to be written: about 30 MB."""
_FIRST_RETRY_S: Final = 0.1
_LAST_RETRY_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class MemoryUpdate:
    """What the outcomes of one request change. Applying it twice has the effect of once."""

    watched_viewers: NDArray[np.int64]
    watched_videos: NDArray[np.int64]
    now_s: float
    blocked_creators: Mapping[int, list[int]]  # by viewer, as the two below
    blocked_topics: Mapping[int, list[int]]
    followed_creators: Mapping[int, list[int]]

    def __len__(self) -> int:
        of_viewers = (self.blocked_creators, self.blocked_topics, self.followed_creators)
        return len(self.watched_viewers) + sum(len(values) for viewers in of_viewers for values in viewers.values())

    def apply(self, memory: ViewerMemory) -> None:
        """Writes the update.

        Raises:
            StorageError: if the store cannot be written; any part may be in it.
        """
        if len(self.watched_viewers):
            watched_at_s = np.full(len(self.watched_viewers), self.now_s)
            memory.remember_watched(self.watched_viewers, self.watched_videos, watched_at_s)
        for viewer in sorted(self.blocked_creators.keys() | self.blocked_topics.keys()):
            creators, topics = self.blocked_creators.get(viewer, []), self.blocked_topics.get(viewer, [])
            memory.block(viewer, creators=creators, topics=topics)
        for viewer, followed in self.followed_creators.items():
            memory.follow(viewer, followed)


def memory_update(columns: OutcomeColumns, now_s: float) -> MemoryUpdate:
    """Returns the videos watched to the end, the blocked creators and topics, and the followed creators."""
    watched = columns.watched_to_the_end
    return MemoryUpdate(
        columns.viewer_id[watched],
        columns.video_id[watched],
        now_s,
        blocked_creators=_by_viewer(columns, OutcomeType.BLOCK_CREATOR, columns.creator_id),
        blocked_topics=_by_viewer(columns, OutcomeType.BLOCK_TOPIC, columns.topic),
        followed_creators=_by_viewer(columns, OutcomeType.FOLLOW, columns.creator_id),
    )


def _by_viewer(columns: OutcomeColumns, kind: OutcomeType, of_video: NDArray[Any]) -> dict[int, list[int]]:
    """Returns the known values of the videos with an outcome of the type, by viewer."""
    rows = columns.rows_of_type(kind)
    rows = rows[of_video[rows] >= 0]
    values: dict[int, list[int]] = {}
    for viewer, value in zip(columns.viewer_id[rows].tolist(), of_video[rows].tolist(), strict=True):
        values.setdefault(viewer, []).append(value)
    return values


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    update: MemoryUpdate
    written: Future[bool] = field(default_factory=Future)

    def answer(self, written: bool) -> None:
        if not self.written.done():
            self.written.set_result(written)


class OutcomeMemoryWriter:
    """Writes updates to the viewers' memories on a thread of its own. Any thread may call it.

    Args:
        memory: the store; its calls block.
        max_waiting: see ``MAX_WAITING``.
    """

    def __init__(self, memory: ViewerMemory, metrics: IntakeMetrics, *, max_waiting: int = MAX_WAITING) -> None:
        self._memory = memory
        self._metrics = metrics
        self._max_waiting = max_waiting
        self._queue: deque[_Waiting] = deque()  # the first is being written
        self._entries = 0
        self._changed = threading.Condition()  # guards the queue, entries and is_closed
        self._is_closed = False
        self._thread = SupervisedThread(self._run, name="outcome-memory", daemon=True)
        self._thread.start()

    def write(self, update: MemoryUpdate) -> Future[bool]:
        """Queues an update. Its future is True when it is written, False after its first failed attempt or its loss."""
        waiting = _Waiting(update)
        waiting.written.set_running_or_notify_cancel()  # a caller that no longer waits does not cancel the write
        with self._changed:
            if self._is_closed or (self._queue and self._entries + len(update) > self._max_waiting):
                self._lose([waiting])
            else:
                self._queue.append(waiting)
                self._entries += len(update)
                self._changed.notify_all()
        return waiting.written

    def close(self, timeout_s: float = 5.0) -> None:
        """Writes what waits. After the first failure, or the timeout, the rest is lost. A second call does nothing."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        self._lose_all()

    def _run(self) -> None:
        retry_s = _FIRST_RETRY_S
        while (waiting := self._first()) is not None:
            try:
                waiting.update.apply(self._memory)
            except StorageError as error:
                waiting.answer(False)
                log.warning("outcomes not remembered, repeated in %.1f s: %s", retry_s, error)
                with self._changed:
                    if self._is_closed:
                        break
                    self._changed.wait_for(lambda: self._is_closed, retry_s)
                retry_s = min(2 * retry_s, _LAST_RETRY_S)
            except Exception:  # not a failure of the store: a repetition would fail as well and hold up the others
                log.exception("outcomes of %d entries are not remembered", len(waiting.update))
                with self._changed:
                    self._lose([waiting] if self._remove(waiting) else [])
            else:
                retry_s = _FIRST_RETRY_S
                waiting.answer(True)
                with self._changed:
                    self._remove(waiting)
        self._lose_all()

    def _first(self) -> _Waiting | None:
        """Waits for an update. None: the writer is closed and nothing waits."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._is_closed)
            return self._queue[0] if self._queue else None

    def _remove(self, waiting: _Waiting) -> bool:
        """Removes the first update, unless ``close`` has given it up."""
        if not self._queue or self._queue[0] is not waiting:
            return False
        self._queue.popleft()
        self._entries -= len(waiting.update)
        return True

    def _lose_all(self) -> None:
        with self._changed:
            self._lose(self._queue)
            self._queue.clear()
            self._entries = 0

    def _lose(self, lost: deque[_Waiting] | list[_Waiting]) -> None:
        if lost:
            self._metrics.memory_lost.inc(len(lost))
        for waiting in lost:
            waiting.answer(False)
