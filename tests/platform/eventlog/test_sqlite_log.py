"""The event log in a SQLite file: order, consumers, retention, and killed processes."""

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
    offsets = log.append([LogRecord(f"{sys.argv[2]}-{batch}-{i}", 0, batch, b"x" * 100) for i in range(5)])
    print(f"{sys.argv[2]}-{batch}", *offsets, flush=True)
"""


def record(name: str, time_us: int = 0) -> LogRecord:
    return LogRecord(name, 0, time_us, name.encode())


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
    log = SqliteLog(tmp_path / "log.db", clock=lambda: 50.0)
    log.append([record("a", 7_000_000), record("b", 8_000_000)])
    assert log.read({}, limit=1).watermark_us == 7_000_000
    assert log.read({}, limit=5).watermark_us == 50_000_000
    assert log.read({0: 3}, limit=5).watermark_us == 50_000_000


def test_retention_deletes_old_records_that_all_consumers_have_read(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path / "log.db", retain_s=100.0, clock=lambda: 1_000.0)
    log.append([record("old", 0), record("old too", 0), record("new", 950_000_000)])
    log.commit("fast", {0: 4})
    log.commit("slow", {0: 1})
    assert log.apply_retention() == 0, "the slow one has read nothing"
    log.commit("slow", {0: 2})
    assert log.apply_retention() == 1
    assert everything(log) == [b"old too", b"new"]
    log.remove_consumer("slow")
    assert log.apply_retention() == 1
    assert everything(log) == [b"new"]
    assert log.append([record("next")]) == [4], "an offset is never given twice"


def test_log_emptied_by_retention_does_not_hold_the_watermark(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path / "log.db", retain_s=100.0, clock=lambda: 1_000.0)
    log.append([record("old", 0), record("old too", 0)])
    assert log.apply_retention() == 2
    for position in ({}, {0: 1}, {0: 3}):
        assert log.read(position, limit=1).watermark_us == 1_000_000_000


def test_append_rejects_a_record_above_the_limit(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path / "log.db")
    largest = LogRecord("b", 0, 0, b"x" * log.max_record_bytes)
    with pytest.raises(StorageError, match="split the record"):
        log.append([record("a"), largest._replace(payload=largest.payload + b"x")])
    assert log.append([largest]) == [1]


def test_file_of_another_schema_version_is_rejected(tmp_path: Path) -> None:
    SqliteLog(tmp_path / "log.db").close()
    with sqlite3.connect(tmp_path / "log.db") as db:
        db.execute("PRAGMA user_version = 9")
    with pytest.raises(StorageError, match="schema version 9, expected 1"):
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
    """The log, reopened at any time, against a list and a dict as its model."""

    @initialize(folder=st.just(None))
    def open(self, folder: Any) -> None:  # noqa: ARG002
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "log.db"
        self.log = SqliteLog(self.path)
        self.appended: list[str] = []
        self.committed: dict[str, int] = {}

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

    @rule(consumer=st.sampled_from(["one", "two"]), limit=st.integers(1, 5), commits=st.booleans())
    def read_on(self, consumer: str, limit: int, commits: bool) -> None:
        batch = self.log.read(self.log.committed(consumer), limit=limit)
        start = self.committed.get(consumer, 0)
        assert [one.payload.decode() for one in batch.records] == self.appended[start : start + limit]
        if commits:
            self.log.commit(consumer, batch.next_offsets)
            self.committed[consumer] = start + len(batch.records)

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
