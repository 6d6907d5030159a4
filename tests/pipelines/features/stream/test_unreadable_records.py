"""The stream passes records that it cannot read: it parks and counts them, and computes the rows of all others."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
from prometheus_client import CollectorRegistry
from tests.support.dimensions import DIMENSIONS
from tests.support.pipelines.stream_fixtures import (
    SECOND_US,
    START_US,
    TTL_US,
    LoggedEvent,
    SteppedClock,
    catalogue,
    open_logs,
    record_of,
)

from reelway.pipelines.features.stream.entity_views import EmittedRows
from reelway.pipelines.features.stream.local_stream import LocalStream
from reelway.pipelines.features.stream.metrics import StreamMetrics
from reelway.pipelines.features.stream.service import record_batch
from reelway.pipelines.features.stream.sqlite_store import SqliteStore
from reelway.pipelines.features.stream.time_buckets import ENTITY_KEYS
from reelway.pipelines.features.stream.video_facts import VideoFacts
from reelway.pipelines.features.views import ViewSettings
from reelway.platform.contracts.events import OutcomeType
from reelway.platform.eventlog import LogRecord
from reelway.platform.eventlog.outcome_events import decode_outcomes
from reelway.platform.eventlog.parked_records import ParkedRecord, ParkedRecords
from reelway.platform.eventlog.topics import Topic

VIEWS = ViewSettings(DIMENSIONS)
END_US = START_US + 2 * 3_600 * SECOND_US
OUTCOMES = [
    LoggedEvent(
        impression=i, viewer=(100, 101, 200)[i % 3], video=1 + i % 6, kind=list(OutcomeType)[i % 4], value=9_000.0,
        shown_us=END_US - (60 - i) * 100 * SECOND_US, time_us=END_US - (60 - i) * 100 * SECOND_US + 7 * SECOND_US,
    )
    for i in range(60)
]  # fmt: skip
TimedRecord = tuple[int, LogRecord]
"""Append time and record."""


def encode(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    encoded: bytes = sink.getvalue().to_pybytes()
    return encoded


def records() -> list[TimedRecord]:
    """One record per outcome."""
    return [(one.time_us, record_of([one], one.impression)) for one in OUTCOMES]


def with_column(record: LogRecord) -> LogRecord:
    """The record as a newer version writes it."""
    table = decode_outcomes(record.payload)
    return record._replace(payload=encode(table.append_column("device", pa.array(["phone"] * table.num_rows))))


def with_unknown_type(record: LogRecord) -> LogRecord:
    """The record, followed by the same outcome with a type of a newer version."""
    table = decode_outcomes(record.payload)
    index = table.schema.get_field_index("type")
    types = pa.array(["mute_audio"] * table.num_rows).cast(table.schema.field("type").type)
    other = table.set_column(index, table.schema.field("type"), types)
    return record._replace(payload=encode(pa.concat_tables([table, other]).unify_dictionaries()))


def damaged_log(good: list[TimedRecord]) -> list[TimedRecord]:
    """The records with a tombstone, a text and two newer versions among them."""
    tombstone = (good[20][0], LogRecord("tombstone", 0, b""))
    text = (good[30][0], LogRecord("text", 0, b"hello"))
    newer, typed = (good[40][0], with_column(good[40][1])), (good[50][0], with_unknown_type(good[50][1]))
    return [*good[:20], tombstone, *good[20:30], text, *good[30:40], newer, *good[41:50], typed, *good[51:]]


class Run:
    """A stream over a log of outcomes, run until it has read everything and reached ``END_US``."""

    def __init__(self, folder: Path, timed: list[TimedRecord]) -> None:
        clock = SteppedClock(0)
        logs = open_logs(folder, clock)
        for clock.now_us, record in timed:
            logs[Topic.OUTCOMES].append([record])
        clock.now_us = END_US
        self.log_name = logs[Topic.OUTCOMES].name
        self.parked_file = ParkedRecords(folder / "parked.db")
        self.registry = CollectorRegistry()
        store = SqliteStore(folder / "state.db")
        stream = LocalStream(
            logs, store, None, VIEWS, TTL_US, VideoFacts(Path("absent")), parked=self.parked_file, clock=clock
        )
        stream.start(catalogue, 0)
        metrics = StreamMetrics(self.registry)
        self.emitted: list[EmittedRows] = []
        self.results: Counter[tuple[str, str]] = Counter()
        while (done := stream.run_micro_batch(wait_s=0)).records or done.steps:
            record_batch(metrics, done)
            self.emitted += done.emitted
            self.results += done.results
        assert stream.settled_us == END_US
        store.close()
        for log in logs.values():
            log.close()

    def rows(self) -> dict[tuple[str, int, int], dict[str, Any]]:
        """All rows by view, entity and time."""
        return {
            (one.view, row[ENTITY_KEYS[one.view]], int(row["event_timestamp"].timestamp() * 1e6)): row
            for one in self.emitted
            for row in one.rows.to_pylist()
        }

    def parked(self) -> list[ParkedRecord]:
        return self.parked_file.records()

    def parked_total(self, kind: str) -> float | None:
        return self.registry.get_sample_value("reelway_stream_parked_records_total", {"kind": kind})


def test_stream_parks_unreadable_records(tmp_path: Path) -> None:
    clean = Run(tmp_path / "clean", records())
    assert clean.parked() == []
    assert clean.results["outcomes", "applied"] == 60
    run = Run(tmp_path / "damaged", damaged_log(records()))
    assert [(one.log, one.partition, one.offset, one.kind) for one in run.parked()] == [
        (run.log_name, 0, 21, "empty"), (run.log_name, 0, 32, "unreadable"), (run.log_name, 0, 53, "unknown_type"),
    ]  # fmt: skip
    assert [one.payload for one in run.parked()][:2] == [b"", b"hello"]
    assert run.parked()[2].reason == "1 outcomes have unknown types: ['mute_audio']"
    assert [run.parked_total(kind) for kind in ("empty", "unreadable", "unknown_type")] == [1, 1, 1]
    assert run.results == clean.results
    assert len(run.rows()) > 50
    assert run.rows() == clean.rows()
