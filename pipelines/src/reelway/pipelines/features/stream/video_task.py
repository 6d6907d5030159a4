"""The video half of the stream, for one view and one partition of its entities: cells in, rows out.

Cells come from every partition of viewers, each with its own progress. A row of a grid point is computed when all
sources have passed the point. Cells of later points wait until then.
"""

# Shapes: N rows of cells, K columns, S sources

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from reelway.pipelines.features.stream.entity_views import EmittedRows, EntityView
from reelway.pipelines.features.stream.keyed_store import KeyedStore, TimedBytes, get_integers, put_integers
from reelway.pipelines.features.stream.rules import StreamRules
from reelway.pipelines.features.stream.time_buckets import LAYOUTS
from reelway.pipelines.features.stream.viewer_task import Cells
from reelway.pipelines.features.windows import I64

_NOTHING: Final = np.zeros(0, dtype=np.int64)


class VideoTask:
    """The video half of one view over a store.

    Args:
        sources: number of partitions of viewers.
    """

    def __init__(self, store: KeyedStore, view: str, rules: StreamRules, sources: int) -> None:
        self.entities = EntityView(store, view, rules)
        self.view = view
        self._store, self._sources = store, sources
        self._progress = f"{view}.progress"
        self._later = TimedBytes(store, f"{view}.later")
        self._grid_us = rules.schedules[view].grid_us
        self._width = len(LAYOUTS[view].columns)

    @property
    def has_begun(self) -> bool:
        return get_integers(self._store, self._progress) is not None

    @property
    def watermark_us(self) -> int:
        """The least progress of all sources, in the stream's time."""
        return int(self._load_progress()[1:].min())

    def begin(self, settled_us: int) -> None:
        """Starts an empty task at a time up to which all rows exist."""
        next_us = (settled_us // self._grid_us + 1) * self._grid_us
        put_integers(self._store, self._progress, [next_us, *[settled_us] * self._sources])

    def add(self, source: int, settled_us: int, cells: Sequence[Cells]) -> list[EmittedRows]:
        """Takes a source's cells up to a time. Returns the rows of all points that the sources have passed with it."""
        progress = self._load_progress().copy()
        next_us = int(progress[0])
        for some in cells:
            if some.point_us <= next_us:
                self.entities.add(some.entity, some.rows, next_us)
            else:
                packed = np.column_stack([some.entity, some.rows])
                self._later.append(np.array([some.point_us], dtype=np.int64), [packed.tobytes()])
        progress[1 + source] = max(int(progress[1 + source]), settled_us)
        emitted: list[EmittedRows] = []
        while next_us <= progress[1:].min():
            emitted += self.entities.emit(next_us, _NOTHING)
            next_us += self._grid_us
            stored = self._later.pop(np.array([next_us], dtype=np.int64))
            packed = np.frombuffer(stored, dtype=np.int64).reshape(-1, 1 + self._width)
            self.entities.add(packed[:, 0], packed[:, 1:], next_us)
        progress[0] = next_us
        put_integers(self._store, self._progress, progress)
        return emitted

    def _load_progress(self) -> I64:
        progress = get_integers(self._store, self._progress)
        assert progress is not None, "the task has not begun"
        return progress
