"""Generated exposures and outcomes in a log, and the batch job's rows for the same events at any time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tests.support.pipelines import event_tables

from reelway.pipelines.features import views
from reelway.pipelines.features.labels import label_impressions
from reelway.pipelines.features.stream.bootstrap import DatasetState
from reelway.pipelines.features.views import Events, ViewSettings
from reelway.platform.contracts.events import OUTCOMES, OutcomeType
from reelway.platform.eventlog import EventLog, LogRecord
from reelway.platform.eventlog.exposure_events import EXPOSURE_EVENT_SCHEMA, encode_exposures
from reelway.platform.eventlog.outcome_events import (
    OUTCOME_EVENT_SCHEMA,
    OUTCOME_TYPES,
    derive_outcome_ids,
    encode_outcomes,
)
from reelway.platform.eventlog.sqlite_log import SqliteLog
from reelway.platform.eventlog.topics import Topic

SECOND_US = 1_000_000
START_US = event_tables.START_US
TTL_US = {
    "viewer_activity": 2 * views.DAY_US, "viewer_history": 90 * views.DAY_US,
    "viewer_topic_affinity": 2 * views.DAY_US, "video_engagement": 2 * views.DAY_US,
    "creator_statistics": 365 * views.DAY_US,
}  # fmt: skip


@dataclass(frozen=True)
class LoggedEvent:
    """An exposure (``kind`` is None) or an outcome, and the time at which it is appended to the log."""

    impression: int
    viewer: int
    video: int
    kind: OutcomeType | None
    value: float
    shown_us: int
    time_us: int


def record_of(events: Sequence[LoggedEvent], number: int, *, stamped: bool = True) -> LogRecord:
    """Encodes events of the same topic as one record of the log.

    Args:
        stamped: whether the record states creator, topic and duration of the videos in the catalogue.
    """
    facts = {row["video_id"]: row for row in catalogue().videos.to_pylist()} if stamped else {}
    n = len(events)
    impression = np.array([one.impression for one in events], np.int64)
    columns: dict[str, Any] = {
        "impression_id": impression, "request_id": impression, "viewer_id": [one.viewer for one in events],
        "video_id": [one.video for one in events], "shown_at": [one.shown_us for one in events],
        "request_time": [one.shown_us for one in events],
        **{name: [facts.get(one.video, {}).get(name) for one in events] for name in STAMPS},
    }  # fmt: skip
    exposed = events[0].kind is None
    schema = EXPOSURE_EVENT_SCHEMA if exposed else OUTCOME_EVENT_SCHEMA
    if not exposed:
        kind = np.array([OUTCOME_TYPES.index(one.kind) for one in events if one.kind], np.int64)
        columns |= {
            "outcome_id": derive_outcome_ids(impression, kind), "type": [str(one.kind) for one in events],
            "value": [one.value for one in events], "event_time": [one.time_us for one in events],
        }  # fmt: skip
    arrays = [_array(columns.get(field.name), field, n) for field in schema]
    batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
    (record,) = (encode_exposures if exposed else encode_outcomes)(batch, 1, 1 << 20)
    return record._replace(id=str(number))


STAMPS = ("creator_id", "topic", "duration_ms")


def _array(values: Any, field: pa.Field, rows: int) -> pa.Array:
    if values is None:
        if field.nullable:
            return pa.nulls(rows, field.type)
        return pa.array(["r" if pa.types.is_dictionary(field.type) else 0] * rows).cast(field.type)
    if pa.types.is_timestamp(field.type):
        return pa.array(values, pa.int64()).cast(field.type)
    return pa.array(values).cast(field.type)


class SteppedClock:
    """Unix seconds, set in microseconds."""

    def __init__(self, now_us: int) -> None:
        self.now_us = now_us

    def __call__(self) -> float:
        return self.now_us / 1e6


def open_logs(folder: Path, clock: Callable[[], float]) -> dict[Topic, SqliteLog]:
    """Opens the topics of exposures and outcomes in SQLite files."""
    return {topic: SqliteLog(folder / f"{topic}.db", clock=clock) for topic in (Topic.EXPOSURES, Topic.OUTCOMES)}


def append(logs: Mapping[Topic, EventLog], events: Sequence[LoggedEvent], number: int) -> None:
    """Appends events to their topics, one record each."""
    for topic in (Topic.EXPOSURES, Topic.OUTCOMES):
        if some := [one for one in events if (one.kind is None) == (topic is Topic.EXPOSURES)]:
            logs[topic].append([record_of(some, number)])


@cache
def catalogue() -> DatasetState:
    """Returns six videos by three creators; one has no topic, and one is uploaded while the stream runs."""
    ids = [1, 2, 3, 4, 5, 6]
    videos = event_tables.table(
        event_tables.contract.VIDEOS, video_id=ids, creator_id=[7, 7, 8, 8, 9, 9], topic=[3, 3, 5, 0, -1, 31],
        uploaded_at=[START_US - 3 * views.DAY_US] * 5 + [START_US + 30 * views.HOUR_US],
        duration_ms=[20_000, 5_000, 60_000, 9_000, 12_000, 30_000], language=["en"] * 6, title=["t"] * 6,
    )  # fmt: skip
    creators = event_tables.table(
        event_tables.contract.CREATORS, creator_id=[7, 8, 9], created_at=[START_US - 9 * views.DAY_US] * 3,
        followers=[10, 0, 5],
    )  # fmt: skip
    shown = [(9_000 + i, 100 + i % 3, 1 + i % 5, START_US - (12 - i) * 1_700 * SECOND_US) for i in range(12)]
    done = [(9_000 + i, "watch", 4_000.0 * i, shown[i][3] + 9 * SECOND_US) for i in range(12)]
    done += [(9_003, "like", 1, shown[3][3] + 30 * SECOND_US), (9_007, "follow", 1, shown[7][3] + 8 * SECOND_US)]
    labels = label_impressions(event_tables.impressions(shown), event_tables.outcomes(done), videos)
    return DatasetState(labels, videos, creators)


def batch_events(logged: Sequence[LoggedEvent], until_us: int) -> Events:
    """Returns everything known before ``until_us``, labelled by the batch job's own function (slow but simple)."""
    first: dict[tuple[int, OutcomeType | None], LoggedEvent] = {}
    for one in sorted(logged, key=lambda one: one.time_us):
        if one.time_us < until_us:  # an event counts from one microsecond later
            first.setdefault((one.impression, one.kind), one)
    counted = [one for one in first.values() if one.time_us <= one.shown_us + views.DAY_US]
    shown = {one.impression: (one.impression, one.viewer, one.video, one.shown_us) for one in counted}
    outcome_rows = [(one.impression, str(one.kind), one.value, one.time_us) for one in counted if one.kind]
    live = label_impressions(
        event_tables.impressions(sorted(shown.values())),
        event_tables.outcomes(outcome_rows) if outcome_rows else OUTCOMES.empty_table(),
        catalogue().videos,
    )
    events = Events.from_labels(pa.concat_tables([catalogue().labels, live]))
    answered = {row[0] for row in outcome_rows}
    exposed = {one.impression: one.time_us + 1 for one in counted if one.impression not in answered}
    known = [exposed.get(i, t) for i, t in zip(events.impression_id.tolist(), events.known_us.tolist(), strict=True)]
    return replace(events, known_us=np.array(known, np.int64))


def batch_table(view: str, events: Events, until_us: int, settings: ViewSettings) -> pa.Table:
    """Returns the complete view of the batch job."""
    if view == "creator_statistics":
        contents = catalogue()
        return views.creator_statistics(events, contents.videos, contents.creators, settings, until_us)
    make = {
        "viewer_activity": views.viewer_activity, "viewer_history": views.viewer_history,
        "viewer_topic_affinity": views.viewer_topic_affinity, "video_engagement": views.video_engagement,
    }  # fmt: skip
    return make[view](events, settings, until_us)
