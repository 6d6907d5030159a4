"""The stream's state: a SQLite file that one process holds, with one transaction per step and log position.

This module handles rows and transactions, not features. The rows of a step stay in the outbox until they are
delivered. So a process that is killed at any time loses no row and recomputes none.
"""

# Shapes: N rows of E entities, K columns

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np

from reelway.pipelines.features.stream.due_times import NEVER_US
from reelway.pipelines.features.stream.open_impressions import OpenImpressions
from reelway.pipelines.features.stream.time_buckets import LAYOUTS, STREAMED
from reelway.pipelines.features.windows import I64
from reelway.platform.errors import StorageError
from reelway.platform.sqlite_file import immediate_transaction

SCHEMA_VERSION: Final = 1
_OPEN: Final = ("impression_id", "viewer_id", "video_id", "shown_us", "kinds", "watch_ms", "known_us")
_SCHEMA: Final = "\n".join(
    [
        "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;",
        "CREATE TABLE pending (place INTEGER PRIMARY KEY, outcomes BLOB NOT NULL);",
        "CREATE TABLE outbox (place INTEGER PRIMARY KEY AUTOINCREMENT, rows BLOB NOT NULL);",
        "CREATE TABLE open (impression_id INTEGER PRIMARY KEY, viewer_id INTEGER NOT NULL, video_id INTEGER NOT NULL,"
        " shown_us INTEGER NOT NULL, kinds INTEGER NOT NULL, watch_ms REAL NOT NULL, known_us INTEGER NOT NULL);",
        "CREATE INDEX open_by_age ON open (shown_us);",
        *(
            f"CREATE TABLE {view} (id INTEGER PRIMARY KEY, rows BLOB NOT NULL, last_us INTEGER NOT NULL,"
            f" due_us INTEGER NOT NULL);\nCREATE INDEX {view}_by_due ON {view} (due_us);"
            for view in STREAMED
        ),
    ]
)


class Entities:
    """Some entities of a view: ids ``[E]`` ascending, their rows in that order, when each was last written and is due.

    ``last_us`` and ``due_us`` are ``-NEVER_US`` and ``NEVER_US`` for an entity that is new.
    """

    def __init__(self, ids: I64, owner: I64, rows: I64, last_us: I64, due_us: I64) -> None:
        self.ids, self.owner, self.rows, self.last_us, self.due_us = ids, owner, rows, last_us, due_us

    def of(self, rows: I64) -> I64:
        """Ids of these rows' entities, by their owner."""
        return self.ids[rows]


class StreamState:
    """The file. Held by one process while it is open.

    Raises:
        StorageError: it cannot be opened, is held by another process, or was written by another version.
    """

    def __init__(self, path: Path, *, wait_s: float = 30.0) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=wait_s, isolation_level=None)
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise
        except (sqlite3.Error, OSError) as error:
            raise StorageError(f"{path}: cannot open the stream's state: {error}; one process at a time may") from error

    def _prepare(self) -> None:
        for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = FULL", "cache_size = -65536"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.execute("BEGIN IMMEDIATE")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            for statement in _SCHEMA.split(";\n"):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        self._db.execute("COMMIT")
        if version not in (0, SCHEMA_VERSION):
            raise StorageError(
                f"{self._path}: a stream's state of schema {version}, expected {SCHEMA_VERSION}; move the file away, "
                "and the stream begins again from the data set"
            )

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of the block is on disk when it is left, or nothing of it."""
        try:
            with immediate_transaction(self._db):
                yield
        except sqlite3.Error as error:
            raise StorageError(f"{self._path}: cannot write the stream's state: {error}") from error

    def get(self, name: str) -> Any:
        """A setting of the stream, ``None`` where it was never put."""
        row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return json.loads(row[0]) if row else None

    def put(self, **values: Any) -> None:
        self._db.executemany(
            "INSERT INTO meta VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
            [(name, json.dumps(value)) for name, value in values.items()],
        )

    def entities(self, view: str, ids: I64) -> Entities:
        """The entities with these ids (ascending, once each), known or not."""
        width = len(LAYOUTS[view].columns)
        found = self._db.execute(
            f"SELECT v.id, rows, last_us, due_us FROM {view} v JOIN json_each(?) j ON j.value = v.id ORDER BY v.id",
            (json.dumps(ids.tolist()),),
        ).fetchall()
        last = np.full(len(ids), -NEVER_US, dtype=np.int64)
        due = np.full(len(ids), NEVER_US, dtype=np.int64)
        if not found:
            return Entities(ids, np.zeros(0, np.int64), np.zeros((0, width), np.int64), last, due)
        known, blobs, last_us, due_us = zip(*found, strict=True)
        at = np.searchsorted(ids, np.array(known, np.int64))
        last[at], due[at] = last_us, due_us
        rows = np.frombuffer(b"".join(blobs), dtype=np.int64).reshape(-1, width)
        return Entities(ids, np.repeat(at, [len(blob) // (8 * width) for blob in blobs]), rows, last, due)

    def save(self, view: str, entities: Entities) -> None:
        """Write the entities as they are now; their rows are in the order of their owners."""
        ends = np.searchsorted(entities.owner, np.arange(len(entities.ids)), side="right").tolist()
        raw, width, start, table = np.ascontiguousarray(entities.rows).tobytes(), 8 * entities.rows.shape[1], 0, []
        for one, last, due, end in zip(
            entities.ids.tolist(), entities.last_us.tolist(), entities.due_us.tolist(), ends, strict=True
        ):
            table.append((one, raw[start * width : end * width], last, due))
            start = end
        self._db.executemany(f"INSERT OR REPLACE INTO {view} VALUES (?, ?, ?, ?)", table)

    def delete_entities(self, view: str, ids: I64) -> None:
        """Nothing is known of them any more."""
        self._db.executemany(f"DELETE FROM {view} WHERE id = ?", [(one,) for one in ids.tolist()])

    def due(self, view: str, until_us: int) -> I64:
        """Entities that have something due by then, ascending."""
        found = self._db.execute(f"SELECT id FROM {view} WHERE due_us <= ? ORDER BY id", (until_us,)).fetchall()
        return np.array([row[0] for row in found], dtype=np.int64)

    def next_due_us(self, view: str) -> int:
        """When the first of them has something due."""
        (first,) = self._db.execute(f"SELECT min(due_us) FROM {view}").fetchone()
        return NEVER_US if first is None else int(first)

    def impressions(self, ids: I64) -> OpenImpressions:
        """Those of these that are open, ascending."""
        found = self._db.execute(
            f"SELECT {', '.join(_OPEN)} FROM open JOIN json_each(?) ON value = impression_id ORDER BY impression_id",
            (json.dumps(ids.tolist()),),
        ).fetchall()
        columns = zip(*found, strict=True) if found else ((),) * len(_OPEN)
        kinds = {"watch_ms": np.float64}
        values: dict[str, Any] = {
            name: np.array(column, kinds.get(name, np.int64)) for name, column in zip(_OPEN, columns, strict=True)
        }
        return OpenImpressions(**values)

    def save_impressions(self, impressions: OpenImpressions) -> None:
        rows = zip(*(getattr(impressions, name).tolist() for name in _OPEN), strict=True)
        self._db.executemany("INSERT OR REPLACE INTO open VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def close_impressions(self, shown_before_us: int) -> None:
        """Forget impressions that nothing can change any more."""
        self._db.execute("DELETE FROM open WHERE shown_us < ?", (shown_before_us,))

    def pending(self) -> bytes | None:
        """What was read and is not yet due."""
        row = self._db.execute("SELECT outcomes FROM pending").fetchone()
        return row[0] if row else None

    def put_pending(self, outcomes: bytes) -> None:
        self._db.execute("INSERT OR REPLACE INTO pending VALUES (0, ?)", (outcomes,))

    def append_outbox(self, rows: bytes) -> None:
        """Into the outbox."""
        self._db.execute("INSERT INTO outbox (rows) VALUES (?)", (rows,))

    def outbox(self) -> Iterable[tuple[int, bytes]]:
        """What was not delivered yet, oldest first: its number, which is never given twice, and its content."""
        found: list[tuple[int, bytes]] = self._db.execute("SELECT place, rows FROM outbox ORDER BY place").fetchall()
        return found

    def delete_outbox_entry(self, entry_id: int) -> None:
        with self.transaction():
            self._db.execute("DELETE FROM outbox WHERE place <= ?", (entry_id,))
