"""The stream and the batch job produce the same rows at the same times, for any order of outcomes and any crash."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from tests.support.dimensions import DIMENSIONS
from tests.support.pipelines.stream_fixtures import (
    START_US,
    TTL_US,
    ReportedOutcomeFixture,
    batch_events,
    batch_table,
    catalogue,
    dataset_labels,
    record_of,
)

from reelway.pipelines.features import views
from reelway.pipelines.features.labels import times_us
from reelway.pipelines.features.stream.due_times import due_and_next
from reelway.pipelines.features.stream.engine import EmittedRows
from reelway.pipelines.features.stream.processor import StreamProcessor, StreamSettings
from reelway.pipelines.features.stream.service import StreamMetrics
from reelway.pipelines.features.stream.state import StreamState
from reelway.pipelines.features.stream.time_buckets import ENTITY_KEYS, STREAMED, emission_schedules
from reelway.pipelines.features.views import ViewSettings
from reelway.platform.contracts.events import OutcomeType
from reelway.platform.eventlog.sqlite_log import SqliteLog

SECOND_US = 1_000_000
LATENESS_S = 120.0
VIEWS = ViewSettings(DIMENSIONS)
LABELS = dataset_labels()
SPANS_S = (1, 7, 600, 4_000, 50_000, 100_000)


@st.composite
def histories(draw: st.DrawFn) -> list[ReportedOutcomeFixture]:
    """Draws outcomes of a few impressions, sorted by time; some are repeated, some are after the horizon."""
    done = []
    shown_us = START_US
    for impression in range(draw(st.integers(1, 7))):
        shown_us += draw(st.sampled_from(SPANS_S)) * SECOND_US + draw(st.integers(0, 3)) * 250_000
        viewer, video = draw(st.sampled_from([100, 101, 200])), draw(st.sampled_from([1, 2, 3, 4, 5, 6]))
        time_us = shown_us
        for kind in draw(st.lists(st.sampled_from(list(OutcomeType)), min_size=1, max_size=4)):
            time_us += draw(st.sampled_from([0, 250_000, 3 * SECOND_US, 3_700 * SECOND_US, 90_000 * SECOND_US]))
            value = draw(st.sampled_from([0.0, 3_000.0, 25_000.25])) if kind is OutcomeType.WATCH else 1.0
            done.append(ReportedOutcomeFixture(impression + 1, viewer, video, kind, value, shown_us, time_us))
    return sorted(done, key=lambda outcome: outcome.time_us)


class Clock:
    now_us = START_US

    def __call__(self) -> float:
        return self.now_us / 1e6


def stream(
    folder: Path, batches: list[list[ReportedOutcomeFixture]], ends_us: list[int], *, crashes: bool = False
) -> list[EmittedRows]:
    """Returns the rows that the stream emitted. With ``crashes``, a new processor runs every micro-batch."""
    clock, emitted = Clock(), []
    log, state = SqliteLog(folder / "log.db", clock=clock), StreamState(folder / "state.db")
    processor: StreamProcessor | None = None
    for number, (batch, end_us) in enumerate(zip(batches, ends_us, strict=True)):
        append_one(log, batch, number)
        clock.now_us = end_us
        if processor is None or crashes:
            state.close()
            state = StreamState(folder / "state.db")
            processor = StreamProcessor(
                log, state, None, VIEWS, TTL_US, StreamSettings(LATENESS_S, max_records=3), clock
            )
            processor.start(catalogue(), LABELS, behind_us=0)
        emitted += processor.run_micro_batch(wait_s=0).emitted
    assert processor is not None
    while (done := processor.run_micro_batch(wait_s=0)).steps or done.outcomes:
        emitted += done.emitted
    state.close()
    log.close()
    return emitted


def append_one(log: SqliteLog, batch: list[ReportedOutcomeFixture], number: int) -> None:
    if batch:
        log.append([record_of(batch, number)])


def by_moment(emitted: list[EmittedRows]) -> dict[tuple[str, int, int], dict[str, Any]]:
    rows = {}
    for chunk in emitted:
        for row in chunk.rows.to_pylist():
            key = (chunk.view, row[ENTITY_KEYS[chunk.view]], int(row["event_timestamp"].timestamp() * 1e6))
            assert key not in rows, f"{key} was written twice"
            rows[key] = row
    return rows


def expected_rows(
    done: list[ReportedOutcomeFixture], first_us: int, last_us: int
) -> dict[tuple[str, int, int], dict[str, Any]]:
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
        events = batch_events(done, from_us + 1, LABELS)
        for view in STREAMED:
            table = batch_table(view, events, to_us, VIEWS)
            at_us = times_us(table["event_timestamp"])
            for row in table.filter(pa.array((at_us > from_us) & (at_us <= to_us))).to_pylist():
                rows[view, row[ENTITY_KEYS[view]], int(row["event_timestamp"].timestamp() * 1e6)] = row
    return rows


def without_expiries(rows: dict[tuple[str, int, int], dict[str, Any]]) -> dict[tuple[str, int, int], dict[str, Any]]:
    key = {"viewer_id", "video_id", "creator_key", "event_timestamp", "created_timestamp"}
    return {moment: row for moment, row in rows.items() if any(v is not None for n, v in row.items() if n not in key)}


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(done=histories(), data=st.data())
def test_stream_rows_equal_batch_rows_for_any_order_with_crashes(
    done: list[ReportedOutcomeFixture], data: st.DataObject
) -> None:
    """Outcomes arrive in any order within the allowed lateness, in batches of any size, with crashes between them."""
    jitter = [data.draw(st.integers(0, int(LATENESS_S) - 1)) for _ in done]
    arrivals = sorted(range(len(done)), key=lambda i: (done[i].time_us + jitter[i] * SECOND_US, i))
    batches: list[list[ReportedOutcomeFixture]] = []
    ends: list[int] = []
    for i in arrivals:
        came_us = done[i].time_us + jitter[i] * SECOND_US
        if batches and data.draw(st.booleans()):
            batches[-1].append(done[i])
            ends[-1] = max(ends[-1], came_us)
        else:
            batches.append([done[i]])
            ends.append(came_us)
    tail_us = ends[-1] + data.draw(st.sampled_from([200, 4_000, 200_000])) * SECOND_US
    batches.append([])
    ends.append(tail_us)
    first_us = -(-int(max(times_us(LABELS["outcome_time"])) + 1) // SECOND_US) * SECOND_US
    with tempfile.TemporaryDirectory() as folder:
        emitted = stream(Path(folder), batches, ends, crashes=data.draw(st.booleans()))
    last_us = (tail_us - int(LATENESS_S * SECOND_US)) // SECOND_US * SECOND_US
    actual, expected = without_expiries(by_moment(emitted)), expected_rows(done, first_us, last_us)
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


def test_metrics_count_outcomes_by_result(tmp_path: Path) -> None:
    clock = Clock()
    log, state = SqliteLog(tmp_path / "log.db", clock=clock), StreamState(tmp_path / "state.db")
    like = ReportedOutcomeFixture(1, 100, 1, OutcomeType.LIKE, 1.0, START_US, START_US + SECOND_US)
    for number in range(2):
        append_one(log, [like], number)
    append_one(log, [ReportedOutcomeFixture(2, 101, 99, OutcomeType.LIKE, 1.0, START_US, START_US + 2 * SECOND_US)], 2)
    processor = StreamProcessor(log, state, None, VIEWS, TTL_US, StreamSettings(LATENESS_S), clock)
    processor.start(catalogue(), LABELS, behind_us=0)
    clock.now_us = START_US + 600 * SECOND_US
    registry = CollectorRegistry()
    metrics = StreamMetrics(registry)
    while (done := processor.run_micro_batch(wait_s=0)).steps or done.outcomes:
        metrics.record_batch(done, processor, clock(), {"viewer_history": SECOND_US})
    state.close()
    log.close()

    def outcomes(result: str) -> float | None:
        return registry.get_sample_value("reelway_stream_outcomes_total", {"result": result})

    assert [outcomes(result) for result in ("applied", "repeated", "too_late", "unknown_video")] == [1, 1, 0, 1]
    assert registry.get_sample_value("reelway_stream_late_outcomes_total") == 0
    assert registry.get_sample_value("reelway_stream_lag_seconds") == LATENESS_S
