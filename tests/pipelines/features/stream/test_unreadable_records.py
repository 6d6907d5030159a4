"""The stream passes records that it cannot read: it parks and counts them, and computes the rows of all others."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from confluent_kafka import Producer
from prometheus_client import CollectorRegistry
from tests.support.dimensions import DIMENSIONS
from tests.support.eventlog.kafka_broker import Broker
from tests.support.pipelines.stream_fixtures import (
    SECOND_US,
    START_US,
    TTL_US,
    ReportedOutcomeFixture,
    catalogue,
    dataset_labels,
    record_of,
)

from reelway.pipelines.features.stream.engine import EmittedRows
from reelway.pipelines.features.stream.processor import StreamProcessor, StreamSettings
from reelway.pipelines.features.stream.service import StreamMetrics
from reelway.pipelines.features.stream.state import StreamState
from reelway.pipelines.features.stream.time_buckets import ENTITY_KEYS, emission_schedules
from reelway.pipelines.features.views import ViewSettings
from reelway.platform.contracts.events import OutcomeType
from reelway.platform.eventlog import EventLog, LogRecord, open_event_log
from reelway.platform.eventlog.outcome_events import decode_outcomes
from reelway.platform.eventlog.parked_records import ParkedRecord, ParkedRecords
from reelway.platform.eventlog.sqlite_log import SqliteLog

VIEWS = ViewSettings(DIMENSIONS)
NOW_US = time.time_ns() // 1000
END_US = START_US + 2 * 3_600 * SECOND_US
"""The stream's time at ``NOW_US``, two hours after the data set's end."""
BEHIND_US = NOW_US - END_US
OUTCOMES = [
    ReportedOutcomeFixture(
        impression=i, viewer=(100, 101, 200)[i % 3], video=1 + i % 6, kind=list(OutcomeType)[i % 4], value=9_000.0,
        shown_us=NOW_US - (60 - i) * 100 * SECOND_US, time_us=NOW_US - (60 - i) * 100 * SECOND_US + 7 * SECOND_US,
    )
    for i in range(60)
]  # fmt: skip


def encode(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    encoded: bytes = sink.getvalue().to_pybytes()
    return encoded


def records() -> list[LogRecord]:
    """One record per outcome, in partitions 0 and 1."""
    return [record_of([one], one.impression)._replace(partition=one.viewer % 2) for one in OUTCOMES]


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


def damaged_log(good: list[LogRecord]) -> list[LogRecord]:
    """The records with a tombstone, a text and two newer versions among them."""
    tombstone = LogRecord("tombstone", 0, good[20].time_us, b"")
    text = LogRecord("text", 0, good[30].time_us, b"hello")
    newer, typed = with_column(good[40]), with_unknown_type(good[50])
    return [*good[:20], tombstone, *good[20:30], text, *good[30:40], newer, *good[41:50], typed, *good[51:]]


class Run:
    """A stream over a log, run until it has read everything and reached ``END_US`` less its lateness."""

    def __init__(self, folder: Path, log: EventLog) -> None:
        self.parked_file = ParkedRecords(folder / "parked.db")
        self.registry = CollectorRegistry()
        state = StreamState(folder / "state.db")
        processor = StreamProcessor(
            log, state, None, VIEWS, TTL_US, StreamSettings(), lambda: NOW_US / 1e6, self.parked_file
        )
        processor.start(catalogue(), dataset_labels(), BEHIND_US)
        metrics = StreamMetrics(self.registry)
        grids_us = {view: one.grid_us for view, one in emission_schedules(VIEWS).items()}
        self.emitted: list[EmittedRows] = []
        deadline = time.monotonic() + 30
        while processor.settled_us < END_US - 60 * SECOND_US:
            assert time.monotonic() < deadline, f"the watermark stays at {processor.settled_us}"
            done = processor.run_micro_batch(wait_s=0.1)
            metrics.record_batch(done, processor, NOW_US / 1e6, grids_us)
            self.emitted += done.emitted
        self.result_counts = dict(processor.engine.result_counts)
        state.close()

    def rows(self) -> dict[tuple[str, int, int], dict[str, Any]]:
        """All rows of the first two hours, by view, entity and time."""
        return {
            (one.view, row[ENTITY_KEYS[one.view]], time_us): row
            for one in self.emitted
            for row in one.rows.to_pylist()
            if (time_us := int(row["event_timestamp"].timestamp() * 1e6)) < END_US - 60 * SECOND_US
        }

    def parked(self) -> list[ParkedRecord]:
        return self.parked_file.records()

    def parked_total(self, kind: str) -> float | None:
        return self.registry.get_sample_value("reelway_stream_parked_records_total", {"kind": kind})


@pytest.fixture
def clean(tmp_path: Path) -> Run:
    """The stream over the same outcomes without unreadable records."""
    log = SqliteLog(tmp_path / "clean.db", clock=lambda: NOW_US / 1e6)
    log.append([record._replace(partition=0) for record in records()])
    (tmp_path / "clean").mkdir()
    run = Run(tmp_path / "clean", log)
    assert run.parked() == []
    assert run.result_counts["applied"] == 60
    return run


@pytest.fixture
def topic_log(broker: Broker) -> Iterator[EventLog]:
    """A topic whose partition 2 was emptied by retention."""
    log = open_event_log(f"kafka://{broker.servers}/{broker.topic(3)}")
    log.append([LogRecord(str(i), 2, START_US, b"old") for i in range(5)])
    broker.delete_records(log.name, 2, 5)
    yield log
    log.close()


def test_stream_on_sqlite_parks_unreadable_records(tmp_path: Path, clean: Run) -> None:
    log = SqliteLog(tmp_path / "log.db", clock=lambda: NOW_US / 1e6)
    log.append([record._replace(partition=0) for record in damaged_log(records())])
    run = Run(tmp_path, log)
    assert [(one.log, one.partition, one.offset, one.kind) for one in run.parked()] == [
        (log.name, 0, 21, "empty"), (log.name, 0, 32, "unreadable"), (log.name, 0, 53, "unknown_type"),
    ]  # fmt: skip
    assert [one.payload for one in run.parked()][:2] == [b"", b"hello"]
    assert run.parked()[2].reason == "1 outcomes have unknown types: ['mute_audio']"
    assert [run.parked_total(kind) for kind in ("empty", "unreadable", "unknown_type")] == [1, 1, 1]
    assert run.result_counts == clean.result_counts
    assert len(run.rows()) > 50
    assert run.rows() == clean.rows()


@pytest.mark.long
@pytest.mark.kafka
def test_stream_on_kafka_parks_unreadable_records(
    tmp_path: Path, clean: Run, broker: Broker, topic_log: EventLog
) -> None:
    """Tombstone and text are by another producer, and partition 2 holds no record any more."""
    producer = Producer({"bootstrap.servers": broker.servers})
    for record in damaged_log(records()):
        if record.id in ("tombstone", "text"):
            producer.produce(
                topic_log.name, record.payload or None, partition=record.partition, timestamp=record.time_us // 1000
            )
            assert producer.flush(10) == 0
        else:
            topic_log.append([record])
    run = Run(tmp_path, topic_log)
    assert [(one.log, one.partition, one.offset, one.kind) for one in run.parked()] == [
        (topic_log.name, 0, 13, "empty"),
        (topic_log.name, 0, 21, "unreadable"),
        (topic_log.name, 0, 35, "unknown_type"),
    ]
    assert [run.parked_total(kind) for kind in ("empty", "unreadable", "unknown_type")] == [1, 1, 1]
    assert run.result_counts == clean.result_counts
    assert run.rows() == clean.rows()
