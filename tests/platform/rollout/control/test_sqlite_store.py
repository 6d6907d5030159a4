"""The SQLite rollout store: concurrent processes, commands, history, and invalid files."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reelway.platform.errors import MalformedFileError, RolloutError, StorageError
from reelway.platform.rollout.alerts import KnownAlert
from reelway.platform.rollout.control import sqlite_store
from reelway.platform.rollout.control.sqlite_store import SqliteRolloutStore
from reelway.platform.rollout.policy import default_policy
from reelway.platform.rollout.records import HistoryEntry, LastReconcile
from reelway.platform.rollout.state import Command, Phase, RolloutState

POLICY = default_policy()


def state(rollout_id: str = "r-1", phase: Phase = Phase.PENDING) -> RolloutState:
    return RolloutState(
        id=rollout_id, stable_release="old", canary_release="new", phase=phase, started_at=0.1, changed_at=0, tick_at=0
    )


def entry(rollout_id: str = "r-1", reason: str = "because") -> HistoryEntry:
    return HistoryEntry(
        rollout_id=rollout_id, time=1.5, action="step", reason=reason, phase_before="pending", phase="stepping", step=0,
        canary_bp=100, evidence={"viewers": 3},
    )  # fmt: skip


def alert(name: str, *, resolved: bool = False) -> KnownAlert:
    labels = (("alertname", name), ("release", "new"))
    return KnownAlert(group_key="g", labels=labels, starts_at=12.25, resolved=resolved, summary=name)


@pytest.fixture
def store(tmp_path: Path) -> SqliteRolloutStore:
    return SqliteRolloutStore(tmp_path / "rollout" / "state.db")


def test_recorded_state_is_read_by_another_process(store: SqliteRolloutStore) -> None:
    created = store.create(state(), POLICY)
    moved = store.record(created, created.state.model_copy(update={"phase": Phase.PREPARING}), entry())
    store.save_last_reconcile(LastReconcile(rollout_id="r-1", time=3, action="wait", reason="so"))
    store.replace_alerts({alert("a").key: alert("a")})
    code = (
        "import sys, pathlib\n"
        "from reelway.platform.rollout.control.sqlite_store import SqliteRolloutStore\n"
        "store = SqliteRolloutStore(pathlib.Path(sys.argv[1]))\n"
        "latest, reconcile = store.latest(), store.last_reconcile('r-')\n"
        "print(latest.model_dump_json(), store.history()[0].reason, reconcile.reason, len(store.alerts()))\n"
    )
    read = subprocess.run([sys.executable, "-c", code, store.path], capture_output=True, text=True, check=True).stdout
    assert read.strip() == f"{moved.model_dump_json()} because so 1"
    assert moved.version == 2


def test_every_commit_is_synced_to_disk(store: SqliteRolloutStore) -> None:
    mode = store._file.connection.execute("PRAGMA synchronous").fetchone()[0]
    assert (mode, store._file.connection.execute("PRAGMA journal_mode").fetchone()[0]) == (2, "wal")


def test_second_active_rollout_is_rejected(store: SqliteRolloutStore) -> None:
    first = store.create(state(), POLICY)
    with pytest.raises(RolloutError, match="r-1 is in progress"):
        store.create(state("r-2"), POLICY)
    store.record(first, state(phase=Phase.ROLLED_BACK), None)
    store.create(state("r-2"), POLICY)
    with pytest.raises(RolloutError, match="r-2 is in progress"):
        store.create(state("r-3"), POLICY)
    latest = store.latest()
    assert latest is not None
    assert latest.state.id == "r-2"
    assert [rollout.state.id for rollout in store.all()] == ["r-1", "r-2"]


def test_used_id_is_rejected(store: SqliteRolloutStore) -> None:
    store.create(state(phase=Phase.ROLLED_BACK), POLICY)
    with pytest.raises(RolloutError, match="rollout r-1 exists"):
        store.create(state(), POLICY)


def test_get_accepts_the_unique_beginning_of_an_id(store: SqliteRolloutStore) -> None:
    for name in ("ab", "abc", "xy"):
        store.create(state(name, Phase.ROLLED_BACK), POLICY)
    assert store.get("x").state.id == "xy"
    assert store.get("ab").state.id == "ab"  # an exact match, although another id begins with it
    with pytest.raises(RolloutError, match="is ambiguous"):
        store.get("a")
    for wrong in ("z", "", "%", "x_"):
        with pytest.raises(RolloutError, match="does not exist"):
            store.get(wrong)


def test_write_based_on_an_outdated_version_is_rejected(store: SqliteRolloutStore) -> None:
    created = store.create(state(), POLICY)
    store.record(created, state(phase=Phase.PREPARING), entry(reason="first"))
    with pytest.raises(RolloutError, match=r"at version 2 .preparing., was read at 1 .pending."):
        store.record(created, state(phase=Phase.SHADOW), entry(reason="second"))
    assert store.get("r-1").state.phase is Phase.PREPARING
    assert [known.reason for known in store.history()] == ["first"]


def test_command_submitted_during_a_decision_is_kept(store: SqliteRolloutStore) -> None:
    created = store.create(state(), POLICY)
    store.submit_command("r-1", Command(id="c1", verb="rollback"))
    written = store.record(created, state(phase=Phase.PREPARING), None)
    assert written.state.phase is Phase.PREPARING
    assert written.state.command == Command(id="c1", verb="rollback")
    assert written.state.commands_seen == ("c1",)
    assert written.version == 3


def test_handled_command_does_not_return(store: SqliteRolloutStore) -> None:
    store.create(state(), POLICY)
    read = store.submit_command("r-1", Command(id="c1", verb="rollback"))
    store.submit_command("r-1", Command(id="c2", verb="pause"))  # ignored: a rollback is never replaced
    updated = read.state.model_copy(update={"command": None, "phase": Phase.ROLLING_BACK})
    assert store.record(read, updated, None).state.command is None
    read = store.get("r-1")
    assert store.submit_command("r-1", Command(id="c1", verb="rollback")) == read


def test_later_command_remains_after_the_earlier_one_is_handled(store: SqliteRolloutStore) -> None:
    store.create(state(), POLICY)
    read = store.submit_command("r-1", Command(id="c1", verb="pause"))
    store.submit_command("r-1", Command(id="c2", verb="resume"))
    written = store.record(read, read.state.model_copy(update={"command": None, "phase": Phase.PAUSED}), None)
    assert written.state.command == Command(id="c2", verb="resume")


def test_repeated_command_changes_nothing(store: SqliteRolloutStore) -> None:
    store.create(state(), POLICY)
    once = store.submit_command("r-", Command(id="c1", verb="pause"))
    assert store.submit_command("r-1", Command(id="c1", verb="pause")) == once


def test_history_is_numbered_over_all_rollouts(store: SqliteRolloutStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_store, "HISTORY_LIMIT", 3)
    first = store.create(state(), POLICY)
    first = store.record(first, first.state, entry(reason="1"))
    first = store.record(first, first.state.model_copy(update={"phase": Phase.ROLLED_BACK}), entry(reason="2"))
    second = store.create(state("r-2"), POLICY)
    for reason in ("3", "4"):
        second = store.record(second, second.state, entry("r-2", reason))
    assert [(known.number, known.reason) for known in store.history()] == [(2, "2"), (3, "3"), (4, "4")]
    assert [known.reason for known in store.history("r-2")] == ["3", "4"]


def test_replace_alerts_replaces_all_alerts(store: SqliteRolloutStore) -> None:
    first = {known.key: known for known in (alert("a"), alert("b"))}
    store.replace_alerts(first)
    assert store.alerts() == first
    second = {known.key: known for known in (alert("b", resolved=True), alert("c"))}
    store.replace_alerts(second)
    assert store.alerts() == second


def test_revision_separates_own_writes_from_others(store: SqliteRolloutStore) -> None:
    other = SqliteRolloutStore(store.path)
    both, others = store.revision(), store.revision(include_own=False)
    assert (store.revision(), store.revision(include_own=False)) == (both, others)
    store.create(state(), POLICY)
    assert store.revision() != both
    assert store.revision(include_own=False) == others
    both = store.revision()
    other.submit_command("r-1", Command(id="c1", verb="pause"))
    assert store.revision() != both
    assert store.revision(include_own=False) != others
    revision = store.revision()
    other.submit_command("r-1", Command(id="c1", verb="pause"))  # changes nothing
    other.get("r-1")
    assert store.revision() == revision


def test_concurrent_writers_lose_nothing(store: SqliteRolloutStore) -> None:
    store.create(state(), POLICY)
    shared = (store, SqliteRolloutStore(store.path))

    def write(part: int) -> None:
        for i in range(10):
            while True:
                read = shared[part % 2].get("r-1")
                try:
                    moved = read.state.model_copy(update={"phase_s": read.state.phase_s + 1})
                    shared[part % 2].record(read, moved, entry(reason=f"{part}.{i}"))
                    break
                except RolloutError:
                    continue

    threads = [threading.Thread(target=write, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.get("r-1").state.phase_s == 40
    assert len(store.history()) == 40


def test_processes_create_one_file_concurrently(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from reelway.platform.rollout.control.sqlite_store import SqliteRolloutStore\n"
        "sys.stdin.readline()\n"
        "print(SqliteRolloutStore(pathlib.Path(sys.argv[1])).latest())\n"
    )
    path = tmp_path / "state.db"
    started = [
        subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert {process.communicate("go\n", timeout=60)[0] for process in started} == {"None\n"}


def test_error_names_a_file_that_is_not_a_database(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.write_text("not a database, but long enough to be looked at" * 40)
    with pytest.raises(MalformedFileError, match=r"state\.db: saw 'file is not a database', expected a rollout store"):
        SqliteRolloutStore(path)


def test_database_of_another_application_is_left_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE t (x)")
    before = path.read_bytes()
    with pytest.raises(MalformedFileError, match=r"other\.db: saw 'a SQLite file of another application"):
        SqliteRolloutStore(path)
    assert path.read_bytes() == before


def test_another_schema_version_is_rejected(store: SqliteRolloutStore) -> None:
    store._file.connection.execute("PRAGMA user_version = 9")
    with pytest.raises(StorageError, match=r"state\.db: .* schema version 9, expected 2"):
        SqliteRolloutStore(store.path)


def test_invalid_row_is_rejected(store: SqliteRolloutStore) -> None:
    created = store.create(state(), POLICY)
    wrong = json.loads(created.state.model_dump_json()) | {"canary_bp": 20_000}
    store._file.connection.execute("UPDATE rollouts SET state = ?", (json.dumps(wrong),))
    with pytest.raises(MalformedFileError, match="less than or equal to 10000"):
        store.latest()


def test_read_only_disk_raises_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        SqliteRolloutStore(tmp_path / "file" / "state.db")
    store = SqliteRolloutStore(tmp_path / "state.db")
    store._file.connection.execute("PRAGMA query_only = 1")
    with pytest.raises(StorageError, match="readonly"):
        store.create(state(), POLICY)


_moments = st.floats(0, 2e9)


@settings(max_examples=50, deadline=None)
@given(tick_at=_moments, phase_s=_moments, reason=st.text(max_size=20))
def test_state_round_trips(
    tmp_path_factory: pytest.TempPathFactory, tick_at: float, phase_s: float, reason: str
) -> None:
    store = SqliteRolloutStore(tmp_path_factory.mktemp("store") / "state.db")
    given_state = state().model_copy(update={"tick_at": tick_at, "phase_s": phase_s, "reason": reason})
    assert store.create(given_state, POLICY) == store.latest()
    store.close()
