"""The event log in a SQLite file: order, times, retention, and killed processes."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from reelway.platform.errors import ConfigError, StorageError
from reelway.platform.eventlog import LogRecord, open_event_log
from reelway.platform.eventlog.sqlite_log import SqliteLog

APPENDER = """
import sys
from pathlib import Path
from reelway.platform.eventlog import LogRecord
from reelway.platform.eventlog.sqlite_log import SqliteLog

log = SqliteLog(Path(sys.argv[1]))
for batch in range(1_000_000):
    offsets = log.append([LogRecord(f"{sys.argv[2]}-{batch}-{i}", 0, b"x" * 100) for i in range(5)])
    print(f"{sys.argv[2]}-{batch}", *offsets, flush=True)
"""


class Clock:
    """Unix seconds, as a test sets them."""

    def __init__(self, now_s: float) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def record(name: str, key: str = "") -> LogRecord:
    return LogRecord(name, 0, name.encode(), key)


def everything(log: SqliteLog) -> list[bytes]:
    return [one.payload for one in log.read({}, limit=1_000_000).records]


def test_records_are_read_in_the_order_of_acknowledgement(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path / "log.db")
    assert log.append([record("a"), record("b")]) + log.append([record("c")]) == [1, 2, 3]
    first = log.read({}, limit=2)
    assert [one.payload for one in first.records] == [b"a", b"b"]
    assert [one.payload for one in log.read(first.next_offsets, limit=2).records] == [b"c"]
    assert log.end_offsets() == {0: 4}


def test_record_appended_twice_keeps_its_first_offset(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path / "log.db")
    log.append([record("a"), record("b")])
    again, new = log.append([record("b"), record("c")])
    assert again == 2
    assert new > 2
    assert everything(log) == [b"a", b"b", b"c"]


def test_watermark_is_the_last_record_of_a_full_read_or_the_clock(tmp_path: Path) -> None:
    clock = Clock(7.0)
    log = SqliteLog(tmp_path / "log.db", clock=clock)
    log.append([record("a")])
    clock.now_s = 8.0
    log.append([record("b")])
    clock.now_s = 50.0
    assert log.read({}, limit=1).watermark_us == 7_000_000
    assert log.read({}, limit=5).watermark_us == 50_000_000
    assert log.read({0: 3}, limit=5).watermark_us == 50_000_000


def test_no_record_gets_a_time_before_a_watermark(tmp_path: Path) -> None:
    """The clock is set back after another object of the log read the log to its end."""
    clock = Clock(100.0)
    log, reader = SqliteLog(tmp_path / "log.db", clock=clock), SqliteLog(tmp_path / "log.db", clock=lambda: 103.0)
    log.append([record("a")])
    assert reader.read({}, limit=5).watermark_us == 103_000_000
    clock.now_s = 90.0
    log.append([record("b")])
    clock.now_s = 104.0
    log.append([record("c")])
    assert [one.time_us for one in log.read({}, limit=5).records] == [100_000_000, 103_000_000, 104_000_000]


def test_offsets_at_a_time_are_those_of_the_first_later_record(tmp_path: Path) -> None:
    clock = Clock(10.0)
    log = SqliteLog(tmp_path / "log.db", clock=clock)
    for now_s in (10.0, 20.0, 30.0):
        clock.now_s = now_s
        log.append([record(str(now_s))])
    assert [log.offsets_at(int(at_s * 1e6))[0] for at_s in (0, 10, 10.5, 20, 31)] == [1, 1, 2, 2, 4]


def test_retention_deletes_old_records(tmp_path: Path) -> None:
    clock = Clock(0.0)
    log = SqliteLog(tmp_path / "log.db", retain_s=100.0, clock=clock)
    log.append([record("old"), record("old too")])
    clock.now_s = 950.0
    log.append([record("new")])
    clock.now_s = 1_000.0
    assert log.apply_retention() == 2
    assert everything(log) == [b"new"]
    assert log.append([record("next")]) == [4], "an offset is never given twice"


def test_retention_keeps_the_newest_record_of_each_key(tmp_path: Path) -> None:
    clock = Clock(0.0)
    log = SqliteLog(tmp_path / "log.db", retain_s=100.0, clock=clock)
    log.append([record("a1", "a"), record("b1", "b"), record("a2", "a"), record("plain")])
    clock.now_s = 1_000.0
    assert log.apply_retention() == 2
    assert everything(log) == [b"b1", b"a2"]


def test_log_emptied_by_retention_does_not_hold_the_watermark(tmp_path: Path) -> None:
    clock = Clock(0.0)
    log = SqliteLog(tmp_path / "log.db", retain_s=100.0, clock=clock)
    log.append([record("old"), record("old too")])
    clock.now_s = 1_000.0
    assert log.apply_retention() == 2
    for position in ({}, {0: 1}, {0: 3}):
        assert log.read(position, limit=1).watermark_us == 1_000_000_000


def test_append_rejects_a_record_above_the_limit(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path / "log.db")
    largest = LogRecord("b", 0, b"x" * log.max_record_bytes)
    with pytest.raises(StorageError, match="split the record"):
        log.append([record("a"), largest._replace(payload=largest.payload + b"x")])
    assert log.append([largest]) == [1]


def test_file_of_another_schema_version_is_rejected(tmp_path: Path) -> None:
    SqliteLog(tmp_path / "log.db").close()
    with sqlite3.connect(tmp_path / "log.db") as db:
        db.execute("PRAGMA user_version = 9")
    with pytest.raises(StorageError, match="schema version 9, expected 2"):
        SqliteLog(tmp_path / "log.db")


@pytest.mark.parametrize("address", ["http://a/b", "kafka://host:1", "kafka:///topic", "kafka://h:1/a/b"])
def test_invalid_address_is_rejected(address: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        open_event_log(address)


def test_acknowledged_records_survive_killed_processes(tmp_path: Path) -> None:
    """Two processes append concurrently and are killed, three times."""
    path = tmp_path / "log.db"
    acknowledged: dict[str, list[int]] = {}
    for round_ in range(3):
        children = [
            subprocess.Popen(
                [sys.executable, "-c", APPENDER, str(path), f"{round_}{name}"], stdout=subprocess.PIPE, text=True
            )
            for name in "ab"
        ]
        for child in children:
            assert child.stdout is not None
            for _ in range(20 + 10 * round_):
                name, *offsets = child.stdout.readline().split()
                acknowledged[name] = [int(offset) for offset in offsets]
            os.kill(child.pid, signal.SIGKILL)
            for line in child.stdout:  # the rest of its output
                if line.endswith("\n"):
                    name, *offsets = line.split()
                    acknowledged[name] = [int(offset) for offset in offsets]
            child.wait()
            child.stdout.close()
    stored = {one.offset for one in SqliteLog(path).read({}, limit=10_000_000).records}
    assert len(acknowledged) >= 150
    assert {offset for offsets in acknowledged.values() for offset in offsets} <= stored


class ModelledLog(RuleBasedStateMachine):
    """The log, reopened at any time, against a list as its model."""

    @initialize(folder=st.just(None))
    def open(self, folder: Any) -> None:  # noqa: ARG002
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "log.db"
        self.log = SqliteLog(self.path)
        self.appended: list[str] = []
        self.position: dict[int, int] = {}
        self.read = 0

    @rule(names=st.lists(st.sampled_from("abcdefghijklmnopqrstuvwxyz"), max_size=4))
    def append(self, names: list[str]) -> None:
        expected = []
        for name in names:
            if name not in self.appended:
                self.appended.append(name)
            expected.append(self.appended.index(name))
        offsets = self.log.append([record(name) for name in names])
        order = [one.offset for one in self.log.read({}, limit=100).records]
        assert [order.index(offset) for offset in offsets] == expected

    @rule(limit=st.integers(1, 5))
    def read_on(self, limit: int) -> None:
        batch = self.log.read(self.position, limit=limit)
        assert [one.payload.decode() for one in batch.records] == self.appended[self.read : self.read + limit]
        self.position = dict(batch.next_offsets)
        self.read += len(batch.records)

    @rule()
    def reopen(self) -> None:
        self.log.close()
        self.log = SqliteLog(self.path)

    @invariant()
    def everything_is_there_in_order(self) -> None:
        if hasattr(self, "log"):
            assert [payload.decode() for payload in everything(self.log)] == self.appended

    def teardown(self) -> None:
        if hasattr(self, "log"):
            self.log.close()
            self.folder.cleanup()


TestModelledLog = ModelledLog.TestCase
TestModelledLog.settings = settings(
    max_examples=15, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
