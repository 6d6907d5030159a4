"""The event log in one SQLite file, for one machine and any number of processes. An append returns once it is on disk.

The log has one partition. Retention keeps every record that a consumer which has ever committed still has to read, so
a consumer that stops for good must be removed with ``remove_consumer``.
"""

from __future__ import annotations

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
    version=1,
    schema=(
        """CREATE TABLE records (
               offset INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, time_us INTEGER NOT NULL,
               payload BLOB NOT NULL)""",
        "CREATE TABLE consumers (name TEXT PRIMARY KEY, next INTEGER NOT NULL) WITHOUT ROWID",
    ),
)
MAX_RECORD_BYTES: Final = 1 << 20
POLL_INTERVAL_S: Final = 0.05
RETENTION_INTERVAL_S: Final = 600.0


class SqliteLog:
    """An ``EventLog`` in a file, created when it does not exist.

    Args:
        retain_s: minimum age in seconds at which a record may be deleted, read or not.
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
        rows = [(record.id, record.time_us, record.payload) for record in records]
        with self._file.writing() as db:
            offsets = []
            for row in rows:
                inserted = db.execute(
                    "INSERT INTO records (id, time_us, payload) VALUES (?, ?, ?) ON CONFLICT (id) DO NOTHING", row
                )
                if inserted.rowcount:
                    offsets.append(int(inserted.lastrowid or 0))
                else:
                    (before,) = db.execute("SELECT offset FROM records WHERE id = ?", row[:1]).fetchone()
                    offsets.append(before)
        return offsets

    def read(self, position: Offsets, *, limit: int, wait_s: float = 0.0) -> ReadBatch:
        """See ``EventLog.read``."""
        first = position.get(0, 1)
        deadline = time.monotonic() + wait_s
        while True:
            asked_us = int(self._clock() * 1e6)
            with self._file.reading() as db:
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
        return ReadBatch(records, {0: after}, records[-1].time_us if full else asked_us)

    def committed(self, consumer: str) -> Offsets:
        """See ``EventLog.committed``."""
        with self._file.reading() as db:
            row = db.execute("SELECT next FROM consumers WHERE name = ?", (consumer,)).fetchone()
        return {0: row[0]} if row else {}

    def commit(self, consumer: str, position: Offsets) -> None:
        """See ``EventLog.commit``. A smaller offset than before is accepted: retained records are read again."""
        with self._file.writing() as db:
            db.execute(
                "INSERT INTO consumers VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET next = excluded.next",
                (consumer, position.get(0, 1)),
            )

    def remove_consumer(self, consumer: str) -> None:
        """Deletes a consumer's committed offset, so that no record is retained for it."""
        with self._file.writing() as db:
            db.execute("DELETE FROM consumers WHERE name = ?", (consumer,))

    def end_offsets(self) -> Offsets:
        """See ``EventLog.end_offsets``."""
        with self._file.reading() as db:
            row = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'records'").fetchone()
        return {0: row[0] + 1 if row else 1}

    def apply_retention(self) -> int:
        """Deletes records older than ``retain_s`` that every consumer has read. ``append`` calls it regularly.

        Returns:
            The number of deleted records.
        """
        oldest_us = int((self._clock() - self._retain_s) * 1e6)
        with self._file.writing() as db:
            return db.execute(
                "DELETE FROM records WHERE time_us < ?"
                " AND offset < coalesce((SELECT min(next) FROM consumers), 1 << 62)",
                (oldest_us,),
            ).rowcount

    def close(self) -> None:
        self._file.close()
