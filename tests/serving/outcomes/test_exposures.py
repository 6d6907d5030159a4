"""Slates in the event log: their rows, repeated appends, and lost slates."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tests.support.serving.raw_events import NOW, RELEASES, ShownImpression, slate_of

from reelway.platform.contracts.events import Arm
from reelway.platform.errors import StorageError
from reelway.platform.eventlog import LogRecord, StoredRecord
from reelway.platform.eventlog.arrow_records import encode_rows
from reelway.platform.eventlog.exposure_events import EXPOSURE_EVENT_SCHEMA, decode_exposures
from reelway.platform.eventlog.sqlite_log import SqliteLog
from reelway.serving.outcomes import ArmKey, ExposureWriter, SlateExposure
from reelway.serving.outcomes.exposure_writer import MAX_ROWS_PER_APPEND
from reelway.serving.outcomes.exposures import exposure_rows
from reelway.serving.outcomes.log_rows import read_exposure_rows
from reelway.serving.stages.arrays import SOURCES


def slate(request_id: int, videos: int = 3) -> SlateExposure:
    """A slate outside of any rollout, whose values all differ."""
    ids = np.arange(videos) + 100 * request_id
    return SlateExposure(
        request_id, request_id + 1, ArmKey("", Arm.STABLE, "ab" * 32), 0.0, NOW, NOW - 5, "tv", "eu", None,
        impression_id=ids, video_id=ids + 1, slices=np.zeros(videos, np.int8), source=np.arange(videos) % len(SOURCES),
        score=np.arange(videos, dtype=np.float32), propensity=np.full(videos, 0.5, np.float32),
        creator_id=ids + 2, topic=np.arange(videos, dtype=np.int32), duration_ms=np.full(videos, 9_000, np.int32),
    )  # fmt: skip


class FailingLog(SqliteLog):
    """A log that fails the next ``failures`` appends, before or after the records are on disk."""

    failures = 0
    after_append = False

    def append(self, records: Sequence[LogRecord]) -> list[int]:
        if self.failures and not self.after_append:
            self.failures -= 1
            raise StorageError("no space left on device")
        offsets = super().append(records)
        if self.failures:
            self.failures -= 1
            raise StorageError("the acknowledgement was lost")
        return offsets


class Writing:
    """A writer with its log and the slates it lost."""

    def __init__(self, path: Path, *, retry_for_s: float = 10.0, max_queued_rows: int = 1_000) -> None:
        self.path = path
        self.log = FailingLog(path)
        self.lost: list[int] = []
        self.writer = ExposureWriter(
            lambda: self.log,
            lambda slate: self.lost.append(slate.request_id),
            append_every_s=0.0,
            retry_for_s=retry_for_s,
            retry_delay_s=0.01,
            max_queued_rows=max_queued_rows,
        )

    def logged(self) -> pa.Table:
        log = SqliteLog(self.path)
        tables = [decode_exposures(record.payload) for record in log.read({}, limit=1_000).records]
        log.close()
        return pa.concat_tables([EXPOSURE_EVENT_SCHEMA.empty_table(), *tables])

    def requests(self) -> list[int]:
        return list(dict.fromkeys(self.logged()["request_id"].to_pylist()))


@pytest.fixture
def writing(tmp_path: Path) -> Writing:
    return Writing(tmp_path / "exposures.db")


def test_rows_hold_everything_about_a_slate() -> None:
    canary = slate_of(ShownImpression(11, 4, Arm.CANARY, 0.75, 5))
    rows = exposure_rows([slate(1), canary, replace(slate(2, videos=1), region=None, language="en")])
    assert rows.schema == EXPOSURE_EVENT_SCHEMA
    rows.validate(full=True)
    assert rows.column("request_id").to_pylist() == [1, 1, 1, 11, 2]
    assert rows.column("position").to_pylist() == [0, 1, 2, 0, 0]
    assert rows.column("impression_id").to_pylist() == [100, 101, 102, 11, 200]
    assert rows.column("source").to_pylist() == [*SOURCES[:3], SOURCES[0], SOURCES[0]]
    assert rows.column("region").to_pylist() == ["eu", "eu", "eu", None, None]
    assert rows.column("language").to_pylist() == [None, None, None, None, "en"]
    first, shown = rows.to_pylist()[1], rows.to_pylist()[3]
    times = [first[name].timestamp() for name in ("shown_at", "request_time")]
    assert times == [NOW, NOW - 5]
    assert (first["video_id"], first["creator_id"], first["topic"], first["score"]) == (102, 103, 1, 1.0)
    assert (first["rollout"], first["device"], first["duration_ms"]) == ("", "tv", 9_000)
    assert (shown["rollout"], shown["arm"], shown["release"]) == ("r-1", "canary", RELEASES[Arm.CANARY])
    assert (shown["weight"], shown["slices"], shown["viewer_id"]) == (0.75, 5, 4)


def test_close_appends_the_queued_slates(writing: Writing) -> None:
    for request in range(50):
        writing.writer.record(slate(request))
    writing.writer.record(slate(99, videos=0))
    writing.writer.close()
    assert writing.requests() == list(range(50))
    assert not writing.lost


@pytest.mark.parametrize("after_append", [False, True])
def test_failed_append_is_repeated_with_the_same_ids(writing: Writing, after_append: bool) -> None:
    writing.log.after_append, writing.log.failures = after_append, 3
    writing.writer.record(slate(1))
    deadline = time.monotonic() + 10
    while writing.log.failures:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    writing.writer.close()
    assert writing.logged()["impression_id"].to_pylist() == [100, 101, 102], "once, however often it was sent"
    assert not writing.lost


def test_log_that_cannot_be_opened_is_opened_later(tmp_path: Path) -> None:
    failures = [StorageError("no broker"), StorageError("no broker")]

    def open_log() -> SqliteLog:
        if failures:
            raise failures.pop()
        return SqliteLog(tmp_path / "exposures.db")

    lost: list[SlateExposure] = []
    writer = ExposureWriter(open_log, lost.append, retry_delay_s=0.01)
    writer.record(slate(1))
    deadline = time.monotonic() + 10
    while failures:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    writer.close()
    assert not lost
    assert Writing(tmp_path / "exposures.db").requests() == [1]


def test_slates_are_lost_after_the_last_repetition(tmp_path: Path) -> None:
    writing = Writing(tmp_path / "exposures.db", retry_for_s=0.05)
    writing.log.failures = 1_000
    writing.writer.record(slate(1))
    deadline = time.monotonic() + 10
    while not writing.lost:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    writing.log.failures = 0
    writing.writer.record(slate(2))
    writing.writer.close()
    assert (writing.lost, writing.requests()) == ([1], [2])


def test_full_queue_loses_slates(tmp_path: Path) -> None:
    resume = threading.Event()

    class WaitingLog(SqliteLog):
        def append(self, records: Sequence[LogRecord]) -> list[int]:
            assert resume.wait(10)
            return super().append(records)

    lost: list[int] = []
    log = WaitingLog(tmp_path / "exposures.db")
    writer = ExposureWriter(lambda: log, lambda slate: lost.append(slate.request_id), max_queued_rows=6)
    for request in range(4):
        writer.record(slate(request))
    resume.set()
    writer.close()
    assert lost == [2, 3]
    assert Writing(tmp_path / "exposures.db").requests() == [0, 1]


def test_shutdown_counts_what_it_cannot_append(writing: Writing) -> None:
    writing.log.failures = 1_000_000
    for request in range(20):
        writing.writer.record(slate(request))
    started = time.monotonic()
    writing.writer.close()
    assert time.monotonic() - started < 5, "without the repetitions of a running router"
    assert sorted(writing.lost) == list(range(20))
    writing.writer.record(slate(20))
    assert 20 in writing.lost, "a router that has closed its log"


def test_largest_append_is_one_record(tmp_path: Path) -> None:
    """A slate whose rows were in two records would be counted for its first record only."""
    rng = np.random.default_rng(0)
    slates = [
        replace(
            slate(request, videos=100),
            viewer_id=int(rng.integers(2**53)), request_id=int(rng.integers(2**53)), shown_at_s=NOW + rng.random(),
            device=f"{request:064d}", region=f"{request:064d}", language=f"{request:064d}",
            **{name: rng.integers(0, 2**53, 100) for name in ("impression_id", "video_id", "creator_id")},
            score=rng.random(100, np.float32), propensity=rng.random(100, np.float32),
            topic=rng.integers(0, 2**31, 100, np.int32), duration_ms=rng.integers(0, 2**31, 100, np.int32),
        )
        for request in range(MAX_ROWS_PER_APPEND // 100)
    ]  # fmt: skip
    writing = Writing(tmp_path / "exposures.db", max_queued_rows=10_000)
    writing.writer._append(slates)
    writing.writer.close()
    log = SqliteLog(tmp_path / "exposures.db")
    (record,) = log.read({}, limit=10).records
    log.close()
    assert len(record.payload) < log.max_record_bytes / 2


def test_shutdown_waits_for_one_failed_append_only(tmp_path: Path) -> None:
    """Each append to a broker that is down takes its whole timeout; the replica would be killed before the last."""
    attempts: list[int] = []

    class UnreachableLog(SqliteLog):
        def append(self, records: Sequence[LogRecord]) -> list[int]:
            attempts.append(len(records))
            time.sleep(0.1)
            raise StorageError("no broker")

    lost: list[int] = []
    log = UnreachableLog(tmp_path / "exposures.db")
    writer = ExposureWriter(
        lambda: log, lambda slate: lost.append(slate.request_id), retry_delay_s=60.0, max_queued_rows=100_000
    )
    for request in range(40):
        writer.record(slate(request, videos=1_000))
    writer.close()
    assert sorted(lost) == list(range(40)), "14 batches"
    assert len(attempts) <= 3


def test_identity_survives_the_event_log() -> None:
    """Records of an older writer lack the column; their viewers did not prove their identity."""
    slates = [slate(1, videos=1), replace(slate(2, videos=1), authenticated=True)]
    rows = exposure_rows([replace(one, arm=ArmKey("r-1", Arm.CANARY, "ab" * 32)) for one in slates])

    def read(batch: pa.RecordBatch) -> list[bool]:
        return read_exposure_rows(StoredRecord(0, 1, 0, encode_rows(batch))).authenticated.tolist()

    assert read(rows) == [False, True]
    assert read(rows.drop_columns(["authenticated"])) == [False, False]
