"""Fills the stream's initial state from the labels of the data set.

After that, the stream reads only the log. If the log contains an event of an impression of the data set, the event
counts as a separate impression. So an impression must not be in both.
"""

# Shapes: N labelled impressions, E entities

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.pipelines.features.labels import times_us
from reelway.pipelines.features.stream.due_times import NEVER_US, expiry_us
from reelway.pipelines.features.stream.entity_views import EmittedRows, Entities, EntityView
from reelway.pipelines.features.stream.rules import VIEWER_VIEWS
from reelway.pipelines.features.stream.time_buckets import (
    CREATORS,
    LAYOUTS,
    MIN_TIME_US,
    bucket_start_us,
    sum_rows,
    to_bucket_rows,
)
from reelway.pipelines.features.views import Events
from reelway.pipelines.features.windows import I64
from reelway.platform.errors import EmptyDatasetError

Selection = Callable[[I64], NDArray[np.bool_]]
"""Returns which entities a partition owns. Shapes: ``[E] -> [E]``."""


@dataclass(frozen=True)
class DatasetState:
    """What a stream begins with: the data set's labelled impressions, videos and creators."""

    labels: pa.Table
    videos: pa.Table  # columns video_id, creator_id, topic, duration_ms, uploaded_at
    creators: pa.Table  # columns creator_id, created_at, followers
    filled_us: int | None = None
    """Time of the rows with which the online store was filled, microseconds; None if it was not filled."""


def initial_watermark_us(dataset: DatasetState, fine_us: int, now_us: int) -> int:
    """Returns the first point of the finest grid at which all labels are known and the store's rows are past.

    A row of the stream before the time of the store's rows would not replace them. If the store is filled up to a time
    in the future, only the labels count: the stream cannot wait.

    Raises:
        EmptyDatasetError: if there are no labels.
    """
    if not dataset.labels.num_rows:
        raise EmptyDatasetError("data set: no impressions; simulate or import a data set")
    known_us = int(Events.from_labels(dataset.labels).known_us.max())
    if dataset.filled_us is not None and dataset.filled_us <= now_us:
        known_us = max(known_us, dataset.filled_us)
    return -(-known_us // fine_us) * fine_us


def bootstrap_view(view: EntityView, dataset: DatasetState, at_us: int, owns: Selection) -> list[EmittedRows]:
    """Fills a view's empty state with the entities of a partition.

    Returns:
        The row of every entity as of ``at_us``, with nulls if the entity has no valid row.
    """
    name, schedule = view.view, view.schedule
    entity, rows = to_bucket_rows(name, Events.from_labels(dataset.labels), schedule.bucket_us)
    if name in VIEWER_VIEWS:  # an anonymous viewer has no row
        entity, rows = entity[entity >= 0], rows[entity >= 0]
    first_us = np.zeros(0, dtype=np.int64)
    without_events = first_us
    if name == CREATORS:
        more_entity, more = _creator_rows(dataset, schedule.bucket_us)
        entity, rows = np.concatenate([entity, more_entity]), np.concatenate([rows, more])
        without_events = dataset.creators["creator_id"].to_numpy()
        first_us = times_us(dataset.creators["created_at"])
    mine = owns(entity)
    entity, rows = sum_rows(name, entity[mine], rows[mine])
    owned = owns(without_events)
    without_events, first_us = without_events[owned], first_us[owned]
    ids = np.unique(np.concatenate([entity, without_events]))
    never = np.full(len(ids), NEVER_US, dtype=np.int64)
    entities = Entities(ids, np.searchsorted(ids, entity), rows, -never, never)
    _, next_us, last_us = view.due_times(entities, at_us)
    created = first_us <= at_us  # the row of a creator's creation time
    np.maximum.at(last_us, np.searchsorted(ids, without_events[created]), first_us[created])
    expires = expiry_us(last_us, view.rules.ttl_us[name], schedule.grid_us)
    alive = (last_us > -NEVER_US) & (expires > at_us)
    emitted = [EmittedRows(name, view.expired_rows(ids[~alive], at_us))] if (~alive).any() else []
    if alive.any():
        emitted.append(EmittedRows(name, view.values_at(entities, alive, last_us[alive])))
    owner, rows = view.prune(entities, at_us)
    due_us = np.minimum(next_us, np.where(alive, expires, NEVER_US))
    view.save(Entities(ids, owner, rows, np.where(alive, last_us, -NEVER_US), due_us), never)
    return emitted


def _creator_rows(dataset: DatasetState, bucket_us: int) -> tuple[I64, I64]:
    """Returns the creators' initial followers and their uploads as bucket rows."""
    columns = LAYOUTS[CREATORS].columns
    creator, uploader = dataset.creators["creator_id"].to_numpy(), dataset.videos["creator_id"].to_numpy()
    followers = np.zeros((len(creator), len(columns)), dtype=np.int64)
    followers[:, 0] = MIN_TIME_US
    followers[:, columns.index("follow")] = dataset.creators["followers"].to_numpy()
    uploads = np.zeros((len(uploader), len(columns)), dtype=np.int64)
    uploads[:, 0] = bucket_start_us(times_us(dataset.videos["uploaded_at"]), bucket_us)
    uploads[:, columns.index("upload")] = 1
    return np.concatenate([creator, uploader]), np.concatenate([followers, uploads])
