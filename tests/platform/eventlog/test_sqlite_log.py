"""The log in a file: what is acknowledged is there, in order, for every consumer, whoever dies."""

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


def test_records_are_read_in_the_order_of_their_acknowledgement(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path / "log.db")
    assert log.append([record("a"), record("b")]) + log.append([record("c")]) == [1, 2, 3]
    first = log.read({}, limit=2)
    assert [one.payload for one in first.records] == [b"a", b"b"]
    assert [one.payload for one in log.read(first.position, limit=2).records] == [b"c"]
    assert log.end() == {0: 4}


def test_a_record_that_is_appended_again_keeps_its_first_place(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path / "log.db")
    log.append([record("a"), record("b")])
    again, new = log.append([record("b"), record("c")])
    assert again == 2
    assert new > 2
    assert everything(log) == [b"a", b"b", b"c"]


def test_a_read_that_finds_nothing_speaks_for_its_own_moment_and_a_full_one_for_its_last_record(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path / "log.db", clock=lambda: 50.0)
    log.append([record("a", 7_000_000), record("b", 8_000_000)])
    assert log.read({}, limit=1).complete_until_us == 7_000_000
    assert log.read({}, limit=5).complete_until_us == 50_000_000
    assert log.read({0: 3}, limit=5).complete_until_us == 50_000_000


def test_old_records_go_when_every_consumer_has_read_them_and_not_before(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path / "log.db", retain_s=100.0, clock=lambda: 1_000.0)
    log.append([record("old", 0), record("old too", 0), record("new", 950_000_000)])
    log.commit("fast", {0: 4})
    log.commit("slow", {0: 1})
    assert log.clean() == 0, "the slow one has read nothing"
    log.commit("slow", {0: 2})
    assert log.clean() == 1
    assert everything(log) == [b"old too", b"new"]
    log.forget("slow")
    assert log.clean() == 1
    assert everything(log) == [b"new"]
    assert log.append([record("next")]) == [4], "an offset is never given twice"


def test_a_file_of_another_schema_is_refused(tmp_path: Path) -> None:
    SqliteLog(tmp_path / "log.db").close()
    with sqlite3.connect(tmp_path / "log.db") as db:
        db.execute("PRAGMA user_version = 9")
    with pytest.raises(StorageError, match="schema version 9, expected 1"):
        SqliteLog(tmp_path / "log.db")


@pytest.mark.parametrize("address", ["http://a/b", "kafka://host:1", "kafka:///topic", "kafka://h:1/a/b"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        open_event_log(address)


def test_what_killed_processes_had_acknowledged_is_there(tmp_path: Path) -> None:
    """Two at once, killed in the middle of their work, three times over."""
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
            for line in child.stdout:  # what it still said before it died
                if line.endswith("\n"):
                    name, *offsets = line.split()
                    acknowledged[name] = [int(offset) for offset in offsets]
            child.wait()
            child.stdout.close()
    stored = {one.offset for one in SqliteLog(path).read({}, limit=10_000_000).records}
    assert len(acknowledged) >= 150
    assert {offset for offsets in acknowledged.values() for offset in offsets} <= stored


class ModelledLog(RuleBasedStateMachine):
    """The log, reopened at any moment, beside a list and a dict."""

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
        batch = self.log.read(self.log.position(consumer), limit=limit)
        start = self.committed.get(consumer, 0)
        assert [one.payload.decode() for one in batch.records] == self.appended[start : start + limit]
        if commits:
            self.log.commit(consumer, batch.position)
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
