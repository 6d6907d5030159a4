"""Remembers what viewers were shown: at once in this router, and soon in the store that all routers share.

The router keeps its own recent slates, so its next page is correct even if the store is slow or cannot be read. A
thread writes the slates to the store. A write that fails is counted and repeated until it succeeds; when too many
slates wait, the oldest are dropped and counted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np

from reelway.platform.contracts.blend import MAX_SHOWN_VIDEOS
from reelway.platform.errors import ReelwayError
from reelway.platform.features.viewer_memory import I64, ShownSlate, ViewerMemory, ViewerMemoryState
from reelway.platform.supervised_thread import SupervisedThread
from reelway.serving.metrics import ShownMemoryMetrics

log = logging.getLogger(__name__)

RECENT_S: Final = 600.0
"""How long a router knows its own slates itself, in seconds."""
MAX_SLATES: Final = 20_000
"""Most recent slates that a router keeps, and most slates that wait to be written: about 5 MB each."""
WRITE_DELAY_S: Final = 0.02
"""How long a slate waits for others before it is written. A write at once would delay the response of its request."""
_BATCH: Final = 500
_FIRST_RETRY_S: Final = 0.1
_LAST_RETRY_S: Final = 5.0


class _RecentSlate(NamedTuple):
    slate: ShownSlate
    added_s: float


class _ViewerSlates:
    """The recent slates of one viewer, oldest first: those with the newest ``MAX_SHOWN_VIDEOS`` videos."""

    def __init__(self) -> None:
        self.slates: deque[ShownSlate] = deque()
        self._videos = 0

    def add(self, slate: ShownSlate) -> None:
        self.slates.append(slate)
        self._videos += len(slate.video_ids)
        while self._videos - len(self.slates[0].video_ids) >= MAX_SHOWN_VIDEOS:
            self._remove_oldest()

    def forget(self, slate: ShownSlate) -> None:
        """Removes the viewer's oldest slate, unless newer slates have replaced it already."""
        if self.slates and self.slates[0] is slate:
            self._remove_oldest()

    def _remove_oldest(self) -> None:
        self._videos -= len(self.slates.popleft().video_ids)


class ShownMemory:
    """The shown videos of a router's viewers. ``remember`` and ``with_recent`` belong to the event loop's thread.

    Args:
        memory: the shared store; its calls block.
        max_slates: see ``MAX_SLATES``.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        memory: ViewerMemory,
        metrics: ShownMemoryMetrics,
        *,
        max_slates: int = MAX_SLATES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._memory = memory
        self._metrics = metrics
        self._max_slates = max_slates
        self._clock = clock
        self._recent: deque[_RecentSlate] = deque()
        self._of_viewer: dict[int, _ViewerSlates] = {}
        self._unwritten: deque[ShownSlate] = deque()
        self._changed = threading.Condition()
        self._flushing = threading.Event()
        self._is_closed = False
        self._is_writing = False
        self._writer = SupervisedThread(self._write, name="shown-memory", daemon=True)
        self._writer.start()

    def remember(self, viewer_id: int, video_ids: Sequence[int] | I64, shown_at_s: float) -> None:
        """Adds a slate and starts its write. Waits for nothing."""
        if not len(video_ids):
            return
        slate = ShownSlate(viewer_id, np.asarray(video_ids, dtype=np.int64), shown_at_s)
        self._recent.append(_RecentSlate(slate, self._clock()))
        self._of_viewer.setdefault(viewer_id, _ViewerSlates()).add(slate)
        self._forget_old()
        with self._changed:
            if len(self._unwritten) >= self._max_slates:
                self._unwritten.popleft()
                self._metrics.lost.inc()
            self._unwritten.append(slate)
            self._changed.notify()

    def with_recent(self, viewer_id: int, state: ViewerMemoryState) -> ViewerMemoryState:
        """Returns the state with the viewer's recent slates of this router. Most of them are in the store already."""
        of_viewer = self._of_viewer.get(viewer_id)
        if of_viewer is None:
            return state
        slates = of_viewer.slates
        ids = np.concatenate([slate.video_ids for slate in slates])
        times_s = np.repeat([slate.shown_at_s for slate in slates], [len(slate.video_ids) for slate in slates])
        return state.with_shown(ids, times_s)

    def flush(self, timeout_s: float) -> bool:
        """Waits until every slate is written; returns False after the timeout."""
        self._flushing.set()
        with self._changed:
            is_written = self._changed.wait_for(lambda: not self._unwritten and not self._is_writing, timeout_s)
        self._flushing.clear()
        return is_written

    def close(self, timeout_s: float = 5.0) -> None:
        """Ends the thread after what waits is written, or after the timeout; then the rest is lost and counted."""
        self.flush(timeout_s)
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._writer.join(timeout_s)
        with self._changed:
            self._metrics.lost.inc(len(self._unwritten))
            self._unwritten.clear()

    def _forget_old(self) -> None:
        oldest_s = self._clock() - RECENT_S
        while self._recent and (len(self._recent) > self._max_slates or self._recent[0].added_s < oldest_s):
            slate = self._recent.popleft().slate
            of_viewer = self._of_viewer[slate.viewer_id]
            of_viewer.forget(slate)
            if not of_viewer.slates:
                del self._of_viewer[slate.viewer_id]

    def _write(self) -> None:
        retry_s = _FIRST_RETRY_S
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._unwritten or self._is_closed)
                if self._is_closed:
                    return
            self._flushing.wait(WRITE_DELAY_S)
            with self._changed:
                batch = [self._unwritten.popleft() for _ in range(min(len(self._unwritten), _BATCH))]
                self._is_writing = True
            try:
                self._memory.remember_slates(batch)
            except Exception as error:  # of whatever kind: the thread must go on
                self._metrics.faults.labels("write").inc()
                log.warning(
                    "shown videos not written, repeated in %.1f s: slates=%d: %s", retry_s, len(batch), error,
                    exc_info=not isinstance(error, ReelwayError),
                )  # fmt: skip
                self._keep(batch, retry_s)
                retry_s = min(2 * retry_s, _LAST_RETRY_S)
            else:
                retry_s = _FIRST_RETRY_S
                with self._changed:
                    self._is_writing = False
                    self._changed.notify_all()

    def _keep(self, batch: list[ShownSlate], wait_s: float) -> None:
        """Puts a batch that was not written back to the front, and waits before the next attempt."""
        with self._changed:
            surplus = max(len(batch) + len(self._unwritten) - self._max_slates, 0)
            if surplus:
                self._metrics.lost.inc(surplus)
            self._unwritten.extendleft(reversed(batch[surplus:]))
            self._is_writing = False
            self._changed.wait_for(lambda: self._is_closed, wait_s)
