"""Feature views: pure functions from labelled impressions to the rows that Feast stores.

A view is a table of snapshots. A snapshot holds the features of an entity that are known at ``event_timestamp``.
Snapshots are taken on a time grid, at the first grid point at or after:

- an event becomes known;
- an event leaves a window, so that a rate decays without new events.

While any window still contains an event, a heartbeat row is written as well. With heartbeats, a short TTL
distinguishes an idle entity from a pipeline that stopped. The functions read no files and no clock, and they return no
row later than ``until_us``.

An event counts from one microsecond after its last outcome became known. Without this microsecond, an event exactly at
a grid point would be part of the snapshot that a request at the same time reads: a label leak.
"""

# Shapes: N events, M snapshots, W windows, K measures, T topics

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.pipelines.features.labels import times_us
from reelway.pipelines.features.windows import ALL_TIME_US, I64, window_sums
from reelway.platform.contracts import feature_names as names
from reelway.platform.contracts.events import TIMESTAMP_TYPE
from reelway.platform.contracts.feature_dimensions import FeatureDimensions
from reelway.platform.errors import FeatureError

SECOND_US: Final = 1_000_000
HOUR_US: Final = 3600 * SECOND_US
DAY_US: Final = 86_400 * SECOND_US
AFTER_US: Final = 1

Floats = NDArray[np.float64]
SnapshotPoints = tuple[I64, I64]
"""Entities and times ``[M]``, sorted by entity, then time, without duplicates."""


@dataclass(frozen=True)
class Prior:
    """The prior mean of a rate, and its strength as a number of impressions."""

    rate: float
    strength: float = 20.0

    def smooth(self, total: Floats, count: Floats) -> Floats:
        """Returns ``(total + rate * strength) / (count + strength)``, the posterior mean of a beta (or gamma) prior."""
        return (total + self.rate * self.strength) / (count + self.strength)


@dataclass(frozen=True)
class ViewSettings:
    """Grids (seconds) and priors of the views. A finer grid is fresher and writes more rows."""

    dimensions: FeatureDimensions
    history_grid_s: int = 1
    activity_grid_s: int = 3600
    affinity_grid_s: int = 3600
    engagement_grid_s: int = 3600
    creator_grid_s: int = 86_400
    heartbeat_s: int = 86_400
    long_watch: Prior = field(default_factory=lambda: Prior(0.3))
    like: Prior = field(default_factory=lambda: Prior(0.05))
    skip: Prior = field(default_factory=lambda: Prior(0.3))
    follow: Prior = field(default_factory=lambda: Prior(0.01))
    watch_s: Prior = field(default_factory=lambda: Prior(8.0))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ViewSettings:
        """Returns the settings that a run's record of the step ``features`` has under ``config.views``."""
        values = dict(config)
        dimensions = FeatureDimensions(**values.pop("dimensions"))
        priors = {name: Prior(**value) for name, value in values.items() if isinstance(value, Mapping)}
        return cls(dimensions, **{**values, **priors})


@dataclass(frozen=True)
class Events:
    """Labelled impressions as integer columns ``[N]``, or sums over ``count`` impressions of one entity.

    Each view has a ``*_points`` function (when a snapshot is due) and an ``*_at`` function (its values at given times).
    The batch job uses all points, the stream processor only the current ones.
    """

    impression_id: I64
    viewer_id: I64
    video_id: I64
    creator_id: I64
    topic: I64
    event_us: I64
    known_us: I64  # time from which the impression counts
    long_watch: I64
    like: I64
    skip: I64
    follow: I64
    watch_ms: I64
    weight_milli: I64
    count: I64
    taste_milli: I64  # absolute weights

    @classmethod
    def from_labels(cls, labels: pa.Table) -> Events:
        """Builds events from a table with the columns of ``labels.LABELLED_SCHEMA``."""

        def ints(name: str, scale: float = 1.0) -> I64:
            values: I64 = np.rint(labels[name].to_numpy() * scale).astype(np.int64)
            return values

        return cls(
            impression_id=labels["impression_id"].to_numpy(),
            viewer_id=labels["viewer_id"].to_numpy(),
            video_id=labels["video_id"].to_numpy(),
            creator_id=labels["creator_id"].to_numpy(),
            topic=labels["video_topic"].to_numpy().astype(np.int64),
            event_us=times_us(labels["event_time"]),
            known_us=times_us(labels["outcome_time"]) + AFTER_US,
            long_watch=ints("long_watch"),
            like=ints("like"),
            skip=ints("skip"),
            follow=ints("follow"),
            watch_ms=ints("watch_s", 1000.0),
            weight_milli=ints("weight", 1000.0),
            count=np.ones(labels.num_rows, dtype=np.int64),
            taste_milli=np.abs(ints("weight", 1000.0)),
        )


def _ceil(values_us: I64, grid_us: int) -> I64:
    return -(-values_us // grid_us) * grid_us


def _unique_pairs(entities: I64, at_us: I64) -> tuple[I64, I64]:
    order = np.lexsort((at_us, entities))
    entities, at_us = entities[order], at_us[order]
    keep = np.ones(len(entities), dtype=np.bool_)
    keep[1:] = (entities[1:] != entities[:-1]) | (at_us[1:] != at_us[:-1])
    return entities[keep], at_us[keep]


def snapshot_points(
    entities: I64, known_us: I64, windows_us: Sequence[int], *, grid_us: int, until_us: int, heartbeat_us: int = 0
) -> tuple[I64, I64]:
    """Returns the snapshot points: grid points at which an event enters or leaves a window, and heartbeats in between.

    Returns entities and times ``[M]``, sorted by entity, then time, without duplicates, none after ``until_us``.
    """
    moments = [known_us, *(known_us + window for window in windows_us)]
    if heartbeat_us and windows_us:
        beats = max(windows_us) // heartbeat_us
        day_entities, days = _unique_pairs(entities, known_us // heartbeat_us)
        beat_us = (days[:, None] + np.arange(1, beats + 1)).ravel() * heartbeat_us
        beat_entities, beat_us = _unique_pairs(np.repeat(day_entities, beats), beat_us)
    else:
        beat_entities, beat_us = entities[:0], known_us[:0]
    at_us = np.concatenate([*(_ceil(moment, grid_us) for moment in moments), _ceil(beat_us, grid_us)])
    owners = np.concatenate([np.tile(entities, len(moments)), beat_entities])
    inside = at_us <= until_us
    return _unique_pairs(owners[inside], at_us[inside])


def _snapshot_table(key: str, entities: I64, at_us: I64, fields: dict[str, pa.Array | Floats]) -> pa.Table:
    when = pa.array(at_us, pa.int64()).cast(TIMESTAMP_TYPE)
    columns = {
        name: values
        if isinstance(values, pa.Array | pa.ChunkedArray)
        else pa.array(np.asarray(values, dtype=np.float32), pa.float32())
        for name, values in fields.items()
    }
    return pa.table({key: pa.array(entities), "event_timestamp": when, "created_timestamp": when, **columns})


def _rates(
    events: Events, key: I64, at: tuple[I64, I64], windows: Sequence[names.TrailingWindow], settings: ViewSettings
) -> dict[str, dict[str, Floats]]:
    """Returns per window: impressions, smoothed long-watch, like, skip and follow rates, and mean watch seconds."""
    values_NK = np.column_stack(
        [events.count, events.long_watch, events.like, events.skip, events.follow, events.watch_ms]
    )
    sums_MWK = window_sums(key, events.known_us, values_NK, *at, [w.length_s * SECOND_US for w in windows])
    by_window: dict[str, dict[str, Floats]] = {}
    for w, window in enumerate(windows):
        count, long_watch, like, skip, follow, watch_ms = sums_MWK[:, w].T.astype(np.float64)
        by_window[window.name] = {
            "impressions": count,
            "long_watch": settings.long_watch.smooth(long_watch, count),
            "like": settings.like.smooth(like, count),
            "skip": settings.skip.smooth(skip, count),
            "follow": settings.follow.smooth(follow, count),
            "watch_s_mean": settings.watch_s.smooth(watch_ms / 1000.0, count),
        }
    return by_window


def viewer_profile(viewers: pa.Table) -> pa.Table:
    """Returns one row per viewer, at the creation time of the account."""
    created_us = times_us(viewers["created_at"])
    return _snapshot_table(
        "viewer_id",
        viewers["viewer_id"].to_numpy(),
        created_us,
        {
            **{name: viewers[name].combine_chunks().cast(pa.string()) for name in ("region", "language", "segment")},
            "created_at_s": pa.array(created_us / SECOND_US, pa.float64()),
        },
    )


def viewer_activity(events: Events, settings: ViewSettings, until_us: int) -> pa.Table:
    """Returns the viewer's activity in the last day, week and month."""
    return viewer_activity_at(events, settings, viewer_activity_points(events, settings, until_us))


def viewer_activity_points(events: Events, settings: ViewSettings, until_us: int) -> SnapshotPoints:
    """Returns the points at which an impression enters or leaves a window, and heartbeats."""
    return snapshot_points(
        events.viewer_id,
        events.known_us,
        [w.length_s * SECOND_US for w in names.VIEWER_WINDOWS],
        grid_us=settings.activity_grid_s * SECOND_US,
        until_us=until_us,
        heartbeat_us=settings.heartbeat_s * SECOND_US,
    )


def viewer_activity_at(events: Events, settings: ViewSettings, at: SnapshotPoints) -> pa.Table:
    """Returns ``viewer_activity`` at the given points."""
    rates = _rates(events, events.viewer_id, at, names.VIEWER_WINDOWS, settings)
    fields: dict[str, pa.Array | Floats] = {}
    for window, values in rates.items():
        fields[f"impressions_{window}"] = values["impressions"]
        for measure in ("long_watch", "like", "skip"):
            fields[f"{measure}_ratio_{window}"] = values[measure]
        fields[f"watch_s_mean_{window}"] = values["watch_s_mean"]
    return _snapshot_table("viewer_id", *at, {name: fields[name] for name in names.VIEWER_ACTIVITY})


def viewer_history(events: Events, settings: ViewSettings, until_us: int) -> pa.Table:
    """Returns the last ``history_length`` impressions with a non-zero weight, in the order they became known."""
    return viewer_history_at(events, settings, viewer_history_points(events, settings, until_us))


def viewer_history_points(events: Events, settings: ViewSettings, until_us: int) -> SnapshotPoints:
    """Returns the points at which an impression with a non-zero weight becomes known."""
    telling = np.flatnonzero(events.weight_milli)
    viewer, known_us = events.viewer_id[telling], events.known_us[telling]
    return snapshot_points(viewer, known_us, [], grid_us=settings.history_grid_s * SECOND_US, until_us=until_us)


def viewer_history_at(events: Events, settings: ViewSettings, at: SnapshotPoints) -> pa.Table:
    """Returns ``viewer_history`` at the given points."""
    telling = np.flatnonzero(events.weight_milli)
    order = telling[np.lexsort((events.impression_id[telling], events.known_us[telling], events.viewer_id[telling]))]
    viewer, known_us = events.viewer_id[order], events.known_us[order]
    viewers, at_us = at
    ones = np.ones((len(viewer), 1), dtype=np.int64)
    counts = window_sums(viewer, known_us, ones, viewers, at_us, [ALL_TIME_US])[:, 0, 0]
    ends = np.searchsorted(viewer, viewers, side="left") + counts
    lengths = np.minimum(counts, settings.dimensions.history_length)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    take = np.repeat(ends - lengths - offsets[:-1], lengths) + np.arange(offsets[-1])
    rows = order[take]

    def lists(values: NDArray[np.generic]) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))

    return _snapshot_table(
        "viewer_id",
        viewers,
        at_us,
        {
            "history_videos": lists(events.video_id[rows]),
            "history_weights": lists((events.weight_milli[rows] / 1000.0).astype(np.float32)),
            "history_times_s": lists(events.event_us[rows] / SECOND_US),
        },
    )


def viewer_topic_affinity(events: Events, settings: ViewSettings, until_us: int) -> pa.Table:
    """Returns each topic's share of the viewer's outcome weights in the last month. Disliked topics are negative."""
    return viewer_topic_affinity_at(events, settings, viewer_topic_affinity_points(events, settings, until_us))


def topic_rows(events: Events) -> I64:
    """Returns the rows with a known topic and a non-zero outcome weight."""
    return np.flatnonzero((events.taste_milli != 0) & (events.topic >= 0))


def viewer_topic_affinity_points(events: Events, settings: ViewSettings, until_us: int) -> SnapshotPoints:
    """Returns the points at which an outcome weight enters or leaves the month's window, and heartbeats."""
    use = topic_rows(events)
    return snapshot_points(
        events.viewer_id[use],
        events.known_us[use],
        [names.VIEWER_WINDOWS[-1].length_s * SECOND_US],
        grid_us=settings.affinity_grid_s * SECOND_US,
        until_us=until_us,
        heartbeat_us=settings.heartbeat_s * SECOND_US,
    )


def viewer_topic_affinity_at(events: Events, settings: ViewSettings, at: SnapshotPoints) -> pa.Table:
    """Returns ``viewer_topic_affinity`` at the given points.

    Raises:
        FeatureError: if an event's topic is not among the topics of the settings' dimensions.
    """
    topics = settings.dimensions.topics
    window_us = names.VIEWER_WINDOWS[-1].length_s * SECOND_US
    use = topic_rows(events)
    if (above := events.topic[use] >= topics).any():
        raise FeatureError(
            f"topic {events.topic[use][above][0]} of an event is above {topics - 1}, the limit of the schema; "
            "import the data set again"
        )
    viewer, known_us = events.viewer_id[use], events.known_us[use]
    values_NK = np.zeros((len(use), topics + 1), dtype=np.int64)
    values_NK[np.arange(len(use)), events.topic[use]] = events.weight_milli[use]
    values_NK[:, topics] = events.taste_milli[use]
    sums_MK = window_sums(viewer, known_us, values_NK, *at, [window_us])[:, 0]
    affinity_MT = (sums_MK[:, :topics] / np.maximum(sums_MK[:, topics:], 1)).astype(np.float32)
    offsets = np.arange(len(affinity_MT) + 1, dtype=np.int32) * topics
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(affinity_MT.ravel()))
    return _snapshot_table("viewer_id", *at, {"topic_affinity": lists})


def video_content(videos: pa.Table) -> pa.Table:
    """Returns one row per video, at its upload time."""
    uploaded_us = times_us(videos["uploaded_at"])
    return _snapshot_table(
        "video_id",
        videos["video_id"].to_numpy(),
        uploaded_us,
        {
            "creator_id": videos["creator_id"].combine_chunks(),
            "topic": videos["topic"].combine_chunks().cast(pa.int64()),
            "video_language": videos["language"].combine_chunks().cast(pa.string()),
            "duration_s": pa.array(videos["duration_ms"].to_numpy() / 1000.0, pa.float32()),
            "uploaded_at_s": pa.array(uploaded_us / SECOND_US, pa.float64()),
            **{name: videos[name].combine_chunks() for name in ("visual", "audio", "text")},
        },
    )


def video_engagement(events: Events, settings: ViewSettings, until_us: int) -> pa.Table:
    """Returns the video's engagement in the last hour, six hours, day and week, smoothed towards the priors."""
    return video_engagement_at(events, settings, video_engagement_points(events, settings, until_us))


def video_engagement_points(events: Events, settings: ViewSettings, until_us: int) -> SnapshotPoints:
    """Returns the points at which an impression enters or leaves a window, and heartbeats."""
    return snapshot_points(
        events.video_id,
        events.known_us,
        [w.length_s * SECOND_US for w in names.VIDEO_WINDOWS],
        grid_us=settings.engagement_grid_s * SECOND_US,
        until_us=until_us,
        heartbeat_us=settings.heartbeat_s * SECOND_US,
    )


def video_engagement_at(events: Events, settings: ViewSettings, at: SnapshotPoints) -> pa.Table:
    """Returns ``video_engagement`` at the given points."""
    fields: dict[str, pa.Array | Floats] = {}
    for window, values in _rates(events, events.video_id, at, names.VIDEO_WINDOWS, settings).items():
        fields[f"video_impressions_{window}"] = values["impressions"]
        for measure in ("long_watch", "like", "skip"):
            fields[f"video_{measure}_rate_{window}"] = values[measure]
        fields[f"video_watch_s_mean_{window}"] = values["watch_s_mean"]
    return _snapshot_table("video_id", *at, {name: fields[name] for name in names.VIDEO_ENGAGEMENT})


def creator_statistics(
    events: Events, videos: pa.Table, creators: pa.Table, settings: ViewSettings, until_us: int
) -> pa.Table:
    """Returns followers and uploads so far, and the reach of the last week.

    The key is ``creator_key``; ``feature_repo/definitions.py`` explains why.
    """
    points = [
        creator_statistics_points(events, videos, settings, until_us),
        (creators["creator_id"].to_numpy(), times_us(creators["created_at"])),
    ]
    at = _unique_pairs(np.concatenate([p[0] for p in points]), np.concatenate([p[1] for p in points]))
    return creator_statistics_at(events, videos, creators, settings, at)


def creator_statistics_points(
    events: Events, videos: pa.Table, settings: ViewSettings, until_us: int
) -> SnapshotPoints:
    """Returns the points at which an impression enters or leaves the week's window, and those after an upload."""
    grid_us = settings.creator_grid_s * SECOND_US
    week_us = names.CREATOR_WINDOW.length_s * SECOND_US
    uploader, uploaded_us = videos["creator_id"].to_numpy(), times_us(videos["uploaded_at"])
    points = [
        snapshot_points(events.creator_id, events.known_us, [week_us], grid_us=grid_us, until_us=until_us),
        snapshot_points(uploader, uploaded_us, [], grid_us=grid_us, until_us=until_us),
    ]
    return _unique_pairs(np.concatenate([p[0] for p in points]), np.concatenate([p[1] for p in points]))


def creator_statistics_at(
    events: Events, videos: pa.Table, creators: pa.Table, settings: ViewSettings, at: SnapshotPoints
) -> pa.Table:
    """Returns ``creator_statistics`` at the given points."""
    creator, base = creators["creator_id"].to_numpy(), creators["followers"].to_numpy()
    uploader, uploaded_us = videos["creator_id"].to_numpy(), times_us(videos["uploaded_at"])
    follows = window_sums(events.creator_id, events.known_us, events.follow[:, None], *at, [ALL_TIME_US])[:, 0, 0]
    # A creator counts from the start of time: rows before created_at (clock skew) have the initial followers.
    start = np.full(len(creator), -ALL_TIME_US // 4, dtype=np.int64)
    followers = window_sums(creator, start, base[:, None], *at, [ALL_TIME_US])[:, 0, 0] + follows
    uploads = window_sums(uploader, uploaded_us, np.ones((len(uploader), 1), np.int64), *at, [ALL_TIME_US])[:, 0, 0]
    week = _rates(events, events.creator_id, at, [names.CREATOR_WINDOW], settings)[names.CREATOR_WINDOW.name]
    return _snapshot_table(
        "creator_key",
        *at,
        {
            "creator_followers": followers.astype(np.float64),
            "creator_uploads": uploads.astype(np.float64),
            "creator_impressions_7d": week["impressions"],
            "creator_long_watch_rate_7d": week["long_watch"],
            "creator_follow_rate_7d": week["follow"],
        },
    )
