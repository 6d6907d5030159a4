"""The event log in one SQLite file: for one machine, any number of processes, durable before it acknowledges.

One partition. Retention removes what is old, but nothing that a consumer that ever committed still has to read. Who no
longer reads says so with ``forget``.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from reelway.platform.durable import whole_transaction
from reelway.platform.errors import StorageError
from reelway.platform.eventlog.log import LogRecord, Position, ReadBatch, StoredRecord

SCHEMA_VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE records (
    offset INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, time_us INTEGER NOT NULL, payload BLOB NOT NULL
);
CREATE TABLE consumers (name TEXT PRIMARY KEY, next INTEGER NOT NULL) WITHOUT ROWID;
"""
LOOK_EVERY_S: Final = 0.05
CLEAN_EVERY_S: Final = 600.0


class SqliteLog:
    """See the module's docstring.

    Args:
        path: made when absent.
        retain_s: a record is kept at least this long, read or not.
        wait_s: for other processes' writes.
        clock: Unix seconds.

    Raises:
        StorageError: it cannot be opened, or was written by another version.
    """

    partitions = 1

    def __init__(
        self,
        path: Path,
        *,
        retain_s: float = 7 * 86_400.0,
        wait_s: float = 30.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._retain_s = retain_s
        self._clock = clock
        self._next_clean = time.monotonic() + CLEAN_EVERY_S
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=wait_s, isolation_level=None, check_same_thread=False)
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise
        except (sqlite3.Error, OSError) as error:
            raise StorageError(f"{path}: cannot open the event log: {error}") from error

    def _prepare(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")  # acknowledged means that it outlives the power
        self._db.execute("BEGIN IMMEDIATE")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            for statement in _SCHEMA.split(";\n"):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        self._db.execute("COMMIT")
        if version not in (0, SCHEMA_VERSION):
            raise StorageError(
                f"{self._path}: an event log of schema {version}, expected {SCHEMA_VERSION}; move the file away"
            )

    def append(self, records: Sequence[LogRecord]) -> list[int]:
        """See ``EventLog.append``; after an error here, none of them is there."""
        if time.monotonic() >= self._next_clean:
            self._next_clean = time.monotonic() + CLEAN_EVERY_S
            self.clean()
        rows = [(record.id, record.time_us, record.payload) for record in records]
        with self._writing():
            offsets = []
            for row in rows:
                inserted = self._db.execute(
                    "INSERT INTO records (id, time_us, payload) VALUES (?, ?, ?) ON CONFLICT (id) DO NOTHING", row
                )
                if inserted.rowcount:
                    offsets.append(int(inserted.lastrowid or 0))
                else:
                    (before,) = self._db.execute("SELECT offset FROM records WHERE id = ?", row[:1]).fetchone()
                    offsets.append(before)
        return offsets

    def read(self, position: Position, *, limit: int, wait_s: float = 0.0) -> ReadBatch:
        """See ``EventLog.read``."""
        first = position.get(0, 1)
        deadline = time.monotonic() + wait_s
        while True:
            asked_us = int(self._clock() * 1e6)
            with self._reading():
                found = self._db.execute(
                    "SELECT 0, offset, time_us, payload FROM records WHERE offset >= ? ORDER BY offset LIMIT ?",
                    (first, limit),
                ).fetchall()
            if found or time.monotonic() >= deadline:
                break
            time.sleep(LOOK_EVERY_S)
        records = [StoredRecord(*row) for row in found]
        after = records[-1].offset + 1 if records else first
        full = len(records) == limit
        return ReadBatch(records, {0: after}, records[-1].time_us if full else asked_us)

    def position(self, consumer: str) -> Position:
        """See ``EventLog.position``."""
        with self._reading():
            row = self._db.execute("SELECT next FROM consumers WHERE name = ?", (consumer,)).fetchone()
        return {0: row[0]} if row else {}

    def commit(self, consumer: str, position: Position) -> None:
        """See ``EventLog.commit``. A position may go back: what is still there is read again."""
        with self._writing():
            self._db.execute(
                "INSERT INTO consumers VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET next = excluded.next",
                (consumer, position.get(0, 1)),
            )

    def forget(self, consumer: str) -> None:
        """The consumer is gone: nothing is kept for it."""
        with self._writing():
            self._db.execute("DELETE FROM consumers WHERE name = ?", (consumer,))

    def end(self) -> Position:
        """See ``EventLog.end``."""
        with self._reading():
            row = self._db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'records'").fetchone()
        return {0: row[0] + 1 if row else 1}

    def clean(self) -> int:
        """Remove what is older than ``retain_s`` and read by every consumer; returns how many. ``append`` calls it."""
        oldest_us = int((self._clock() - self._retain_s) * 1e6)
        with self._writing():
            return self._db.execute(
                "DELETE FROM records WHERE time_us < ?"
                " AND offset < coalesce((SELECT min(next) FROM consumers), 1 << 62)",
                (oldest_us,),
            ).rowcount

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._db.close()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except sqlite3.Error as error:
                raise StorageError(f"{self._path}: cannot read the event log: {error}") from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction: all of the block is on disk when it is left, or nothing of it."""
        with self._lock:
            try:
                with whole_transaction(self._db):
                    yield
            except sqlite3.Error as error:
                raise StorageError(f"{self._path}: cannot write the event log: {error}; nothing was written") from error
