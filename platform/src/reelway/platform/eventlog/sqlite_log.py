"""The event log in one SQLite file, for one machine and any number of processes. An append returns once it is on disk.

The log has one partition. Records get their time in the transaction that appends them: the clock's time, or that of the
record before if the clock was set back. Retention deletes old records, read or not. A record with a
compaction key stays as long as it is the newest of its key.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from reelway.platform.errors import StorageError
from reelway.platform.eventlog.event_log import LogRecord, Offsets, ReadBatch, StoredRecord
from reelway.platform.sqlite_file import SqliteFile, SqliteFormat

_FORMAT: Final = SqliteFormat(
    description="an event log",
    application_id=0x7265656D,
    version=2,
    schema=(
        """CREATE TABLE records (
               offset INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, key TEXT NOT NULL,
               time_us INTEGER NOT NULL, payload BLOB NOT NULL)""",
        "CREATE INDEX records_by_time ON records (time_us)",
        "CREATE INDEX records_by_key ON records (key, offset) WHERE key != ''",
        # No later record has an earlier time.
        "CREATE TABLE log_time (newest_us INTEGER NOT NULL)",
        "INSERT INTO log_time VALUES (0)",
    ),
)
MAX_RECORD_BYTES: Final = 1 << 20
POLL_INTERVAL_S: Final = 0.05
TIME_INTERVAL_US: Final = 250_000
"""How far the log's time may be behind the clock before a reader at the log's end advances it."""
RETENTION_INTERVAL_S: Final = 600.0
REWRITE_RECORDS: Final = 200
"""Records that one transaction of ``rewrite`` reads."""


class SqliteLog:
    """An ``EventLog`` in a file, created when it does not exist.

    Args:
        retain_s: age in seconds from which a record may be deleted.
        busy_timeout_s: how long an operation waits for another process's transaction.
        clock: Unix seconds.

    Raises:
        MalformedFileError: if the file is not an event log.
        StorageError: if it cannot be opened, or has another schema version.
    """

    partitions = 1
    max_record_bytes = MAX_RECORD_BYTES

    def __init__(
        self,
        path: Path,
        *,
        retain_s: float = 7 * 86_400.0,
        busy_timeout_s: float = 30.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.name = str(path)
        self._file = SqliteFile(path, _FORMAT, busy_timeout_s=busy_timeout_s)
        self._retain_s = retain_s
        self._clock = clock
        self._next_retention = time.monotonic() + RETENTION_INTERVAL_S

    def append(self, records: Sequence[LogRecord]) -> list[int]:
        """See ``EventLog.append``. If it raises, none of the records is in the log."""
        largest = max((len(record.payload) for record in records), default=0)
        if largest > self.max_record_bytes:
            raise StorageError(
                f"event log {self.name}: a record has {largest} bytes, at most {self.max_record_bytes} are accepted; "
                "split the record"
            )
        if time.monotonic() >= self._next_retention:
            self._next_retention = time.monotonic() + RETENTION_INTERVAL_S
            self.apply_retention()
        with self._file.writing() as db:
            time_us = self._set_newest_time(db)
            offsets = []
            for record in records:
                inserted = db.execute(
                    "INSERT INTO records (id, key, time_us, payload) VALUES (?, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
                    (record.id, record.key, time_us, record.payload),
                )
                if inserted.rowcount:
                    offsets.append(int(inserted.lastrowid or 0))
                else:
                    (before,) = db.execute("SELECT offset FROM records WHERE id = ?", (record.id,)).fetchone()
                    offsets.append(before)
        return offsets

    def read(self, position: Offsets, *, limit: int, wait_s: float = 0.0) -> ReadBatch:
        """See ``EventLog.read``."""
        first = position.get(0, 1)
        deadline = time.monotonic() + wait_s
        while True:
            self._advance_time()
            with self._file.reading() as db:
                (newest_us,) = db.execute("SELECT newest_us FROM log_time").fetchone()
                rows = db.execute(
                    "SELECT 0, offset, time_us, payload FROM records WHERE offset >= ? ORDER BY offset LIMIT ?",
                    (first, limit),
                ).fetchall()
            if rows or time.monotonic() >= deadline:
                break
            time.sleep(POLL_INTERVAL_S)
        records = [StoredRecord(*row) for row in rows]
        after = records[-1].offset + 1 if records else first
        full = len(records) == limit
        return ReadBatch(records, {0: after}, records[-1].time_us if full else newest_us)

    def offsets_at(self, time_us: int) -> Offsets:
        """See ``EventLog.offsets_at``."""
        with self._file.reading() as db:
            (first,) = db.execute("SELECT min(offset) FROM records WHERE time_us >= ?", (time_us,)).fetchone()
        return self.end_offsets() if first is None else {0: first}

    def end_offsets(self) -> Offsets:
        """See ``EventLog.end_offsets``."""
        with self._file.reading() as db:
            row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'records'").fetchone()
        return {0: row[0] + 1 if row else 1}

    def apply_retention(self) -> int:
        """Deletes records older than ``retain_s`` except the newest of each key. ``append`` calls it regularly.

        Returns:
            The number of deleted records.
        """
        oldest_us = int((self._clock() - self._retain_s) * 1e6)
        with self._file.writing() as db:
            return db.execute(
                "DELETE FROM records WHERE time_us < ? AND (key = '' OR EXISTS"
                " (SELECT 1 FROM records later WHERE later.key = records.key AND later.key != ''"
                " AND later.offset > records.offset))",
                (oldest_us,),
            ).rowcount

    def rewrite(self, rewritten: Callable[[bytes], bytes]) -> None:
        """Replaces payloads of retained records for good; other records keep their offsets and times.

        Each transaction covers some records, so a call that ends early is completed by another one.

        Args:
            rewritten: returns a record's new payload, or the same object to leave it unchanged.
        """
        first = 0
        while True:
            with self._file.erasing() as db:
                rows = db.execute(
                    "SELECT offset, payload FROM records WHERE offset >= ? ORDER BY offset LIMIT ?",
                    (first, REWRITE_RECORDS),
                ).fetchall()
                for offset, before in rows:
                    after = rewritten(before)
                    if after is not before:
                        db.execute("UPDATE records SET payload = ? WHERE offset = ?", (after, offset))
            if len(rows) < REWRITE_RECORDS:
                break
            first = rows[-1][0] + 1
        self._file.truncate_wal()

    def close(self) -> None:
        self._file.close()

    def _set_newest_time(self, db: sqlite3.Connection) -> int:
        """Advances the log's time to the clock's, within a transaction. Returns the log's time."""
        now_us = int(self._clock() * 1e6)
        updated = db.execute("UPDATE log_time SET newest_us = max(newest_us, ?) RETURNING newest_us", (now_us,))
        return int(updated.fetchall()[0][0])

    def _advance_time(self) -> None:
        """Advances the log's time if it is far behind the clock, so that a reader may use the time until now.

        The write is not synced. If a power failure loses it, the clock is later than it when the log is used again.
        """
        with self._file.translated_errors():
            db = self._file.connection
            (newest_us,) = db.execute("SELECT newest_us FROM log_time").fetchone()
            if int(self._clock() * 1e6) - newest_us < TIME_INTERVAL_US:
                return
            db.execute("PRAGMA synchronous = NORMAL")
            try:
                with self._file.writing():
                    self._set_newest_time(db)
            finally:
                db.execute("PRAGMA synchronous = FULL")
