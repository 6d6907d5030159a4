"""A member of the stream's group: failures of its threads end it, and records that it cannot read do not stop it."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from prometheus_client import CollectorRegistry

from reelway.pipelines.features.stream.heartbeats import HeartbeatGrid, LastRead, send_heartbeats
from reelway.pipelines.features.stream.member_threads import running_threads
from reelway.pipelines.features.stream.metrics import StreamMetrics
from reelway.pipelines.features.stream.row_delivery import ViewerRowDelivery, without_errors
from reelway.platform.errors import StorageError
from reelway.platform.eventlog import LogRecord, Offsets
from reelway.platform.eventlog.sqlite_log import SqliteLog
from reelway.platform.eventlog.topics import Topic

SCHEMA = pa.schema(
    [
        pa.field("viewer_id", pa.int64()),
        pa.field("impressions_1d", pa.int64()),
        *(pa.field(name, pa.timestamp("us", tz="UTC")) for name in ("event_timestamp", "created_timestamp")),
    ]
)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def test_failure_of_a_thread_ends_the_member(registry: CollectorRegistry) -> None:
    stop, ended = threading.Event(), threading.Event()
    targets = {"fails": lambda: [][0], "waits": lambda: print(ended.wait(30))}
    with pytest.raises(IndexError), running_threads(targets, stop, ended, StreamMetrics(registry)):
        assert stop.wait(30), "the member was not asked to stop"
    assert ended.is_set()
    assert registry.get_sample_value("reelway_stream_faults_total") == 1


class UnreachableLog(SqliteLog):
    """A log whose ends cannot be read; sets ``stop`` at the third heartbeat after the failure."""

    def __init__(self, path: Path, stop: threading.Event) -> None:
        super().__init__(path)
        self._stop, self._beats_left = stop, 3

    def append(self, records: list[LogRecord]) -> list[int]:  # type: ignore[override]
        self._beats_left -= 1
        if not self._beats_left:
            self._stop.set()
        return super().append(records)

    def end_offsets(self) -> Offsets:
        raise StorageError("unreachable")


def test_heartbeats_go_on_without_the_lag(registry: CollectorRegistry, tmp_path: Path) -> None:
    stop = threading.Event()
    log = UnreachableLog(tmp_path / "log.db", stop)
    timer = threading.Timer(30, stop.set)
    timer.start()
    quiet = {(Topic.OUTCOMES, 0): LastRead(0, time.time_ns() // 1000 - 1_000_000, time.monotonic() - 1)}
    send_heartbeats({Topic.OUTCOMES: log}, lambda: quiet, HeartbeatGrid(1_000_000), StreamMetrics(registry), stop)
    assert timer.is_alive(), "the heartbeats ended with the first failure"
    timer.cancel()
    assert registry.get_sample_value("reelway_stream_faults_total") == 1
    log.close()


@dataclass(frozen=True)
class Record:
    """A message of Kafka's client, as far as a delivery reads it."""

    content: tuple[bytes, bytes | None]
    failure: str | None = None

    def key(self) -> bytes:
        return self.content[0]

    def value(self) -> bytes | None:
        return self.content[1]

    def offset(self) -> int:
        return 0

    def topic(self) -> str:
        return "rows-viewer"

    def error(self) -> str | None:
        return self.failure


class CollectedRows:
    """Sinks that keep what they are given."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.erased: list[int] = []

    def erase_viewers(self, viewer_ids: list[int]) -> None:
        self.erased += viewer_ids
        self.rows = [row for row in self.rows if row["viewer_id"] not in viewer_ids]

    def write_viewer_rows(self, view: str, rows: pa.Table) -> None:
        assert view == "viewer_activity"
        self.rows += rows.select(["viewer_id", "impressions_1d"]).to_pylist()


def row_of(viewer: int, **fields: int) -> tuple[bytes, bytes]:
    return f"viewer_activity:{viewer}".encode(), json.dumps({"at_us": 5, "fields": fields}).encode()


def test_unreadable_rows_are_skipped_and_counted(registry: CollectorRegistry) -> None:
    """A tombstone of an unknown view, a text, a row without a field of this version, and a row of an unknown view."""
    sinks = CollectedRows()
    delivery = ViewerRowDelivery(sinks, {"viewer_activity": SCHEMA}, StreamMetrics(registry))  # type: ignore[arg-type]
    unreadable = [(b"v:1", None), (b"text", b"text"), row_of(2, impressions_2d=7), (b"v:1", row_of(3)[1])]
    delivery.deliver([Record(one) for one in [*unreadable, row_of(4, impressions_1d=9)]])  # type: ignore[misc]
    assert sinks.rows == [{"viewer_id": 4, "impressions_1d": 9}]
    assert registry.get_sample_value("reelway_stream_parked_records_total", {"kind": "unreadable"}) == 4


def test_tombstone_erases_what_precedes_it(registry: CollectorRegistry) -> None:
    sinks = CollectedRows()
    delivery = ViewerRowDelivery(sinks, {"viewer_activity": SCHEMA}, StreamMetrics(registry))  # type: ignore[arg-type]
    tombstone = (b"viewer_activity:1", None)
    before, after = row_of(1, impressions_1d=7), row_of(1, impressions_1d=8)
    delivery.deliver([Record(one) for one in (before, tombstone, row_of(4, impressions_1d=9))])  # type: ignore[misc]
    assert (sinks.rows, sinks.erased) == ([{"viewer_id": 4, "impressions_1d": 9}], [1])
    delivery.deliver([Record(one) for one in (before, tombstone, after)])  # type: ignore[misc]
    assert sinks.rows[1:] == [{"viewer_id": 1, "impressions_1d": 8}]


def test_errors_of_a_read_are_counted(registry: CollectorRegistry) -> None:
    row, refused = Record(row_of(1)), Record((b"", None), "TOPIC_AUTHORIZATION_FAILED")
    assert without_errors([refused, row], "rows-viewer", StreamMetrics(registry)) == [row]  # type: ignore[list-item]
    assert registry.get_sample_value("reelway_stream_faults_total") == 1
