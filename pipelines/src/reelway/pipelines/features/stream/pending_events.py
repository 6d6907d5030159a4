"""Events of a partition that wait until the stream advances to their times.

They are stored by the grid point from which they count. So an addition writes only the added events, and an advance
reads and deletes only the events that it applies.
"""

# Shapes: N events

from __future__ import annotations

from typing import Final

import numpy as np

from reelway.pipelines.features.stream.keyed_store import KeyedStore, TimedBytes, get_integers, put_integers
from reelway.pipelines.features.stream.viewer_events import ViewerEvents
from reelway.pipelines.features.views import AFTER_US
from reelway.pipelines.features.windows import I64
from reelway.platform.eventlog.erasures import rows_kept

POINTS_AT_ONCE: Final = 100_000
"""Number of grid points, most of them without events, that are looked up together."""
_TABLE: Final = "pending"
_SPAN: Final = "pending.span"


class PendingEvents:
    """The pending events in a store.

    Args:
        grid_us: all times to which the stream advances are on this grid.
    """

    def __init__(self, store: KeyedStore, grid_us: int) -> None:
        self._store, self._grid_us = store, grid_us
        self._points = TimedBytes(store, _TABLE)

    def add(self, events: ViewerEvents) -> None:
        """Stores events, at least one."""
        point_N = -(-(events.time_us + AFTER_US) // self._grid_us) * self._grid_us
        order = np.argsort(point_N, kind="stable")
        points, first = np.unique(point_N[order], return_index=True)
        packed = events.take(order).packed()
        size = len(packed) // len(events)
        ends = [*first[1:].tolist(), len(events)]
        parts = [packed[start * size : end * size] for start, end in zip(first.tolist(), ends, strict=True)]
        self._points.append(points, parts)
        span = self._span()
        if not len(span):
            put_integers(self._store, _SPAN, [points[0], points[-1]])
        elif points[0] < span[0] or points[-1] > span[1]:
            put_integers(self._store, _SPAN, [min(points[0], span[0]), max(points[-1], span[1])])

    def take(self, until_us: int) -> ViewerEvents:
        """Removes and returns the events that count by ``until_us``, a time on the grid: by point, as added."""
        span = self._span()
        if not len(span) or until_us < span[0]:
            return ViewerEvents.none()
        last_us = min(until_us, int(span[1]))
        put_integers(self._store, _SPAN, [] if last_us == span[1] else [last_us + self._grid_us, span[1]])
        step_us = POINTS_AT_ONCE * self._grid_us
        parts = []
        for first_us in range(int(span[0]), last_us + 1, step_us):
            points = np.arange(first_us, min(first_us + step_us, last_us + 1), self._grid_us, dtype=np.int64)
            parts.append(self._points.pop(points))
        return ViewerEvents.unpacked(b"".join(parts))

    def erase(self, viewer_ids: I64) -> int:
        """Makes the events of some viewers anonymous. Returns their number."""
        span = self._span()
        if not len(span):
            return 0
        waiting = self.take(int(span[1]))
        if len(waiting):
            self.add(waiting.anonymised(viewer_ids))
        return int((~rows_kept(waiting.viewer_id, viewer_ids)).sum())

    def _span(self) -> I64:
        """The first and last point that may have events, or nothing."""
        span = get_integers(self._store, _SPAN)
        return np.zeros(0, dtype=np.int64) if span is None else span
