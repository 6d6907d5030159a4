"""Time buckets: the integer sums that are retained per entity so that its windows can be summed again later.

A bucket is a time span that no window edge and no snapshot time can split. Its length is the greatest common divisor
of a view's grid, windows and heartbeat. So sums over buckets equal sums over events, and a busy video needs no more
rows than its longest window has buckets. A revised event is removed by adding its negative.
"""

# Shapes: N rows of several entities, E entities, K columns

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.pipelines.features import views
from reelway.pipelines.features.views import SECOND_US, Events, SnapshotPoints, ViewSettings
from reelway.pipelines.features.windows import I64
from reelway.platform.contracts import feature_names as names
from reelway.platform.contracts.events import TIMESTAMP_TYPE
from reelway.platform.errors import ConfigError

MIN_TIME_US: Final = -(1 << 58)
"""A time before any event. Rows that count only in all-time sums are stored under it."""
ACTIVITY: Final = "viewer_activity"
HISTORY: Final = "viewer_history"
AFFINITY: Final = "viewer_topic_affinity"
ENGAGEMENT: Final = "video_engagement"
CREATORS: Final = "creator_statistics"
STREAMED: Final = (ACTIVITY, AFFINITY, HISTORY, ENGAGEMENT, CREATORS)
"""Views that the stream writes. The other views depend only on uploads and accounts; the batch job writes them."""
ENTITY_KEYS: Final = {
    ACTIVITY: "viewer_id", AFFINITY: "viewer_id", HISTORY: "viewer_id", ENGAGEMENT: "video_id", CREATORS: "creator_key",
}  # fmt: skip

_COUNTS: Final = ("count", "long_watch", "like", "skip", "follow", "watch_ms")


@dataclass(frozen=True)
class BucketLayout:
    """Columns of a view's rows. Rows with equal values in the first ``keys`` columns are summed into one row."""

    columns: tuple[str, ...]
    keys: int


LAYOUTS: Final = {
    ACTIVITY: BucketLayout(("known_us", *_COUNTS), 1),
    AFFINITY: BucketLayout(("known_us", "topic", "weight_milli", "taste_milli"), 2),
    HISTORY: BucketLayout(("known_us", "impression_id", "video_id", "weight_milli", "event_us", "count"), 5),
    ENGAGEMENT: BucketLayout(("known_us", *_COUNTS), 1),
    # Uploads of videos; the followers that a creator had in the data set are follows before any event.
    CREATORS: BucketLayout(("known_us", *_COUNTS, "upload"), 1),
}


@dataclass(frozen=True)
class EmissionSchedule:
    """When rows of a view are due, in microseconds. Without windows, rows are due only when an event becomes known."""

    grid_us: int
    windows_us: tuple[int, ...] = ()
    heartbeat_us: int = 0
    keep: int = 0
    """Of a view without windows: latest rows of an entity that its values depend on."""

    @property
    def bucket_us(self) -> int:
        return math.gcd(self.grid_us, *self.windows_us, *((self.heartbeat_us,) if self.heartbeat_us else ()))


def emission_schedules(settings: ViewSettings) -> dict[str, EmissionSchedule]:
    """Returns the emission schedule of each streamed view.

    Raises:
        ConfigError: if a heartbeat is not a multiple of the grid, or the longest window is not a multiple of the
            heartbeat. Buckets could then not tell on which day an event happened.
    """
    viewer = tuple(window.length_s * SECOND_US for window in names.VIEWER_WINDOWS)
    video = tuple(window.length_s * SECOND_US for window in names.VIDEO_WINDOWS)
    beat = settings.heartbeat_s * SECOND_US
    schedules = {
        ACTIVITY: EmissionSchedule(settings.activity_grid_s * SECOND_US, viewer, beat),
        AFFINITY: EmissionSchedule(settings.affinity_grid_s * SECOND_US, viewer[-1:], beat),
        HISTORY: EmissionSchedule(settings.history_grid_s * SECOND_US, keep=settings.dimensions.history_length),
        ENGAGEMENT: EmissionSchedule(settings.engagement_grid_s * SECOND_US, video, beat),
        CREATORS: EmissionSchedule(settings.creator_grid_s * SECOND_US, (names.CREATOR_WINDOW.length_s * SECOND_US,)),
    }
    for view, schedule in schedules.items():
        beats = schedule.heartbeat_us
        if beats and (beats % schedule.grid_us or max(schedule.windows_us) % beats):
            raise ConfigError(
                f"{view}: heartbeat of {beats // SECOND_US} s is not possible; choose a multiple of the grid "
                f"({schedule.grid_us // SECOND_US} s) and a divisor of the longest window"
            )
    return schedules


def to_bucket_rows(view: str, events: Events, cell_us: int) -> tuple[I64, I64]:
    """Returns the events as a view's rows: entities ``[N]`` and rows ``[N, K]``, not yet summed."""
    keep: I64 = np.arange(len(events.known_us))
    if view == HISTORY:
        keep = np.flatnonzero(events.weight_milli)
    elif view == AFFINITY:
        keep = views.topic_rows(events)
    entity = {"viewer_id": events.viewer_id, "video_id": events.video_id, "creator_key": events.creator_id}
    columns = [
        bucket_start_us(events.known_us, cell_us)
        if name == "known_us" and view != HISTORY
        else getattr(events, name, np.zeros(len(events.known_us), dtype=np.int64))
        for name in LAYOUTS[view].columns
    ]
    return entity[ENTITY_KEYS[view]][keep], np.stack(columns, axis=1)[keep]


def to_events(view: str, entity: I64, rows: I64) -> Events:
    """Converts rows back to events. Columns that the view does not use are zero."""
    zero = np.zeros(len(rows), dtype=np.int64)
    columns = {name: rows[:, i] for i, name in enumerate(LAYOUTS[view].columns) if name in Events.__dataclass_fields__}
    key = {"creator_key": "creator_id"}.get(ENTITY_KEYS[view], ENTITY_KEYS[view])
    return Events(**dict.fromkeys(Events.__dataclass_fields__, zero) | columns | {key: entity})


def sum_rows(view: str, entity: I64, rows: I64) -> tuple[I64, I64]:
    """Sums to one row per entity and key, sorted by both. Rows that sum to zero are dropped."""
    keys = LAYOUTS[view].keys
    order = np.lexsort((*(rows[:, k] for k in reversed(range(keys))), entity))
    entity, rows = entity[order], rows[order]
    if not len(rows):
        return entity, rows
    first = np.ones(len(rows), dtype=np.bool_)
    first[1:] = (entity[1:] != entity[:-1]) | (rows[1:, :keys] != rows[:-1, :keys]).any(axis=1)
    starts = np.flatnonzero(first)
    sums = rows[starts].copy()
    sums[:, keys:] = np.add.reduceat(rows[:, keys:], starts, axis=0)
    left = (sums[:, keys:] != 0).any(axis=1)
    return entity[starts][left], sums[left]


def prune_rows(
    view: str, schedule: EmissionSchedule, entity: I64, rows: I64, at_us: int, open_from_us: int
) -> tuple[I64, I64]:
    """Drops rows that cannot affect any value after ``at_us``. The result is sorted as by ``sum_rows``.

    Args:
        open_from_us: impressions shown at or after this time may still be revised.
    """
    if view == HISTORY:
        # Keeps the newest ``keep`` rows that are final, and all rows that may still be revised.
        settled = rows[:, LAYOUTS[view].columns.index("event_us")] < open_from_us
        rank = _rank_from_the_end(entity, settled)
        keep = ~settled | (rank < schedule.keep)
        return entity[keep], rows[keep]
    expired = -(-(rows[:, 0] + max(schedule.windows_us)) // schedule.grid_us) * schedule.grid_us <= at_us
    if view != CREATORS:
        return entity[~expired], rows[~expired]
    folded = rows.copy()
    folded[expired] = 0
    folded[expired, 0] = MIN_TIME_US
    for name in ("follow", "upload"):
        column = LAYOUTS[view].columns.index(name)
        folded[expired, column] = rows[expired, column]
    return sum_rows(view, entity, folded)


def _rank_from_the_end(entity: I64, counted: NDArray[np.bool_]) -> I64:
    """Returns for each row the number of counted rows of its entity that follow it."""
    total = np.cumsum(counted)
    last = np.searchsorted(entity, entity, side="right") - 1
    return np.asarray(total[last] - total)


def bucket_start_us(times_us: I64, bucket_us: int) -> I64:
    """Returns the first microsecond of the bucket that contains each time.

    It is in the same windows, days and grid steps as all events of the bucket.
    """
    return (times_us - 1) // bucket_us * bucket_us + 1


def view_values_at(view: str, entity: I64, rows: I64, settings: ViewSettings, at: SnapshotPoints) -> pa.Table:
    """Returns the view's values at the given points, computed by the functions of ``features.views``.

    Args:
        entity: ``[N]``, the entity of each row.
        rows: ``[N, K]``, as in ``LAYOUTS``.
    """
    events = to_events(view, entity, rows)
    if view == CREATORS:
        uploads = rows[:, LAYOUTS[view].columns.index("upload")]
        times = pa.array(np.repeat(rows[:, 0], uploads), pa.int64()).cast(TIMESTAMP_TYPE)
        videos = pa.table({"creator_id": np.repeat(entity, uploads), "uploaded_at": times})
        return views.creator_statistics_at(events, videos, _NO_CREATORS, settings, at)
    return _VALUES[view](events, settings, at)


_NO_CREATORS: Final = pa.table({"creator_id": pa.array([], pa.int64()), "followers": pa.array([], pa.int64())})
_VALUES: Final = {
    ACTIVITY: views.viewer_activity_at,
    AFFINITY: views.viewer_topic_affinity_at,
    HISTORY: views.viewer_history_at,
    ENGAGEMENT: views.video_engagement_at,
}
