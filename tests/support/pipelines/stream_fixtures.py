"""Generated outcomes in a log, and the batch job's rows for the same outcomes at any time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pyarrow as pa
from tests.support.pipelines import event_tables

from reelway.pipelines.features import views
from reelway.pipelines.features.labels import label_impressions
from reelway.pipelines.features.stream.engine import StreamCatalogue
from reelway.pipelines.features.views import Events, ViewSettings
from reelway.platform.contracts.events import OUTCOMES, OutcomeType
from reelway.platform.eventlog import EventLog, LogRecord
from reelway.platform.eventlog.outcome_events import (
    OUTCOME_EVENT_SCHEMA,
    OUTCOME_TYPES,
    derive_outcome_ids,
    encode_outcomes,
)

SECOND_US = 1_000_000
START_US = event_tables.START_US
TTL_US = {
    "viewer_activity": 2 * views.DAY_US, "viewer_history": 90 * views.DAY_US,
    "viewer_topic_affinity": 2 * views.DAY_US, "video_engagement": 2 * views.DAY_US,
    "creator_statistics": 365 * views.DAY_US,
}  # fmt: skip


@dataclass(frozen=True)
class ReportedOutcomeFixture:
    """One outcome: its impression, type and value, and when the outcomes service received it."""

    impression: int
    viewer: int
    video: int
    kind: OutcomeType
    value: float
    shown_us: int
    time_us: int


def record_of(done: Sequence[ReportedOutcomeFixture], number: int) -> LogRecord:
    """Encodes the outcomes as one record of the log."""
    kind = np.array([OUTCOME_TYPES.index(one.kind) for one in done], np.int64)
    impression = np.array([one.impression for one in done], np.int64)
    n = len(done)
    columns = {
        "outcome_id": derive_outcome_ids(impression, kind), "impression_id": impression, "request_id": impression,
        "viewer_id": [one.viewer for one in done], "video_id": [one.video for one in done], "position": [0] * n,
        "shown_at": [one.shown_us for one in done], "release": ["r"] * n, "arm": ["stable"] * n,
        "source": ["ann"] * n, "propensity": [1.0] * n, "type": [str(one.kind) for one in done],
        "value": [one.value for one in done], "event_time": [one.time_us for one in done], "done_at": [None] * n,
        "creator_id": [None] * n, "topic": [None] * n, "duration_ms": [None] * n,
        "rollout": [None] * n, "weight": [None] * n, "slices": [None] * n,
    }  # fmt: skip
    arrays = [
        pa.array(columns[f.name]).cast(pa.int64()).cast(f.type)
        if pa.types.is_timestamp(f.type)
        else pa.array(columns[f.name]).cast(f.type)
        for f in OUTCOME_EVENT_SCHEMA
    ]
    batch = pa.RecordBatch.from_arrays(arrays, schema=OUTCOME_EVENT_SCHEMA)
    (record,) = encode_outcomes(batch, 1, done[0].time_us, 1 << 20)
    return record._replace(id=str(number))


def append(log: EventLog, batches: Sequence[Sequence[ReportedOutcomeFixture]]) -> None:
    log.append([record_of(batch, number) for number, batch in enumerate(batches) if batch])


@cache
def catalogue() -> StreamCatalogue:
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
    return StreamCatalogue.of(videos, creators)


def dataset_labels() -> pa.Table:
    """Returns a few labelled impressions before ``START_US``."""
    shown = [(9_000 + i, 100 + i % 3, 1 + i % 5, START_US - (12 - i) * 1_700 * SECOND_US) for i in range(12)]
    done = [(9_000 + i, "watch", 4_000.0 * i, shown[i][3] + 9 * SECOND_US) for i in range(12)]
    done += [(9_003, "like", 1, shown[3][3] + 30 * SECOND_US), (9_007, "follow", 1, shown[7][3] + 8 * SECOND_US)]
    return label_impressions(event_tables.impressions(shown), event_tables.outcomes(done), catalogue().videos)


def batch_events(done: Sequence[ReportedOutcomeFixture], until_us: int, labels: pa.Table) -> Events:
    """Returns everything known before ``until_us``, labelled by the batch job's own function (slow but simple)."""
    first: dict[tuple[int, OutcomeType], ReportedOutcomeFixture] = {}
    for one in sorted(done, key=lambda one: one.time_us):
        if one.time_us < until_us:  # an outcome counts from one microsecond later
            first.setdefault((one.impression, one.kind), one)
    counted = [one for one in first.values() if one.time_us <= one.shown_us + views.DAY_US]
    shown = {one.impression: (one.impression, one.viewer, one.video, one.shown_us) for one in counted}
    outcome_rows = [(one.impression, str(one.kind), one.value, one.time_us) for one in counted]
    live = label_impressions(
        event_tables.impressions(sorted(shown.values())),
        event_tables.outcomes(outcome_rows) if outcome_rows else OUTCOMES.empty_table(),
        catalogue().videos,
    )
    return Events.from_labels(pa.concat_tables([labels, live]))


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
