"""Fills the stream's initial state from the labels of the data set.

After that, the stream reads only the log. If the log contains an outcome of an impression of the data set, the outcome
counts as a separate impression. So an impression must not be in both.
"""

# Shapes: N labelled impressions, E entities

from __future__ import annotations

import numpy as np
import pyarrow as pa

from reelway.pipelines.features.stream.due_times import NEVER_US, expiry_us
from reelway.pipelines.features.stream.engine import EmittedRows, StreamEngine
from reelway.pipelines.features.stream.open_impressions import HORIZON_US
from reelway.pipelines.features.stream.state import Entities
from reelway.pipelines.features.stream.time_buckets import (
    CREATORS,
    STREAMED,
    prune_rows,
    sum_rows,
    to_bucket_rows,
    to_events,
    view_values_at,
)
from reelway.pipelines.features.views import Events
from reelway.pipelines.features.windows import I64
from reelway.platform.errors import EmptyDatasetError


def initial_watermark_us(labels: pa.Table, fine_us: int) -> int:
    """Returns the first point of the finest grid at which all labels are known.

    Raises:
        EmptyDatasetError: if there are no labels.
    """
    if not labels.num_rows:
        raise EmptyDatasetError("data set: no impressions; simulate or import a data set")
    known_us = int(Events.from_labels(labels).known_us.max())
    return -(-known_us // fine_us) * fine_us


def bootstrap(engine: StreamEngine, labels: pa.Table, at_us: int) -> list[EmittedRows]:
    """Fills an empty state. Returns the row of every entity as of ``at_us``, with nulls if the entity has no valid row.

    Must be called within a transaction of the state.
    """
    events = Events.from_labels(labels)
    return [rows for view in STREAMED for rows in _load_view(engine, view, events, at_us)]


def _load_view(engine: StreamEngine, view: str, events: Events, at_us: int) -> list[EmittedRows]:
    schedule = engine.schedules[view]
    entity, rows = sum_rows(view, *to_bucket_rows(view, events, schedule.bucket_us))
    ids = np.unique(np.concatenate([entity, _without_events(engine, view)]))
    owner: I64 = np.searchsorted(ids, entity)
    never = np.full(len(ids), NEVER_US, dtype=np.int64)
    _, next_us, last_us = engine.due_times(view, schedule, Entities(ids, owner, rows, -never, never), at_us)
    expires = expiry_us(last_us, engine.ttl_us[view], schedule.grid_us)
    alive = (last_us > -NEVER_US) & (expires > at_us)
    emitted = [EmittedRows(view, engine.expired_rows(view, ids[~alive], at_us))] if (~alive).any() else []
    if alive.any():
        points = (ids[alive], last_us[alive])
        creators = engine.creators_of(view, ids)
        emitted.append(
            EmittedRows(
                view, view_values_at(view, to_events(view, ids[owner], rows), engine.settings, points, creators)
            )
        )
    owner, rows = prune_rows(view, schedule, owner, rows, at_us, at_us + engine.behind_us - HORIZON_US)
    last_us = np.where(alive, last_us, -NEVER_US)
    due_us = np.minimum(next_us, np.where(alive, expires, NEVER_US))
    engine.state.save(view, Entities(ids, owner, rows, last_us, due_us))
    return emitted


def _without_events(engine: StreamEngine, view: str) -> I64:
    """Returns creators whose rows come from their uploads alone; such rows exist from the creator's creation time."""
    if view != CREATORS:
        return np.zeros(0, dtype=np.int64)
    return np.asarray(engine.catalogue.creators["creator_id"].to_numpy(), dtype=np.int64)
