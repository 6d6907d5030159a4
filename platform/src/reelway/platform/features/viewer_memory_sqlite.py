"""Viewer memory in one SQLite file, which all processes of a machine share."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from reelway.platform.features.viewer_memory import (
    F64,
    I64,
    MAX_CHOICES,
    ShownSlate,
    ViewerMemoryState,
    memory_state,
    oldest_shown_s,
    pack_shown,
    trim_shown,
)
from reelway.platform.features.watched_filter import add_to_filter, live_generations, positions_by_filter
from reelway.platform.sqlite_file import SqliteFile, SqliteFormat

_CREATOR, _TOPIC, _FOLLOWED = 0, 1, 2
_VIEWER_TABLES: Final = ("shown", "watched", "blocked", "followed")
_PRUNE_EVERY_S: Final = 600.0
_READ_CHOICES: Final = (
    "SELECT kind, id FROM blocked WHERE viewer_id = ? "
    f"UNION ALL SELECT {_FOLLOWED}, creator_id FROM followed WHERE viewer_id = ?"
)

# A power failure may lose the last commits, but does not damage the file. A new file is rebuilt from the event log.
_FORMAT: Final = SqliteFormat(
    description="a viewer memory",
    application_id=0x52574D4D,
    version=2,
    schema=(
        "CREATE TABLE shown (viewer_id INTEGER PRIMARY KEY, newest_s INTEGER NOT NULL, entries BLOB NOT NULL)",
        "CREATE TABLE watched (viewer_id INTEGER, generation INTEGER, bits BLOB NOT NULL, "
        "PRIMARY KEY (viewer_id, generation)) WITHOUT ROWID",
        # a row that is reported again gets a new, larger row id
        "CREATE TABLE blocked (viewer_id INTEGER, kind INTEGER, id INTEGER, UNIQUE (viewer_id, kind, id))",
        "CREATE TABLE followed (viewer_id INTEGER, creator_id INTEGER, UNIQUE (viewer_id, creator_id))",
        "CREATE TABLE marker (complete INTEGER NOT NULL)",
    ),
    pragmas=("synchronous = NORMAL", "cache_size = -8192"),
    remedy="delete the file; the stream rebuilds it from the event log",
)


class SqliteViewerMemory:
    """``ViewerMemory`` in a SQLite file.

    Args:
        path: missing parent folders are created.
        clock: current time in Unix seconds.

    Raises:
        StorageError: if the file cannot be opened; see ``SqliteFile``.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._written = SqliteFile(path, _FORMAT)
        self._read = SqliteFile(path, _FORMAT)  # a read does not wait for the transaction of this process's writer
        self._clock = clock
        self._next_prune_s = 0.0

    def close(self) -> None:
        self._written.close()
        self._read.close()

    def read(self, viewer_id: int) -> ViewerMemoryState:
        first = live_generations(self._clock()).start
        with self._read.reading() as db:
            shown = db.execute("SELECT entries FROM shown WHERE viewer_id = ?", [viewer_id]).fetchone()
            filters = db.execute(
                "SELECT generation, bits FROM watched WHERE viewer_id = ? AND generation >= ?", [viewer_id, first]
            ).fetchall()
            choices = db.execute(_READ_CHOICES, [viewer_id, viewer_id]).fetchall()
        return memory_state(
            shown[0] if shown else b"",
            filters,
            *([id_ for of_kind, id_ in choices if of_kind == kind] for kind in (_CREATOR, _TOPIC, _FOLLOWED)),
        )

    def remember_shown(self, viewer_id: int, video_ids: Sequence[int] | I64, shown_at_s: float) -> None:
        self.remember_slates([ShownSlate(viewer_id, np.asarray(video_ids, dtype=np.int64), shown_at_s)])

    def remember_slates(self, slates: Sequence[ShownSlate]) -> None:
        with self._written.writing() as db:
            self._prune(db)
            for slate in slates:
                self._add_shown(db, slate.viewer_id, b"", pack_shown(slate.video_ids, slate.shown_at_s))

    def restore_shown(self, viewer_id: int, video_ids: I64, shown_at_s: F64) -> None:
        with self._written.writing() as db:
            self._add_shown(db, viewer_id, pack_shown(video_ids, shown_at_s), b"")

    def remember_watched(self, viewer_ids: I64, video_ids: I64, watched_at_s: F64) -> None:
        with self._written.writing() as db:
            for viewer_id, generation, positions in positions_by_filter(viewer_ids, video_ids, watched_at_s):
                key = [viewer_id, generation]
                found = db.execute("SELECT bits FROM watched WHERE viewer_id = ? AND generation = ?", key).fetchone()
                bits = add_to_filter(found[0] if found else b"", positions)
                db.execute("INSERT OR REPLACE INTO watched VALUES (?, ?, ?)", [*key, bits])

    def block(self, viewer_id: int, *, creators: Sequence[int] = (), topics: Sequence[int] = ()) -> None:
        rows = [(viewer_id, _CREATOR, int(id_)) for id_ in creators]
        rows += [(viewer_id, _TOPIC, int(id_)) for id_ in topics]
        with self._written.writing() as db:
            db.executemany("INSERT OR REPLACE INTO blocked VALUES (?, ?, ?)", rows)
            _forget_surplus(db, "blocked", viewer_id)

    def follow(self, viewer_id: int, creators: Sequence[int]) -> None:
        rows = [(viewer_id, int(creator)) for creator in creators]
        with self._written.writing() as db:
            db.executemany("INSERT OR REPLACE INTO followed VALUES (?, ?)", rows)
            _forget_surplus(db, "followed", viewer_id)

    def count_entries(self, viewer_id: int) -> int:
        with self._read.reading() as db:
            return sum(
                db.execute(f"SELECT count(*) FROM {table} WHERE viewer_id = ?", [viewer_id]).fetchone()[0]
                for table in _VIEWER_TABLES
            )

    def forget(self, viewer_id: int) -> int:
        with self._written.erasing() as db:
            deleted = sum(
                db.execute(f"DELETE FROM {table} WHERE viewer_id = ?", [viewer_id]).rowcount for table in _VIEWER_TABLES
            )
        self._written.truncate_wal()
        return deleted

    def is_complete(self) -> bool:
        with self._read.reading() as db:
            return db.execute("SELECT complete FROM marker").fetchone() is not None

    def mark_complete(self) -> None:
        with self._written.writing() as db:
            db.execute("DELETE FROM marker")
            db.execute("INSERT INTO marker VALUES (1)")

    def _add_shown(self, db: sqlite3.Connection, viewer_id: int, before: bytes, after: bytes) -> None:
        found = db.execute("SELECT entries FROM shown WHERE viewer_id = ?", [viewer_id]).fetchone()
        entries = trim_shown(before + (found[0] if found else b"") + after, self._clock())
        db.execute("INSERT OR REPLACE INTO shown VALUES (?, ?, ?)", [viewer_id, int(self._clock()), entries])

    def _prune(self, db: sqlite3.Connection) -> None:
        """Deletes what no reader needs, at most once per ``_PRUNE_EVERY_S`` seconds."""
        now_s = self._clock()
        if now_s < self._next_prune_s:
            return
        self._next_prune_s = now_s + _PRUNE_EVERY_S
        db.execute("DELETE FROM shown WHERE newest_s < ?", [oldest_shown_s(now_s)])
        db.execute("DELETE FROM watched WHERE generation < ?", [live_generations(now_s).start])


def _forget_surplus(db: sqlite3.Connection, table: str, viewer_id: int) -> None:
    """Deletes the viewer's choices beyond ``MAX_CHOICES``, those reported longest ago."""
    db.execute(
        f"DELETE FROM {table} WHERE rowid IN "
        f"(SELECT rowid FROM {table} WHERE viewer_id = ? ORDER BY rowid DESC LIMIT -1 OFFSET ?)",
        [viewer_id, MAX_CHOICES],
    )
