"""Why: the local profile's memory of rollouts has to outlive a killed process and be shared by a controller and a CLI.

One SQLite file in WAL mode, synced at every commit, so that what was recorded is there after a crash of the process or
of the machine. Every method is one transaction. It refuses a file that it did not write or that a newer version wrote,
a second rollout under way, and a record that would overwrite somebody else's. It decides nothing.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final, TypeVar

from pydantic import BaseModel, ValidationError

from reelway.platform.errors import MalformedFileError, RolloutError, StorageError
from reelway.platform.rollout.alerts import AlertKey, KnownAlert
from reelway.platform.rollout.policy import RolloutPolicy
from reelway.platform.rollout.records import HistoryEntry, Rollout, Sighting, with_commands_since
from reelway.platform.rollout.state import Command, RolloutState, ask

SCHEMA_VERSION: Final = 1
HISTORY_LIMIT: Final = 100_000
"""History entries kept, over all rollouts, newest first: decades of daily rollouts. Older ones are dropped."""
BUSY_S: Final = 10.0
"""How long a transaction waits for another process's."""
_APPLICATION_ID: Final = 0x7265656C
"""In the file's header: tells a store of rollouts from any other SQLite file."""
_SCHEMA: Final = (
    """CREATE TABLE rollouts (
           number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, version INTEGER NOT NULL,
           active INTEGER NOT NULL, state TEXT NOT NULL, policy TEXT NOT NULL)""",
    "CREATE TABLE history (number INTEGER PRIMARY KEY AUTOINCREMENT, rollout_id TEXT NOT NULL, entry TEXT NOT NULL)",
    "CREATE INDEX history_of ON history (rollout_id, number)",
    """CREATE TABLE alerts (
           group_key TEXT, labels TEXT, starts_at REAL, resolved INTEGER NOT NULL, summary TEXT NOT NULL,
           PRIMARY KEY (group_key, labels, starts_at)) WITHOUT ROWID""",
    "CREATE TABLE sightings (rollout_id TEXT PRIMARY KEY, sighting TEXT NOT NULL)",
)
_COLUMNS: Final = "id, version, state, policy"
_AlertRow = tuple[str, str, float, int, str]
_Model = TypeVar("_Model", bound=BaseModel)


class SqliteRolloutStore:
    """``records.RolloutStore`` in one file, made when it is not there.

    Safe between processes, and between threads of one process that share an object.

    Raises:
        MalformedFileError: ``path`` is not a store of rollouts.
        StorageError: it is by a newer version, or cannot be opened or written. Every method may raise these two.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._own_writes = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
        with self._explained():
            self._db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            self._open()
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._db.close()

    def create(self, state: RolloutState, policy: RolloutPolicy) -> Rollout:
        with self._writing() as db:
            under_way = db.execute("SELECT id FROM rollouts WHERE active LIMIT 1").fetchone()
            if under_way is not None:
                raise RolloutError(
                    f"rollout {under_way[0]} is under way; wait, or end it with `reelway rollout rollback`"
                )
            if db.execute("SELECT 1 FROM rollouts WHERE id = ?", (state.id,)).fetchone():
                raise RolloutError(f"there has been a rollout {state.id}; expected an id that was never used")
            made = Rollout(state=state, policy=policy, version=1)
            db.execute(
                f"INSERT INTO rollouts ({_COLUMNS}, active) VALUES (?, ?, ?, ?, ?)",
                (state.id, made.version, state.model_dump_json(), policy.model_dump_json(), state.active),
            )
            return made

    def get(self, rollout_id: str) -> Rollout:
        with self._reading() as db:
            return self._get(db, rollout_id)

    def latest(self) -> Rollout | None:
        with self._reading() as db:
            row = db.execute(f"SELECT {_COLUMNS} FROM rollouts ORDER BY number DESC LIMIT 1").fetchone()
            return None if row is None else self._rollout(row)

    def all(self) -> Sequence[Rollout]:
        with self._reading() as db:
            return [self._rollout(row) for row in db.execute(f"SELECT {_COLUMNS} FROM rollouts ORDER BY number")]

    def record(self, before: Rollout, state: RolloutState, entry: HistoryEntry | None) -> Rollout:
        with self._writing() as db:
            newest = self._get(db, before.state.id, exact=True)
            if newest.version != before.version:
                state = with_commands_since(before, newest, state)
            written = self._write(db, newest, state)
            if entry is not None:
                added = db.execute(
                    "INSERT INTO history (rollout_id, entry) VALUES (?, ?)",
                    (entry.rollout_id, entry.model_dump_json(exclude={"number"})),
                )
                db.execute("DELETE FROM history WHERE number <= ?", ((added.lastrowid or 0) - HISTORY_LIMIT,))
            return written

    def ask(self, rollout_id: str, command: Command) -> Rollout:
        with self._writing() as db:
            newest = self._get(db, rollout_id)
            asked = ask(newest.state, command)
            return newest if asked == newest.state else self._write(db, newest, asked)

    def history(self, rollout_id: str | None = None) -> Sequence[HistoryEntry]:
        with self._reading() as db:
            if rollout_id is None:
                rows = db.execute("SELECT number, entry FROM history ORDER BY number")
            else:
                whole = self._get(db, rollout_id).state.id
                rows = db.execute("SELECT number, entry FROM history WHERE rollout_id = ? ORDER BY number", (whole,))
            return [self._read(HistoryEntry, text).model_copy(update={"number": number}) for number, text in rows]

    def alerts(self) -> dict[AlertKey, KnownAlert]:
        with self._reading() as db:
            known = [self._alert(row) for row in _alert_rows(db)]
            return {alert.key: alert for alert in known}

    def replace_alerts(self, book: Mapping[AlertKey, KnownAlert]) -> None:
        with self._writing() as db:
            before, after = set(_alert_rows(db)), {_alert_row(alert) for alert in book.values()}
            gone = [row[:3] for row in before - after]
            db.executemany("DELETE FROM alerts WHERE group_key = ? AND labels = ? AND starts_at = ?", gone)
            db.executemany("INSERT INTO alerts VALUES (?, ?, ?, ?, ?)", after - before)

    def see(self, sighting: Sighting) -> None:
        with self._writing() as db:
            db.execute(
                "INSERT OR REPLACE INTO sightings VALUES (?, ?)", (sighting.rollout_id, sighting.model_dump_json())
            )

    def sighting(self, rollout_id: str) -> Sighting | None:
        with self._reading() as db:
            whole = self._get(db, rollout_id).state.id
            row = db.execute("SELECT sighting FROM sightings WHERE rollout_id = ?", (whole,)).fetchone()
            return None if row is None else self._read(Sighting, row[0])

    def changes(self, *, own: bool = True) -> int:
        """Costs about 10 microseconds: SQLite keeps the number of commits by others in shared memory."""
        with self._lock, self._explained():
            others = int(self._db.execute("PRAGMA data_version").fetchone()[0])
            return (others << 32) + self._own_writes if own else others

    def _open(self) -> None:
        with self._explained():
            # Before anything is written, so that a file of somebody else's is left as it is.
            self._check_header()
            _until_free(lambda: self._db.execute("PRAGMA journal_mode = WAL"))
            self._db.execute("PRAGMA synchronous = FULL")
        with self._writing() as db:
            if not self._check_header():
                for statement in _SCHEMA:
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        self._own_writes = 0

    def _check_header(self) -> bool:
        """Whether the file is a store already; False for a new one."""
        application = int(self._db.execute("PRAGMA application_id").fetchone()[0])
        version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
        tables = int(self._db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0])
        if (application, version, tables) == (0, 0, 0):
            return False
        if application != _APPLICATION_ID:
            seen = f"a SQLite file of another application ({tables} tables)"
            raise MalformedFileError(self.path, "a store of rollouts; give another path", seen=seen)
        if version != SCHEMA_VERSION:
            raise StorageError(
                f"{self.path}: a store of rollouts with schema version {version}, expected {SCHEMA_VERSION}; "
                "it was written by another version of reelway, use that one"
            )
        return True

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise StorageError(f"{self.path}: {error}; check the disk and who else writes there") from error
        except sqlite3.DatabaseError as error:
            expected = "a store of rollouts; restore it, or move it away to begin anew"
            raise MalformedFileError(self.path, expected, seen=str(error)) from error

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._transaction("BEGIN IMMEDIATE") as db:
            before = db.total_changes
            yield db
            changed = db.total_changes != before
        self._own_writes += changed

    def _reading(self) -> AbstractContextManager[sqlite3.Connection]:
        return self._transaction("BEGIN")

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        with self._lock, self._explained():
            self._db.execute(begin)
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _get(self, db: sqlite3.Connection, rollout_id: str, *, exact: bool = False) -> Rollout:
        same = "id = ?1" if exact else "substr(id, 1, length(?1)) = ?1"
        rows = db.execute(
            f"SELECT {_COLUMNS} FROM rollouts WHERE {same} ORDER BY id = ?1 DESC, number DESC LIMIT 4", (rollout_id,)
        ).fetchall()
        if not rows or not rollout_id:
            raise RolloutError(f"there is no rollout {rollout_id!r}; `reelway rollout history` names them")
        if len(rows) > 1 and rows[0][0] != rollout_id:
            some = ", ".join(row[0] for row in rows[:3])
            raise RolloutError(f"{rollout_id!r} begins several rollouts ({some} ...); give more of the id")
        return self._rollout(rows[0])

    def _write(self, db: sqlite3.Connection, newest: Rollout, state: RolloutState) -> Rollout:
        written = Rollout(state=state, policy=newest.policy, version=newest.version + 1)
        db.execute(
            "UPDATE rollouts SET version = ?, active = ?, state = ? WHERE id = ?",
            (written.version, state.active, state.model_dump_json(), state.id),
        )
        return written

    def _rollout(self, row: tuple[str, int, str, str]) -> Rollout:
        _, version, state, policy = row
        return Rollout(state=self._read(RolloutState, state), policy=self._read(RolloutPolicy, policy), version=version)

    def _alert(self, row: _AlertRow) -> KnownAlert:
        group_key, labels, starts_at, resolved, summary = row
        pairs = tuple((str(name), str(value)) for name, value in json.loads(labels))
        return KnownAlert(
            group_key=group_key, labels=pairs, starts_at=starts_at, resolved=bool(resolved), summary=summary
        )

    def _read(self, model: type[_Model], text: str) -> _Model:
        try:
            return model.model_validate_json(text)
        except ValidationError as error:
            expected = f"a {model.__name__} as this version writes it"
            raise MalformedFileError(self.path, expected, seen=f"{text[:80]} ({error.errors()[0]['msg']})") from error


def _alert_rows(db: sqlite3.Connection) -> list[_AlertRow]:
    return db.execute("SELECT group_key, labels, starts_at, resolved, summary FROM alerts").fetchall()


def _alert_row(alert: KnownAlert) -> _AlertRow:
    return alert.group_key, json.dumps(alert.labels), alert.starts_at, int(alert.resolved), alert.summary


def _until_free(attempt: Callable[[], object]) -> None:
    """Changing a file's journal ignores SQLite's own waiting: two processes that open a new file meet here."""
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            attempt()
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return
