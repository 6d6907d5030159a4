"""One view of a partition's entities: sums changes into their buckets, and computes the rows that are due."""

# Shapes: N rows of E entities, K columns

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.pipelines.features.stream.due_times import NEVER_US, due_and_next, expiry_us
from reelway.pipelines.features.stream.keyed_store import KeyedStore, LargeValues, TimedBytes
from reelway.pipelines.features.stream.open_impressions import HORIZON_US
from reelway.pipelines.features.stream.rules import StreamRules
from reelway.pipelines.features.stream.time_buckets import (
    CREATORS,
    ENTITY_KEYS,
    HISTORY,
    LAYOUTS,
    EmissionSchedule,
    prune_rows,
    sum_rows,
    view_values_at,
)
from reelway.pipelines.features.windows import I64
from reelway.platform.contracts.events import TIMESTAMP_TYPE
from reelway.platform.eventlog.erasures import rows_kept

ENTITY_CHUNK: Final = 20_000
"""Maximum number of entities whose rows are in memory at once."""


@dataclass(frozen=True)
class EmittedRows:
    """Rows of one view: entity, ``event_timestamp``, ``created_timestamp`` and the fields; nulls for expired rows."""

    view: str
    rows: pa.Table


@dataclass(frozen=True)
class Entities:
    """Some entities of a view: ids ``[E]`` ascending, their rows in that order, when each was last written and is due.

    ``last_us`` and ``due_us`` are ``-NEVER_US`` and ``NEVER_US`` for an entity that is new.
    """

    ids: I64
    owner: I64  # [N], index into ids
    rows: I64  # [N, K]
    last_us: I64
    due_us: I64


class EntityView:
    """A view's entities in a store."""

    def __init__(self, store: KeyedStore, view: str, rules: StreamRules) -> None:
        self.view, self.rules = view, rules
        self.schedule = rules.schedules[view]
        self._entities = LargeValues(store, view)
        self._width = len(LAYOUTS[view].columns)
        self._due = TimedBytes(store, f"{view}.due")
        self._due_grid_us = rules.due_grid_us(view)

    def add(self, entity: I64, rows: I64, due_us: int) -> I64:
        """Sums rows into their entities, which are due at ``due_us``. Returns the entities' ids.

        Args:
            entity: ``[N]``, the entity of each row.
            rows: ``[N, K]``; negative sums remove what was added before.
        """
        ids, owner = np.unique(entity, return_inverse=True)
        if not len(ids):
            return ids
        before = self.load(ids)
        owner, summed = sum_rows(self.view, np.concatenate([before.owner, owner]), np.concatenate([before.rows, rows]))
        after = Entities(ids, owner, summed, before.last_us, np.minimum(before.due_us, due_us))
        # The rows of a history are computed in the same step, so they need no entry among the due entities.
        self.save(after, after.due_us if self.view == HISTORY else before.due_us)
        return ids

    def emit(self, at_us: int, touched: I64) -> list[EmittedRows]:
        """Computes the rows due at ``at_us``: those of the touched entities and of entities without new events."""
        ids = touched
        if at_us % self._due_grid_us == 0:
            due = np.frombuffer(self._due.pop(np.array([at_us], dtype=np.int64)), dtype=np.int64)
            ids = np.unique(np.concatenate([touched, due]))
        return [
            rows
            for start in range(0, len(ids), ENTITY_CHUNK)
            for rows in self._emit_some(at_us, ids[start : start + ENTITY_CHUNK])
        ]

    def _emit_some(self, at_us: int, ids: I64) -> list[EmittedRows]:
        entities = self.load(ids)
        is_due = entities.due_us <= at_us
        if not is_due.all():  # an entry of an earlier due time
            entities = self.load(ids[is_due])
            ids = entities.ids
        now, next_us, _ = self.due_times(entities, at_us)
        emitted = [EmittedRows(self.view, self.values_at(entities, now, at_us))] if now.any() else []
        last_us = np.where(now, at_us, entities.last_us)
        expires = expiry_us(last_us, self.rules.ttl_us[self.view], self.schedule.grid_us)
        over = ~now & (expires <= at_us)
        if over.any():
            emitted.append(EmittedRows(self.view, self.expired_rows(ids[over], at_us)))
        owner, rows = self.prune(entities, at_us)
        deletable = over & (next_us == NEVER_US) & ~np.isin(np.arange(len(ids)), owner)
        self._entities.delete_many(ids[deletable])
        due_us = np.minimum(next_us, np.where(over, NEVER_US, expires))
        kept = Entities(ids, owner, rows, np.where(over, -NEVER_US, last_us), due_us)
        self.save(kept if not deletable.any() else _without(kept, deletable), None)
        return emitted

    def erase(self, ids: I64) -> int:
        """Deletes entities (ascending, once each). Returns how many were known."""
        known = self.load(ids)
        ids = ids[(known.due_us != NEVER_US) | (known.last_us != -NEVER_US) | np.isin(np.arange(len(ids)), known.owner)]
        self._entities.delete_many(ids)
        due_us = known.due_us[np.isin(known.ids, ids) & (known.due_us != NEVER_US)]
        for point_us in np.unique(-(-due_us // self._due_grid_us) * self._due_grid_us):
            point = np.array([point_us], dtype=np.int64)
            due = np.frombuffer(self._due.pop(point), dtype=np.int64)
            if len(rest := due[rows_kept(due, ids)]):
                self._due.append(point, [rest.tobytes()])
        return len(ids)

    def due_times(self, entities: Entities, at_us: int) -> tuple[NDArray[np.bool_], I64, I64]:
        """Returns which entities have a row due now, and the times of each entity's next and previous row."""
        count = len(entities.ids)
        if self.view != CREATORS:
            return due_and_next(entities.owner, entities.rows[:, 0], count, self.schedule, at_us)
        # An upload makes a row due once. It leaves no window.
        uploads = ~entities.rows[:, 1:-1].any(axis=1)
        now, next_us, last_us = due_and_next(
            entities.owner[~uploads], entities.rows[~uploads, 0], count, self.schedule, at_us
        )
        also, later, before = due_and_next(
            entities.owner[uploads], entities.rows[uploads, 0], count, EmissionSchedule(self.schedule.grid_us), at_us
        )
        return now | also, np.minimum(next_us, later), np.maximum(last_us, before)

    def values_at(self, entities: Entities, which: NDArray[np.bool_], at_us: int | I64) -> pa.Table:
        """Returns the rows of the selected entities at a time, or each at its own."""
        ids = entities.ids[which]
        points = (ids, np.broadcast_to(np.asarray(at_us, dtype=np.int64), (len(ids),)))
        return view_values_at(self.view, entities.ids[entities.owner], entities.rows, self.rules.views, points)

    def expired_rows(self, ids: I64, at_us: int) -> pa.Table:
        """Returns rows of nulls for entities whose rows have expired."""
        none = Entities(ids[:0], ids[:0], np.zeros((0, self._width), np.int64), ids[:0], ids[:0])
        schema = self.values_at(none, np.zeros(0, np.bool_), at_us).schema
        when = pa.array(np.full(len(ids), at_us), pa.int64()).cast(TIMESTAMP_TYPE)
        fixed = {ENTITY_KEYS[self.view]: pa.array(ids), "event_timestamp": when, "created_timestamp": when}
        return pa.table([fixed.get(f.name, pa.nulls(len(ids), f.type)) for f in schema], schema=schema)

    def prune(self, entities: Entities, at_us: int) -> tuple[I64, I64]:
        """Returns owners and rows without those that no later value depends on."""
        open_from_us = at_us + self.rules.behind_us - HORIZON_US
        return prune_rows(self.view, self.schedule, entities.owner, entities.rows, at_us, open_from_us)

    def load(self, ids: I64) -> Entities:
        """Returns the entities with these ids (ascending, once each), known or not."""
        found = self._entities.get_many(ids)
        size_E = np.array([len(value) // 8 if value else 0 for value in found], dtype=np.int64)
        flat = np.frombuffer(b"".join(value for value in found if value), dtype=np.int64)
        known = size_E > 0
        start = (np.cumsum(size_E) - size_E)[known]
        last_us = np.full(len(ids), -NEVER_US, dtype=np.int64)
        due_us = np.full(len(ids), NEVER_US, dtype=np.int64)
        last_us[known], due_us[known] = flat[start], flat[start + 1]
        is_row = np.ones(len(flat), dtype=np.bool_)
        is_row[start] = is_row[start + 1] = False
        owner = np.repeat(np.arange(len(ids)), np.maximum(size_E - 2, 0) // self._width)
        return Entities(ids, owner, flat[is_row].reshape(-1, self._width), last_us, due_us)

    def save(self, entities: Entities, due_before_us: I64 | None) -> None:
        """Writes entities. Those whose due time differs from ``due_before_us`` are entered among the due entities."""
        ends = np.searchsorted(entities.owner, np.arange(len(entities.ids)), side="right").tolist()
        heads = np.column_stack([entities.last_us, entities.due_us]).tobytes()
        raw, width, start, values = np.ascontiguousarray(entities.rows).tobytes(), 8 * self._width, 0, []
        for index, end in enumerate(ends):
            values.append(heads[16 * index : 16 * index + 16] + raw[start * width : end * width])
            start = end
        self._entities.put_many(entities.ids, values)
        changed = entities.due_us != NEVER_US
        if due_before_us is not None:
            changed &= entities.due_us != due_before_us
        ids = entities.ids[changed]
        point_us = -(-entities.due_us[changed] // self._due_grid_us) * self._due_grid_us
        order = np.argsort(point_us, kind="stable")
        points, first = np.unique(point_us[order], return_index=True)
        if len(points):
            self._due.append(points, [some.tobytes() for some in np.split(ids[order], first[1:])])


def _without(entities: Entities, dropped: NDArray[np.bool_]) -> Entities:
    """Returns the entities without some that have no rows."""
    stay = np.flatnonzero(~dropped)
    return replace(
        entities,
        ids=entities.ids[stay],
        owner=np.searchsorted(stay, entities.owner),
        last_us=entities.last_us[stay],
        due_us=entities.due_us[stay],
    )
