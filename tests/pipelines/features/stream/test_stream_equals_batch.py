"""The stream and the batch job produce the same rows at the same times, for any history and any crash."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from tests.support.dimensions import DIMENSIONS
from tests.support.pipelines.stream_fixtures import (
    START_US,
    TTL_US,
    LoggedEvent,
    SteppedClock,
    append,
    batch_events,
    batch_table,
    catalogue,
    open_logs,
    record_of,
)

from reelway.pipelines.features import views
from reelway.pipelines.features.labels import times_us
from reelway.pipelines.features.stream.due_times import due_and_next
from reelway.pipelines.features.stream.entity_views import EmittedRows
from reelway.pipelines.features.stream.local_stream import LocalStream
from reelway.pipelines.features.stream.metrics import StreamMetrics
from reelway.pipelines.features.stream.service import record_batch
from reelway.pipelines.features.stream.sqlite_store import SqliteStore
from reelway.pipelines.features.stream.time_buckets import ENTITY_KEYS, STREAMED, emission_schedules
from reelway.pipelines.features.stream.video_facts import VideoFacts
from reelway.pipelines.features.views import ViewSettings
from reelway.platform.contracts.events import OutcomeType
from reelway.platform.eventlog.topics import Topic

SECOND_US = 1_000_000
VIEWS = ViewSettings(DIMENSIONS)
NO_FACTS = VideoFacts(Path("absent"))
SPANS_S = (1, 7, 600, 4_000, 50_000, 100_000)


@st.composite
def histories(draw: st.DrawFn) -> list[LoggedEvent]:
    """Draws events of a few impressions, sorted by time.

    Some outcomes are repeated, some are after the horizon, and some precede their exposure or have none.
    """
    logged = []
    shown_us = START_US
    for impression in range(1, draw(st.integers(1, 7)) + 1):
        shown_us += draw(st.sampled_from(SPANS_S)) * SECOND_US + draw(st.integers(0, 3)) * 250_000
        viewer, video = draw(st.sampled_from([100, 101, 200])), draw(st.sampled_from([1, 2, 3, 4, 5, 6]))
        time_us = shown_us
        for kind in draw(st.lists(st.sampled_from([None, *OutcomeType]), min_size=1, max_size=4)):
            time_us += draw(st.sampled_from([0, 250_000, 3 * SECOND_US, 3_700 * SECOND_US, 90_000 * SECOND_US]))
            value = draw(st.sampled_from([0.0, 3_000.0, 25_000.25])) if kind is OutcomeType.WATCH else 1.0
            logged.append(LoggedEvent(impression, viewer, video, kind, value, shown_us, time_us))
    return sorted(logged, key=lambda event: event.time_us)


def stream(
    folder: Path, batches: list[list[LoggedEvent]], ends_us: list[int], *, crashes: bool = False
) -> list[EmittedRows]:
    """Returns the rows that the stream emitted. With ``crashes``, a new process runs every micro-batch."""
    clock, emitted = SteppedClock(START_US), []
    logs, store = open_logs(folder, clock), SqliteStore(folder / "state.db")
    running: LocalStream | None = None
    for number, (batch, end_us) in enumerate(zip(batches, ends_us, strict=True)):
        clock.now_us = end_us
        append(logs, batch, number)
        if running is None or crashes:
            store.close()
            store = SqliteStore(folder / "state.db")
            running = LocalStream(
                logs, store, None, VIEWS, TTL_US, NO_FACTS, max_records=draw_limit(number), clock=clock
            )
            running.start(catalogue, behind_us=0)
        emitted += running.run_micro_batch(wait_s=0).emitted
    assert running is not None
    while (done := running.run_micro_batch(wait_s=0)).steps or done.records:
        emitted += done.emitted
    store.close()
    for log in logs.values():
        log.close()
    return emitted


def draw_limit(number: int) -> int:
    """Returns limits of a micro-batch's records that leave some records unread."""
    return 1 + number % 3


def by_moment(emitted: list[EmittedRows]) -> dict[tuple[str, int, int], dict[str, Any]]:
    rows = {}
    for chunk in emitted:
        for row in chunk.rows.to_pylist():
            key = (chunk.view, row[ENTITY_KEYS[chunk.view]], int(row["event_timestamp"].timestamp() * 1e6))
            assert key not in rows, f"{key} was written twice"
            rows[key] = row
    return rows


def expected_rows(done: list[LoggedEvent], first_us: int, last_us: int) -> dict[tuple[str, int, int], dict[str, Any]]:
    """Returns every row of the batch job at each of its grid points, computed from the outcomes known by then.

    The known outcomes change only when an outcome arrives. So one run of the batch job is valid until the next one.
    """
    rows: dict[tuple[str, int, int], dict[str, Any]] = {}
    moments = [
        first_us,
        *sorted({outcome.time_us for outcome in done if first_us <= outcome.time_us < last_us}),
        last_us,
    ]
    for from_us, to_us in pairwise(moments):
        events = batch_events(done, from_us + 1)
        for view in STREAMED:
            table = batch_table(view, events, to_us, VIEWS)
            at_us = times_us(table["event_timestamp"])
            for row in table.filter(pa.array((at_us > from_us) & (at_us <= to_us))).to_pylist():
                rows[view, row[ENTITY_KEYS[view]], int(row["event_timestamp"].timestamp() * 1e6)] = row
    return rows


def without_expiries(rows: dict[tuple[str, int, int], dict[str, Any]]) -> dict[tuple[str, int, int], dict[str, Any]]:
    key = {"viewer_id", "video_id", "creator_key", "event_timestamp", "created_timestamp"}
    return {moment: row for moment, row in rows.items() if any(v is not None for n, v in row.items() if n not in key)}


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(done=histories(), data=st.data())
def test_stream_rows_equal_batch_rows_for_any_history_with_crashes(
    done: list[LoggedEvent], data: st.DataObject
) -> None:
    """Events are appended in batches of any size; an event's time is that of its batch."""
    batches: list[list[LoggedEvent]] = []
    for event in done:
        if batches and data.draw(st.booleans()):
            batches[-1].append(event)
        else:
            batches.append([event])
    batches = [[replace(event, time_us=batch[-1].time_us) for event in batch] for batch in batches]
    ends = [batch[-1].time_us for batch in batches]
    tail_us = ends[-1] + data.draw(st.sampled_from([200, 4_000, 200_000])) * SECOND_US
    first_us = -(-int(max(times_us(catalogue().labels["outcome_time"])) + 1) // SECOND_US) * SECOND_US
    with tempfile.TemporaryDirectory() as folder:
        emitted = stream(Path(folder), [*batches, []], [*ends, tail_us], crashes=data.draw(st.booleans()))
    logged = [event for batch in batches for event in batch]
    actual = without_expiries(by_moment(emitted))
    expected = expected_rows(logged, first_us, tail_us // SECOND_US * SECOND_US)
    assert sorted(actual) == sorted(expected)
    for key, row in expected.items():
        assert actual[key] == row, key


@pytest.mark.parametrize("view", STREAMED)
def test_next_due_time_equals_the_batch_jobs_next_point(view: str) -> None:
    rng = np.random.default_rng(5)
    schedule = emission_schedules(VIEWS)[view]
    known = START_US + rng.integers(0, 3 * views.DAY_US, 60) // 900_000_000 * 900_000_000 + rng.integers(0, 2, 60)
    owner = np.sort(rng.integers(0, 9, 60))
    entities, points_us = views.snapshot_points(
        owner, known, schedule.windows_us, grid_us=schedule.grid_us, until_us=START_US + 99 * views.DAY_US,
        heartbeat_us=schedule.heartbeat_us,
    )  # fmt: skip
    cells = (known - 1) // schedule.bucket_us * schedule.bucket_us + 1
    for moment in [START_US, *rng.choice(points_us, 40).tolist(), START_US + 40 * views.DAY_US + 1]:
        now, next_us, last_us = due_and_next(owner, cells, 9, schedule, moment)
        for entity in range(9):
            entity_points_us = points_us[entities == entity]
            assert now[entity] == (moment in entity_points_us)
            assert next_us[entity] == min(entity_points_us[entity_points_us > moment], default=1 << 62)
            assert last_us[entity] == max(entity_points_us[entity_points_us <= moment], default=-(1 << 62))


def test_metrics_count_events_by_result(tmp_path: Path) -> None:
    clock = SteppedClock(START_US + SECOND_US)
    logs, store = open_logs(tmp_path, clock), SqliteStore(tmp_path / "state.db")
    like = LoggedEvent(1, 100, 1, OutcomeType.LIKE, 1.0, START_US, START_US + SECOND_US)
    exposure = replace(like, impression=2, kind=None)
    unknown = replace(like, impression=3, viewer=101, video=99)
    late = replace(like, impression=4, shown_us=START_US - 2 * views.DAY_US)
    for number in range(2):
        append(logs, [like, exposure], number)
    append(logs, [unknown], 2)
    append(logs, [late], 3)
    running = LocalStream(logs, store, None, VIEWS, TTL_US, NO_FACTS, clock=clock)
    running.start(catalogue, behind_us=0)
    clock.now_us = START_US + 600 * SECOND_US
    registry = CollectorRegistry()
    metrics = StreamMetrics(registry, clock)
    metrics.measure_ages(0, {"viewer_history": SECOND_US})
    while (done := running.run_micro_batch(wait_s=0)).steps or done.records:
        record_batch(metrics, done)
    metrics.record_lag(running.lag_records())
    append(logs, [late], 4)
    metrics.record_lag(running.lag_records())
    clock.now_us += 7 * SECOND_US
    store.close()
    for log in logs.values():
        log.close()

    def sample(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"reelway_stream_{name}", labels)

    assert [sample("outcomes_total", result=result) for result in ("applied", "repeated", "too_late")] == [1, 1, 1]
    assert [sample("exposures_total", result=result) for result in ("applied", "repeated")] == [1, 1]
    assert sample("parked_records_total", kind="unknown_video") == 1
    assert sample("lag_seconds") == 7
    assert sample("lag_records", topic="outcomes", partition="0") == 1
    assert sample("lag_records", topic="exposures", partition="0") == 0


def test_ages_grow_from_the_partition_furthest_behind() -> None:
    clock, registry = SteppedClock(START_US + 100 * SECOND_US), CollectorRegistry()
    metrics = StreamMetrics(registry, clock)

    def ages_s() -> tuple[float | None, float | None]:
        freshness_s = registry.get_sample_value("reelway_stream_freshness_seconds", {"view": "viewer_history"})
        return registry.get_sample_value("reelway_stream_lag_seconds"), freshness_s

    grid_us = 60 * SECOND_US
    metrics.measure_ages(START_US // grid_us * grid_us, {"viewer_history": grid_us})
    began_us = START_US - START_US // grid_us * grid_us
    metrics.record_assignment([0, 1])
    metrics.record_progress(began_us + 90 * SECOND_US, 0)
    clock.now_us += 5 * SECOND_US
    assert ages_s()[0] == 15
    metrics.record_progress(began_us + 104 * SECOND_US, 0)
    assert ages_s()[0] == 5, "partition 1 has made no progress since its assignment"
    clock.now_us += 200 * SECOND_US
    assert ages_s()[0] == 205
    metrics.record_progress(120 * SECOND_US, 1)
    metrics.record_progress(125 * SECOND_US, 0)
    now_s = (began_us + 305 * SECOND_US) / SECOND_US
    assert ages_s() == (now_s - 120, now_s - 120)
    metrics.record_revocation([1])
    assert ages_s() == (now_s - 125, now_s - 120)


def test_impression_without_outcomes_counts(tmp_path: Path) -> None:
    """The viewer ignored the video: one more impression, and no change of history and affinity."""
    exposure = LoggedEvent(1, 100, 1, None, 1.0, START_US, START_US + SECOND_US)
    emitted = stream(tmp_path, [[exposure], []], [exposure.time_us, START_US + 3_600 * SECOND_US])
    rows = {(view, entity): row for (view, entity, at_us), row in by_moment(emitted).items() if at_us > START_US}
    assert rows["viewer_activity", 100]["impressions_1d"] == 5
    assert rows["video_engagement", 1]["video_impressions_1h"] == 1
    assert ("viewer_history", 100) not in rows


def test_unstamped_record_uses_the_data_sets_video(tmp_path: Path) -> None:
    """Records of older writers state neither creator nor duration."""
    pq.write_table(catalogue().videos, tmp_path / "videos.parquet")
    clock = SteppedClock(START_US + SECOND_US)
    logs, store = open_logs(tmp_path, clock), SqliteStore(tmp_path / "state.db")
    like = LoggedEvent(1, 100, 2, OutcomeType.LIKE, 1.0, START_US, clock.now_us)
    logs[Topic.OUTCOMES].append([record_of([like], 0, stamped=False)])
    clock.now_us += 3_600 * SECOND_US
    running = LocalStream(logs, store, None, VIEWS, TTL_US, VideoFacts(tmp_path / "videos.parquet"), clock=clock)
    running.start(catalogue, behind_us=0)
    done = running.run_micro_batch(wait_s=0)
    store.close()
    assert done.results["outcomes", "applied"] == 1
    (history,) = [one.rows for one in done.emitted if one.view == "viewer_history"]
    assert history["history_videos"][0].as_py()[-1] == 2
