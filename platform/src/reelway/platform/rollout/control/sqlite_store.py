"""The local mode's rollout store: one SQLite file that a controller and the command line share.

Every method is one transaction, synced at commit, so that recorded state survives a crash of the process or the
machine. The store rejects a second active rollout and a write based on an outdated version of a rollout.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar

from pydantic import BaseModel, ValidationError

from reelway.platform.errors import MalformedFileError, RolloutError
from reelway.platform.rollout.alerts import AlertKey, KnownAlert
from reelway.platform.rollout.policy import RolloutPolicy
from reelway.platform.rollout.records import HistoryEntry, LastReconcile, Rollout, with_commands_since
from reelway.platform.rollout.state import Command, RolloutState, add_command
from reelway.platform.sqlite_file import SqliteFile, SqliteFormat

HISTORY_LIMIT: Final = 100_000
"""History entries retained over all rollouts, newest first: decades of daily rollouts. Older entries are deleted."""
BUSY_TIMEOUT_S: Final = 10.0
"""How long a transaction waits for another process's transaction."""
_FORMAT: Final = SqliteFormat(
    description="a rollout store",
    application_id=0x7265656C,
    version=2,
    schema=(
        """CREATE TABLE rollouts (
               number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, version INTEGER NOT NULL,
               active INTEGER NOT NULL, state TEXT NOT NULL, policy TEXT NOT NULL)""",
        """CREATE TABLE history (
               number INTEGER PRIMARY KEY AUTOINCREMENT, rollout_id TEXT NOT NULL, entry TEXT NOT NULL)""",
        "CREATE INDEX history_of ON history (rollout_id, number)",
        """CREATE TABLE alerts (
               group_key TEXT, labels TEXT, starts_at REAL, resolved INTEGER NOT NULL, summary TEXT NOT NULL,
               rollout TEXT NOT NULL, PRIMARY KEY (group_key, labels, starts_at)) WITHOUT ROWID""",
        "CREATE TABLE sightings (rollout_id TEXT PRIMARY KEY, sighting TEXT NOT NULL)",
    ),
    remedy="restore it, or move it away to start with an empty store",
)
_COLUMNS: Final = "id, version, state, policy"
_AlertRow = tuple[str, str, float, int, str, str]
_Model = TypeVar("_Model", bound=BaseModel)


class SqliteRolloutStore:
    """``records.RolloutStore`` in one file, created when it does not exist.

    Threads may share the object, processes may share the file.

    Raises:
        MalformedFileError: if ``path`` is not a rollout store.
        StorageError: if it has another schema version, or cannot be opened or written. Every method may raise these
            two.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._own_writes = 0
        self._file = SqliteFile(path, _FORMAT, busy_timeout_s=BUSY_TIMEOUT_S)

    def close(self) -> None:
        self._file.close()

    def create(self, state: RolloutState, policy: RolloutPolicy) -> Rollout:
        with self._writing() as db:
            active = db.execute("SELECT id FROM rollouts WHERE active LIMIT 1").fetchone()
            if active is not None:
                raise RolloutError(
                    f"rollout {active[0]} is in progress; wait, or end it with `reelway rollout rollback`"
                )
            if db.execute("SELECT 1 FROM rollouts WHERE id = ?", (state.id,)).fetchone():
                raise RolloutError(f"rollout {state.id} exists; use an id that was never used")
            rollout = Rollout(state=state, policy=policy, version=1)
            db.execute(
                f"INSERT INTO rollouts ({_COLUMNS}, active) VALUES (?, ?, ?, ?, ?)",
                (state.id, rollout.version, state.model_dump_json(), policy.model_dump_json(), state.active),
            )
            return rollout

    def get(self, rollout_id: str) -> Rollout:
        with self._file.reading() as db:
            return self._get(db, rollout_id)

    def latest(self) -> Rollout | None:
        with self._file.reading() as db:
            row = db.execute(f"SELECT {_COLUMNS} FROM rollouts ORDER BY number DESC LIMIT 1").fetchone()
            return None if row is None else self._rollout(row)

    def all(self) -> Sequence[Rollout]:
        with self._file.reading() as db:
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

    def submit_command(self, rollout_id: str, command: Command) -> Rollout:
        with self._writing() as db:
            newest = self._get(db, rollout_id)
            updated = add_command(newest.state, command)
            return newest if updated == newest.state else self._write(db, newest, updated)

    def history(self, rollout_id: str | None = None) -> Sequence[HistoryEntry]:
        with self._file.reading() as db:
            if rollout_id is None:
                rows = db.execute("SELECT number, entry FROM history ORDER BY number")
            else:
                full_id = self._get(db, rollout_id).state.id
                rows = db.execute("SELECT number, entry FROM history WHERE rollout_id = ? ORDER BY number", (full_id,))
            return [self._read(HistoryEntry, text).model_copy(update={"number": number}) for number, text in rows]

    def alerts(self) -> dict[AlertKey, KnownAlert]:
        with self._file.reading() as db:
            known = [self._alert(row) for row in _alert_rows(db)]
            return {alert.key: alert for alert in known}

    def replace_alerts(self, alerts: Mapping[AlertKey, KnownAlert]) -> None:
        with self._writing() as db:
            stored, current = set(_alert_rows(db)), {_alert_row(alert) for alert in alerts.values()}
            removed = [row[:3] for row in stored - current]
            db.executemany("DELETE FROM alerts WHERE group_key = ? AND labels = ? AND starts_at = ?", removed)
            db.executemany("INSERT INTO alerts VALUES (?, ?, ?, ?, ?, ?)", current - stored)

    def save_last_reconcile(self, last_reconcile: LastReconcile) -> None:
        with self._writing() as db:
            db.execute(
                "INSERT OR REPLACE INTO sightings VALUES (?, ?)",
                (last_reconcile.rollout_id, last_reconcile.model_dump_json()),
            )

    def last_reconcile(self, rollout_id: str) -> LastReconcile | None:
        with self._file.reading() as db:
            full_id = self._get(db, rollout_id).state.id
            row = db.execute("SELECT sighting FROM sightings WHERE rollout_id = ?", (full_id,)).fetchone()
            return None if row is None else self._read(LastReconcile, row[0])

    def revision(self, *, include_own: bool = True) -> int:
        """See ``RolloutStore.revision``. Costs about 10 microseconds: SQLite counts other commits in shared memory."""
        with self._file.translated_errors():
            foreign_writes = int(self._file.connection.execute("PRAGMA data_version").fetchone()[0])
            return (foreign_writes << 32) + self._own_writes if include_own else foreign_writes

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._file.writing() as db:
            before = db.total_changes
            yield db
            changed = db.total_changes != before
        self._own_writes += changed

    def _get(self, db: sqlite3.Connection, rollout_id: str, *, exact: bool = False) -> Rollout:
        condition = "id = ?1" if exact else "substr(id, 1, length(?1)) = ?1"
        rows = db.execute(
            f"SELECT {_COLUMNS} FROM rollouts WHERE {condition} ORDER BY id = ?1 DESC, number DESC LIMIT 4",
            (rollout_id,),
        ).fetchall()
        if not rows or not rollout_id:
            raise RolloutError(
                f"rollout {rollout_id!r} does not exist; `reelway rollout history --all` lists all rollouts"
            )
        if len(rows) > 1 and rows[0][0] != rollout_id:
            examples = ", ".join(row[0] for row in rows[:3])
            raise RolloutError(f"rollout id {rollout_id!r} is ambiguous ({examples} ...); give more characters")
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
        group_key, labels, starts_at, resolved, summary, rollout = row
        pairs = tuple((str(name), str(value)) for name, value in json.loads(labels))
        return KnownAlert(
            group_key=group_key,
            labels=pairs,
            starts_at=starts_at,
            resolved=bool(resolved),
            summary=summary,
            rollout=rollout,
        )

    def _read(self, model: type[_Model], text: str) -> _Model:
        try:
            return model.model_validate_json(text)
        except ValidationError as error:
            expected = f"a {model.__name__} of this version"
            raise MalformedFileError(self.path, expected, seen=f"{text[:80]} ({error.errors()[0]['msg']})") from error


def _alert_rows(db: sqlite3.Connection) -> list[_AlertRow]:
    return db.execute("SELECT group_key, labels, starts_at, resolved, summary, rollout FROM alerts").fetchall()


def _alert_row(alert: KnownAlert) -> _AlertRow:
    labels = json.dumps(alert.labels)
    return alert.group_key, labels, alert.starts_at, int(alert.resolved), alert.summary, alert.rollout
