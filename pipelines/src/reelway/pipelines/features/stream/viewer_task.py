"""The viewer half of the stream, for one partition of viewers: exposures and outcomes in, rows and cells out.

A step ends at a grid point and never crosses a point of a coarser grid. So each row is computed from exactly the events
known at its time. A task reads neither a log nor a clock.
"""

# Shapes: N rows of cells, K columns

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from reelway.pipelines.features.stream.entity_views import EmittedRows, EntityView
from reelway.pipelines.features.stream.keyed_store import KeyedStore, get_integers, put_integers
from reelway.pipelines.features.stream.open_impressions import (
    APPLIED,
    HORIZON_US,
    REPEATED,
    TOO_LATE,
    OpenImpressionTable,
    label_open_impressions,
    merge_events,
    within_horizon,
)
from reelway.pipelines.features.stream.pending_events import PendingEvents
from reelway.pipelines.features.stream.rules import VIDEO_VIEWS, VIEWER_VIEWS, StreamRules
from reelway.pipelines.features.stream.time_buckets import HISTORY, LAYOUTS, sum_rows, to_bucket_rows
from reelway.pipelines.features.stream.viewer_events import EXPOSURE, ViewerEvents
from reelway.pipelines.features.views import AFTER_US, HOUR_US, Events
from reelway.pipelines.features.windows import I64

_SETTLED: Final = "settled"
_ONE: Final = np.zeros(1, dtype=np.int64)


@dataclass(frozen=True)
class Cells:
    """Changes of a video view's buckets, that count from grid point ``point_us``. One row per entity and bucket."""

    view: str
    point_us: int
    entity: I64  # [N]
    rows: I64  # [N, K]


@dataclass
class ViewerResult:
    """What advancing a viewer task from one time to another returned.

    Args:
        results: (exposures or outcomes, result) -> number.
    """

    began_us: int
    settled_us: int
    rows: list[EmittedRows] = field(default_factory=list)
    cells: list[Cells] = field(default_factory=list)
    results: Counter[tuple[str, str]] = field(default_factory=Counter)
    steps: int = 0


class ViewerTask:
    """The viewer half over a store. ``begin`` fills an empty store's time; see ``bootstrap`` for its rows."""

    def __init__(self, store: KeyedStore, rules: StreamRules) -> None:
        self.rules = rules
        self._store = store
        self._open = OpenImpressionTable(store)
        self._pending = PendingEvents(store, rules.fine_us)
        self.views = {view: EntityView(store, view, rules) for view in VIEWER_VIEWS}

    @property
    def settled_us(self) -> int | None:
        """Time in the stream up to which all rows are computed; None before ``begin``."""
        stored = get_integers(self._store, _SETTLED)
        return None if stored is None else int(stored[0])

    def begin(self, settled_us: int) -> None:
        put_integers(self._store, _SETTLED, [settled_us])

    def add(self, events: ViewerEvents) -> None:
        """Stores events until the task advances to their times. An event earlier than ``settled_us`` counts from it."""
        if not len(events):
            return
        time_us = np.maximum(events.time_us - self.rules.behind_us, self.settled_us or 0)
        self._pending.add(ViewerEvents(**{**vars(events), "time_us": time_us}))

    def erase(self, viewer_ids: I64) -> int:
        """Deletes everything about some viewers. Returns the number of events, impressions and rows found.

        Waiting events and open impressions become anonymous, so that the counts of videos stay what they are.
        """
        ids, settled_us = np.unique(viewer_ids), self.settled_us
        if settled_us is None:
            return 0
        log_us = settled_us + self.rules.behind_us
        first_us, last_us = log_us - HORIZON_US - 2 * HOUR_US, log_us + 2 * HOUR_US
        hours_us = range(first_us // HOUR_US * HOUR_US, last_us // HOUR_US * HOUR_US + 1, HOUR_US)
        erased = self._pending.erase(ids) + self._open.erase(ids, hours_us)
        return erased + sum(view.erase(ids) for view in self.views.values())

    def advance(self, complete_us: int) -> ViewerResult:
        """Applies all events up to a time and computes the rows due by then.

        Args:
            complete_us: no event before this time is missing, in the stream's time.
        """
        began_us = self.settled_us
        assert began_us is not None, "the task has not begun"
        result = ViewerResult(began_us, began_us)
        last_us = complete_us // self.rules.fine_us * self.rules.fine_us
        if last_us <= began_us:
            return result
        pending = self._pending.take(last_us)
        parts: list[Cells] = []
        for until_us in self._steps(began_us, last_us, pending.time_us):
            now = pending.time_us + AFTER_US <= until_us
            parts += self._step(until_us, pending.take(now), result)
            if now.any():
                pending = pending.take(~now)
            result.settled_us = until_us
            result.steps += 1
        result.cells = sum_cells(parts)
        for hour_us in _hours(began_us, result.settled_us, self.rules.behind_us - HORIZON_US):
            self._open.close(hour_us)
        self.begin(result.settled_us)
        return result

    def _steps(self, after_us: int, last_us: int, times_us: I64) -> Iterator[int]:
        """Returns the times in ``(after_us, last_us]`` at which a row may be due, and ``last_us``."""
        grid = self.rules.schedules[HISTORY].grid_us
        ends = set((-(-(times_us + AFTER_US) // grid) * grid).tolist())
        for coarse in self.rules.coarse_us:
            ends.update(range((after_us // coarse + 1) * coarse, last_us + 1, coarse))
        ends.add(last_us)
        yield from sorted(end for end in ends if after_us < end <= last_us)

    def _step(self, until_us: int, events: ViewerEvents, result: ViewerResult) -> list[Cells]:
        removed, added = self._apply(events, result) if len(events) else (None, None)
        cells = []
        for view in (*VIEWER_VIEWS, *VIDEO_VIEWS):
            schedule = self.rules.schedules[view]
            point_us = -(-until_us // schedule.grid_us) * schedule.grid_us
            entity, rows = _ONE[:0], np.zeros((0, len(LAYOUTS[view].columns)), np.int64)
            if removed is not None and added is not None:
                entity, rows = changed_rows(view, removed, added, schedule.bucket_us)
                if view in VIEWER_VIEWS:  # an anonymous viewer has no row
                    entity, rows = entity[entity >= 0], rows[entity >= 0]
            if view in VIDEO_VIEWS:
                cells += [Cells(view, point_us, entity, rows)] if len(entity) else []
                continue
            touched = self.views[view].add(entity, rows, point_us)
            if until_us == point_us:
                result.rows += self.views[view].emit(until_us, touched)
        return cells

    def _apply(self, events: ViewerEvents, result: ViewerResult) -> tuple[Events, Events]:
        timely = within_horizon(events, self.rules.behind_us)
        is_exposure = events.kind == EXPOSURE
        offered = {"exposures": int(is_exposure.sum()), "outcomes": int((~is_exposure).sum())}
        late = {"exposures": int((is_exposure & ~timely).sum()), "outcomes": int((~is_exposure & ~timely).sum())}
        events = events.take(timely)
        before = self._open.load(np.unique(events.impression_id))
        old, new, applied = merge_events(before, events)
        for kind in offered:
            result.results[kind, TOO_LATE] += late[kind]
            result.results[kind, APPLIED] += applied[kind]
            result.results[kind, REPEATED] += offered[kind] - late[kind] - applied[kind]
        if len(new):
            self._open.save(new, before.impression_id)
        behind_us = self.rules.behind_us
        return label_open_impressions(old, behind_us), label_open_impressions(new, behind_us)


def changed_rows(view: str, removed: Events, added: Events, bucket_us: int) -> tuple[I64, I64]:
    """Returns a view's bucket rows after a change less those before it: entities ``[N]`` and rows ``[N, K]``."""
    minus_entity, minus = to_bucket_rows(view, removed, bucket_us)
    plus_entity, plus = to_bucket_rows(view, added, bucket_us)
    minus = minus.copy()
    minus[:, LAYOUTS[view].keys :] *= -1
    return np.concatenate([minus_entity, plus_entity]), np.concatenate([minus, plus])


def sum_cells(parts: list[Cells]) -> list[Cells]:
    """Sums changes of the same view and point to one row per entity and bucket."""
    summed = []
    for view, point_us in sorted({(part.view, part.point_us) for part in parts}):
        some = [part for part in parts if (part.view, part.point_us) == (view, point_us)]
        entity, rows = sum_rows(
            view, np.concatenate([part.entity for part in some]), np.concatenate([part.rows for part in some])
        )
        summed.append(Cells(view, point_us, entity, rows))
    return summed


def _hours(after_us: int, until_us: int, offset_us: int) -> range:
    """Returns the full hours that ``time + offset_us`` passes between two times."""
    first, last = (after_us + offset_us) // HOUR_US + 1, (until_us + offset_us) // HOUR_US
    return range(first * HOUR_US, last * HOUR_US + 1, HOUR_US)
