"""Parked records: records of an event log that a consumer cannot read, kept in a SQLite file so that it can continue.

A record is parked once per log, partition and offset, however often it is read. The file is bounded: the oldest parked
records are deleted first.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from reelway.platform.retention import DAY_S, retention
from reelway.platform.sqlite_file import SqliteFile, SqliteFormat

_FORMAT: Final = SqliteFormat(
    description="a file of parked records",
    application_id=0x72656570,
    version=1,
    schema=(
        """CREATE TABLE parked (
               number INTEGER PRIMARY KEY AUTOINCREMENT, log TEXT NOT NULL, "partition" INTEGER NOT NULL,
               offset INTEGER NOT NULL, time_us INTEGER NOT NULL, kind TEXT NOT NULL, reason TEXT NOT NULL,
               payload BLOB NOT NULL, UNIQUE (log, "partition", offset))""",
    ),
)
_COLUMNS: Final = 'log, "partition", offset, time_us, kind, reason, payload'
MAX_RECORDS: Final = 10_000
MAX_BYTES: Final = 64 << 20
MAX_REASON_CHARACTERS: Final = 500


class ParkedRecord(NamedTuple):
    """A record that was not read, or not completely."""

    log: str  # EventLog.name
    partition: int
    offset: int
    time_us: int
    kind: str  # short, from a fixed set: the label of a metric
    reason: str  # for people; cut to MAX_REASON_CHARACTERS
    payload: bytes


class ParkedRecords:
    """The file, created when it does not exist.

    Args:
        max_records: parked records beyond which the oldest are deleted.
        max_bytes: sum of the payloads' bytes beyond which the oldest are deleted.
        retain_s: how much older than the newest record a record may be; by default ``retention`` says so.

    Raises:
        MalformedFileError: if the file is not one of parked records.
        StorageError: if it cannot be opened or written. ``park`` raises these two as well.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_records: int = MAX_RECORDS,
        max_bytes: int = MAX_BYTES,
        retain_s: float | None = None,
    ) -> None:
        self._file = SqliteFile(path, _FORMAT)
        self._max_records, self._max_bytes = max_records, max_bytes
        self._retain_s = retention().parked_days * DAY_S if retain_s is None else retain_s

    def park(self, records: Sequence[ParkedRecord]) -> None:
        """Stores records that are not yet parked."""
        rows = [record._replace(reason=record.reason[:MAX_REASON_CHARACTERS]) for record in records]
        with self._file.writing() as db:
            db.executemany(
                'INSERT OR IGNORE INTO parked (log, "partition", offset, time_us, kind, reason, payload)'
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                rows,
            )
            newest_us = max((record.time_us for record in rows), default=0)
            db.execute("DELETE FROM parked WHERE time_us < ?", (newest_us - int(self._retain_s * 1e6),))
            db.execute(
                "DELETE FROM parked WHERE number IN (SELECT number FROM (SELECT number,"
                " sum(length(payload)) OVER newest_first AS bytes, row_number() OVER newest_first AS records"
                " FROM parked WINDOW newest_first AS (ORDER BY number DESC)) WHERE bytes > ? OR records > ?)",
                (self._max_bytes, self._max_records),
            )

    def count(self, concerns: Callable[[ParkedRecord], bool]) -> int:
        """Returns the number of parked records for which ``concerns`` returns True."""
        with self._file.reading() as db:
            return sum(concerns(record) for _, record in _numbered(db))

    def delete(self, concerns: Callable[[ParkedRecord], bool]) -> int:
        """Deletes the parked records for which ``concerns`` returns True, for good. Returns their number."""
        with self._file.erasing() as db:
            numbers = [(number,) for number, record in _numbered(db) if concerns(record)]
            db.executemany("DELETE FROM parked WHERE number = ?", numbers)
        self._file.truncate_wal()
        return len(numbers)

    def records(self) -> list[ParkedRecord]:
        """All parked records, oldest first."""
        with self._file.reading() as db:
            return [record for _, record in _numbered(db)]

    def close(self) -> None:
        self._file.close()


def _numbered(db: sqlite3.Connection) -> Iterator[tuple[int, ParkedRecord]]:
    for number, *columns in db.execute(f"SELECT number, {_COLUMNS} FROM parked ORDER BY number"):
        yield number, ParkedRecord(*columns)
