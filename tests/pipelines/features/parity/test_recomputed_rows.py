"""Rows recomputed from a copy of the log equal those of the batch job over everything known at the time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.dimensions import DIMENSIONS
from tests.support.pipelines.stream_fixtures import (
    START_US,
    TTL_US,
    LoggedEvent,
    SteppedClock,
    batch_events,
    batch_table,
    catalogue,
    open_logs,
    record_of,
)

from reelway.pipelines.features.labels import times_us
from reelway.pipelines.features.parity.event_copy import MAX_FILES, PARTS, EventCopy
from reelway.pipelines.features.parity.impression_versions import (
    HORIZON_US,
    NEVER_US,
    dataset_versions,
    log_versions,
)
from reelway.pipelines.features.parity.run_files import RunFiles, RunTables
from reelway.pipelines.features.parity.view_rows import (
    CREATORS,
    NO_ROW_US,
    collect_events,
    creator_rule,
    recompute_rows,
    view_rules,
)
from reelway.pipelines.features.stream.clock import StreamClock
from reelway.pipelines.features.views import ViewSettings
from reelway.platform.contracts.events import OutcomeType
from reelway.platform.contracts.feature_names import VIEWS
from reelway.platform.eventlog import LogRecord
from reelway.platform.eventlog.arrow_records import encode_rows
from reelway.platform.eventlog.exposure_events import EXPOSURE_EVENT_SCHEMA
from reelway.platform.eventlog.outcome_events import OUTCOME_EVENT_SCHEMA
from reelway.platform.eventlog.sqlite_log import SqliteLog
from reelway.platform.eventlog.topics import Topic

SECOND_US = 1_000_000
SETTINGS = ViewSettings(DIMENSIONS)
LABELS = catalogue().labels
CLOCK = StreamClock(began_us=START_US, behind_us=0)
HEARTBEATS = {
    topic: encode_rows(pa.RecordBatch.from_arrays([pa.array([], f.type) for f in schema], schema=schema))
    for topic, schema in ((Topic.EXPOSURES, EXPOSURE_EVENT_SCHEMA), (Topic.OUTCOMES, OUTCOME_EVENT_SCHEMA))
}
IDS = {"viewer_id": [100, 101, 102, 200], "video_id": [1, 2, 3, 4, 5, 6], "creator_id": [7, 8, 9]}


def tables() -> RunTables:
    known = catalogue()
    return RunTables(LABELS.slice(0, 0), known.videos, known.creators, SETTINGS, TTL_US, CLOCK, None)


@pytest.fixture(autouse=True)
def _no_memory_files() -> Iterator[None]:
    yield
    fsspec.filesystem("memory").store.clear()


@st.composite
def histories(draw: st.DrawFn) -> list[LoggedEvent]:
    """Exposures and outcomes by append time, which need not be the order of their impressions."""
    done, shown_us = [], START_US
    for impression in range(draw(st.integers(1, 8))):
        shown_us += draw(st.sampled_from((1, 7, 600, 4_000, 50_000, 100_000))) * SECOND_US
        viewer, video = draw(st.sampled_from([100, 101, 200])), draw(st.sampled_from([1, 2, 3, 4, 5, 6]))
        time_us = shown_us
        for kind in draw(st.lists(st.sampled_from([None, *OutcomeType]), min_size=1, max_size=5)):
            time_us += draw(st.sampled_from([0, 250_000, 3 * SECOND_US, 3_700 * SECOND_US, 90_000 * SECOND_US]))
            value = draw(st.sampled_from([0.0, 3_000.0, 25_000.25])) if kind is OutcomeType.WATCH else 1.0
            done.append(LoggedEvent(impression + 1, viewer, video, kind, value, shown_us, time_us))
    return sorted(done, key=lambda event: event.time_us)


def copied(done: Sequence[LoggedEvent], folder: Path, *, stamped: bool = True) -> list[pa.Table]:
    """Returns the parts of a copy of logs that have one record per event and heartbeats, copied in two steps."""
    clock = SteppedClock(START_US)
    files, logs = RunFiles(f"memory://{folder.name}"), open_logs(folder, clock)
    copies = {topic: EventCopy(files, topic) for topic in logs}
    offsets, number = {topic: {} for topic in logs}, 0
    for some in (done[: len(done) // 2], done[len(done) // 2 :]):
        for i, one in enumerate(some):
            clock.now_us = one.time_us
            topic = Topic.OUTCOMES if one.kind else Topic.EXPOSURES
            logs[topic].append([record_of([one], 1_000 * number + i, stamped=stamped)])
            logs[topic].append([LogRecord(f"heartbeat {number} {i}", 0, HEARTBEATS[topic])])
        for topic, log in logs.items():
            for at, _, following in copies[topic].copy_new(log, offsets[topic], {}, number):
                offsets[topic], number = at, following
    for log in logs.values():
        log.close()
    return [
        pa.concat_tables([copy.read_part(part, everything) for copy in copies.values()]).combine_chunks()
        for part in range(PARTS)
    ]


def everything(batch: pa.RecordBatch) -> np.ndarray:
    return np.ones(batch.num_rows, dtype=np.bool_)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(histories(), st.booleans(), st.lists(st.integers(0, 40 * 24 * 3_600), min_size=1, max_size=4))
def test_recomputed_rows_equal_those_of_the_batch_job(
    done: list[LoggedEvent], stamped: bool, after_s: list[int]
) -> None:
    known = tables()
    rules = view_rules(SETTINGS, TTL_US)
    rules[CREATORS] = creator_rule(SETTINGS, known.videos, known.creators)
    with tempfile.TemporaryDirectory() as folder:
        parts = [
            log_versions(rows, known, CLOCK) for rows in copied(done, Path(folder), stamped=stamped) if rows.num_rows
        ]
    wanted = [(rule, np.array(IDS[rule.key], np.int64)) for rule in rules.values()]
    events = collect_events(wanted, [dataset_versions(LABELS), *parts])
    for rule, ids in wanted:
        for moment_us in (START_US + seconds * SECOND_US for seconds in after_s):
            at_us = np.full(len(ids), moment_us)
            found = recompute_rows(rule, events[rule.view], SETTINGS, known, ids, at_us)
            expected = batch_rows(rule.view, done, moment_us // rule.grid_us * rule.grid_us)
            for i, entity in enumerate(ids.tolist()):
                row = expected.get(entity)
                if row is not None and moment_us - row["at_us"] > TTL_US[rule.view]:
                    row = None
                got = found.values.slice(i, 1).to_pylist()[0]
                assert found.row_us[i] == (NO_ROW_US if row is None else row["at_us"]), (rule.view, entity)
                fields = {name: None if row is None else row[name] for name in VIEWS[rule.view]}
                assert got == fields, (rule.view, entity)


def batch_rows(view: str, done: list[LoggedEvent], until_us: int) -> dict[int, dict]:
    """Returns the last row of each entity that the batch job would write at this time."""
    table = batch_table(view, batch_events(done, until_us), until_us, SETTINGS)
    key = {"creator_statistics": "creator_key", "video_engagement": "video_id"}.get(view, "viewer_id")
    rows = table.append_column("at_us", pa.array(times_us(table["event_timestamp"]))).to_pylist()
    return {row[key]: row for row in sorted(rows, key=lambda row: row["at_us"]) if row["at_us"] <= until_us}


def versions_of(done: list[LoggedEvent], folder: Path) -> list[tuple[int, int, int, int]]:
    """Returns impression, like, and the times from which and until which each version counts."""
    rows = pa.concat_tables(copied(done, folder)).combine_chunks()
    found = log_versions(rows, tables(), CLOCK)
    columns = found.events.impression_id, found.events.like, found.events.known_us, found.end_us
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_exposure_is_an_impression_until_its_first_outcome(tmp_path: Path) -> None:
    shown_us, like = START_US + 100 * SECOND_US, OutcomeType.LIKE
    done = [
        LoggedEvent(1, 100, 3, None, 1.0, shown_us, shown_us + SECOND_US),
        LoggedEvent(2, 100, 4, None, 1.0, shown_us, shown_us + 2 * SECOND_US),
        LoggedEvent(1, 100, 3, like, 1.0, shown_us, shown_us + 9 * SECOND_US),
    ]
    assert versions_of(done, tmp_path) == [
        (1, 0, shown_us + SECOND_US + 1, shown_us + 9 * SECOND_US + 1),
        (1, 1, shown_us + 9 * SECOND_US + 1, NEVER_US),
        (2, 0, shown_us + 2 * SECOND_US + 1, NEVER_US),
    ]


def test_exposure_after_an_outcome_or_the_horizon_does_not_count(tmp_path: Path) -> None:
    shown_us, like = START_US + 100 * SECOND_US, OutcomeType.LIKE
    done = [
        LoggedEvent(1, 100, 3, like, 1.0, shown_us, shown_us + SECOND_US),
        LoggedEvent(1, 100, 3, None, 1.0, shown_us, shown_us + 9 * SECOND_US),
        LoggedEvent(2, 100, 4, None, 1.0, shown_us, shown_us + HORIZON_US + 1),
    ]
    assert versions_of(done, tmp_path) == [(1, 1, shown_us + SECOND_US + 1, NEVER_US)]


def test_copy_joins_many_files_without_losing_an_event(tmp_path: Path) -> None:
    files, log = RunFiles("memory://joined"), SqliteLog(tmp_path / "log.db")
    copy, offsets, number = EventCopy(files, Topic.OUTCOMES), {}, 0
    for i in range(MAX_FILES + 5):
        log.append([record_of([LoggedEvent(i, 100, 1, OutcomeType.LIKE, 1.0, START_US, START_US + i)], i)])
        for at, _, following in copy.copy_new(log, offsets, {}, number):
            offsets, number = at, following
    copy.join_files(number)
    names = [name for part in range(PARTS) for name in files.names(f"parity/events/outcomes/{part:02d}")]
    assert len(names) < MAX_FILES
    rows = [copy.read_part(part, everything) for part in range(PARTS)]
    assert pa.concat_tables(rows)["impression_id"].to_pylist() == list(range(MAX_FILES + 5))
