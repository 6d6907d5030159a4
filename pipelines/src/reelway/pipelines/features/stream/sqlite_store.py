"""The state of a stream on one machine: a SQLite file that one process holds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from reelway.pipelines.features.windows import I64
from reelway.platform.sqlite_file import SqliteFile, SqliteFormat

_FORMAT: Final = SqliteFormat(
    description="a stream's state",
    application_id=0x72657373,
    version=1,
    schema=(
        "CREATE TABLE tables (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE)",
        'CREATE TABLE entries ("table" INTEGER NOT NULL, key INTEGER NOT NULL, value BLOB NOT NULL,'
        ' PRIMARY KEY ("table", key)) WITHOUT ROWID',
        "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
        "CREATE TABLE undelivered (number INTEGER PRIMARY KEY AUTOINCREMENT, rows BLOB NOT NULL)",
    ),
    pragmas=("cache_size = -65536",),
    exclusive=True,
    remedy="move the file away, and the stream begins again from the data set",
)


class SqliteStore:
    """A ``KeyedStore`` in a file, with the host's position and the rows that are not delivered yet.

    All changes are made within ``transaction``.

    Raises:
        MalformedFileError: if the file is of another kind.
        StorageError: if it cannot be opened or written, is held by another process, or has another schema version.
    """

    def __init__(self, path: Path, *, wait_s: float = 30.0) -> None:
        self._file = SqliteFile(path, _FORMAT, busy_timeout_s=wait_s)
        self._db = self._file.connection
        self._numbers: dict[str, int] = {}

    def close(self) -> None:
        self._file.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes of the block are on disk when it ends, or none if it raises."""
        try:
            with self._file.writing():
                yield
        except BaseException:
            self._numbers.clear()
            raise

    @contextmanager
    def erasing(self, *, keep: bool) -> Iterator[None]:
        """Like ``transaction``, and overwrites what it deletes. With ``keep=False``, all changes are taken back."""
        try:
            with self._file.erasing() as db:
                db.execute("SAVEPOINT before")
                yield
                if not keep:
                    db.execute("ROLLBACK TO before")
        finally:
            self._numbers.clear()
        self._file.truncate_wal()

    def get_many(self, table: str, keys: I64) -> list[bytes | None]:
        """See ``KeyedStore.get_many``."""
        if not len(keys):
            return []
        with self._file.translated_errors():
            found = dict(  # CROSS JOIN: SQLite looks up each key
                self._db.execute(
                    "SELECT e.key, e.value FROM json_each(?) w CROSS JOIN entries e"
                    ' WHERE e."table" = ? AND e.key = w.value',
                    (json.dumps(keys.tolist()), self._number(table)),
                ).fetchall()
            )
        return [found.get(key) for key in keys.tolist()]

    def put_many(self, table: str, keys: I64, values: Sequence[bytes]) -> None:
        """See ``KeyedStore.put_many``."""
        number = self._number(table)
        rows = [(number, key, value) for key, value in zip(keys.tolist(), values, strict=True)]
        with self._file.translated_errors():
            self._db.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", rows)

    def delete_many(self, table: str, keys: I64) -> None:
        """See ``KeyedStore.delete_many``."""
        number = self._number(table)
        with self._file.translated_errors():
            self._db.executemany(
                'DELETE FROM entries WHERE "table" = ? AND key = ?', [(number, key) for key in keys.tolist()]
            )

    def get(self, name: str) -> Any:
        """Returns a setting of the host, None if it was never put."""
        with self._file.translated_errors():
            row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return json.loads(row[0]) if row else None

    def put(self, **values: Any) -> None:
        """Stores settings of the host that JSON can encode."""
        with self._file.translated_errors():
            self._db.executemany(
                "INSERT OR REPLACE INTO meta VALUES (?, ?)",
                [(name, json.dumps(value)) for name, value in values.items()],
            )

    def add_undelivered(self, rows: bytes) -> None:
        with self._file.translated_errors():
            self._db.execute("INSERT INTO undelivered (rows) VALUES (?)", (rows,))

    def undelivered(self) -> list[tuple[int, bytes]]:
        """Returns the rows that are not delivered, oldest first, by a number that is never given twice."""
        with self._file.translated_errors():
            return self._db.execute("SELECT number, rows FROM undelivered ORDER BY number").fetchall()

    def replace_undelivered(self, number: int, rows: bytes) -> None:
        with self._file.translated_errors():
            self._db.execute("UPDATE undelivered SET rows = ? WHERE number = ?", (rows, number))

    def delete_undelivered(self, number: int) -> None:
        """Deletes rows up to a number, in a transaction of its own."""
        with self.transaction():
            self._db.execute("DELETE FROM undelivered WHERE number <= ?", (number,))

    def _number(self, table: str) -> int:
        """Returns the number of a table, which is created when it does not exist."""
        if table not in self._numbers:
            with self._file.translated_errors():
                self._db.execute("INSERT OR IGNORE INTO tables (name) VALUES (?)", (table,))
                found = self._db.execute("SELECT number FROM tables WHERE name = ?", (table,)).fetchone()
            self._numbers[table] = int(found[0])
        return self._numbers[table]
