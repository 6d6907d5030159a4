"""The outcome collector's SQLite file: rows and transactions, no arithmetic and no counting rules.

The file also holds the collector's position in the event log, which changes in the same transaction as the sums.

One process holds the file while it is open. Two processes that add to the same totals would lose outcomes silently.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from reelway.platform.contracts.events import Arm
from reelway.platform.eventlog import Offsets
from reelway.platform.sqlite_file import SqliteFile, SqliteFormat
from reelway.serving.outcomes.exposures import ArmKey
from reelway.serving.outcomes.viewer_keys import ARM_SHIFT, viewer_keys
from reelway.serving.outcomes.viewer_sums import (
    AUDIENCE_PER_ARM,
    COLUMNS_PER_VIEWER,
    SLICES,
    SUMS_PER_ARM,
    ViewerTotals,
)

MAX_ARMS: Final = 1 << (63 - ARM_SHIFT)
_FORMAT: Final = SqliteFormat(
    description="an outcome store",
    application_id=0x7265656F,
    version=3,
    schema=(
        """CREATE TABLE rollouts (
               rollout TEXT PRIMARY KEY, exposed_at REAL NOT NULL, retired INTEGER NOT NULL) WITHOUT ROWID""",
        """CREATE TABLE arms (
               id INTEGER PRIMARY KEY, rollout TEXT NOT NULL, arm TEXT NOT NULL, release TEXT NOT NULL,
               sums BLOB NOT NULL, audience BLOB NOT NULL, dropped INTEGER NOT NULL DEFAULT 0)""",
        """CREATE TABLE viewers (
               id INTEGER PRIMARY KEY, totals BLOB NOT NULL, outcomes INTEGER NOT NULL, arrival REAL NOT NULL)""",
        # Keyed by the hour of the impression: new rows are written next to each other, and so are expired ones.
        """CREATE TABLE seen (
               hour INTEGER, impression_id INTEGER, types INTEGER NOT NULL, PRIMARY KEY (hour, impression_id)
           ) WITHOUT ROWID""",
        """CREATE TABLE received (
               release TEXT, arm TEXT, kind TEXT, outcome TEXT, count INTEGER NOT NULL, at REAL NOT NULL,
               PRIMARY KEY (release, arm, kind, outcome)) WITHOUT ROWID""",
        # Counted slates, by the hour in which they were shown.
        """CREATE TABLE slates (
               hour INTEGER, request_id INTEGER, PRIMARY KEY (hour, request_id)) WITHOUT ROWID""",
        """CREATE TABLE positions (
               log TEXT, "partition" INTEGER, next INTEGER NOT NULL, PRIMARY KEY (log, "partition")) WITHOUT ROWID""",
    ),
    pragmas=("cache_size = -32768", "wal_autocheckpoint = 8192"),
    exclusive=True,
    remedy="move the file away; all sums are counted again from the event log",
)

ReceivedKey = tuple[str, str, str, str]  # release, arm, kind, outcome


@dataclass(slots=True)
class RolloutRow:
    """``exposed_at``: Unix time of its last exposure."""

    exposed_at: float
    retired: bool = False


@dataclass(slots=True)
class ArmRow:
    """An arm's number in the file, its sums ``[S, SUMS_PER_ARM]`` and its audience ``[AUDIENCE_PER_ARM]``."""

    id: int
    sums: NDArray[np.float64]
    audience: NDArray[np.float64]


class OutcomeStore:
    """Rollouts, arms, viewers and counted outcomes. One thread calls all methods but the constructor.

    Args:
        path: created when it does not exist.
        wait_s: how long to wait for another process to release the file.

    Raises:
        MalformedFileError: if the file is not an outcome store.
        StorageError: if it is held by another process, has another schema version, or cannot be opened.
    """

    def __init__(self, path: Path, *, wait_s: float = 30.0) -> None:
        self._file = SqliteFile(path, _FORMAT, busy_timeout_s=wait_s)
        self._db = self._file.connection

    def close(self) -> None:
        self._file.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes of the block are on disk when it ends; none are if it raises."""
        with self._file.writing():
            yield

    @contextmanager
    def erasing(self) -> Iterator[None]:
        """Like ``transaction``, and overwrites what it deletes."""
        with self._file.erasing():
            yield
        self._file.truncate_wal()

    def rollouts(self) -> dict[str, RolloutRow]:
        rows = self._db.execute("SELECT rollout, exposed_at, retired FROM rollouts")
        return {rollout: RolloutRow(exposed_at, bool(retired)) for rollout, exposed_at, retired in rows}

    def arms(self) -> dict[ArmKey, ArmRow]:
        rows = self._db.execute(
            "SELECT id, rollout, arm, release, sums, audience FROM arms WHERE NOT dropped ORDER BY id"
        )
        return {
            ArmKey(rollout, Arm(arm), release): ArmRow(
                number, np.frombuffer(sums).reshape(len(SLICES), SUMS_PER_ARM).copy(), np.frombuffer(audience).copy()
            )
            for number, rollout, arm, release, sums, audience in rows
        }

    def received(self) -> dict[ReceivedKey, int]:
        rows = self._db.execute("SELECT release, arm, kind, outcome, count FROM received")
        return {(release, arm, kind, outcome): count for release, arm, kind, outcome, count in rows}

    def position(self, log: str) -> Offsets:
        """The offsets at which the next read of a log starts; empty before the first read."""
        rows = self._db.execute('SELECT "partition", next FROM positions WHERE log = ?', (log,))
        return dict(rows.fetchall())

    def write_position(self, log: str, position: Offsets) -> None:
        self._db.execute("DELETE FROM positions WHERE log = ?", (log,))
        self._db.executemany("INSERT INTO positions VALUES (?, ?, ?)", [(log, *offset) for offset in position.items()])

    def add_slates(self, hour: int, request_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Records slates of one hour. Returns which of these distinct ids were not recorded before."""
        before = self._db.execute(
            "SELECT s.request_id FROM json_each(?) AS k CROSS JOIN slates AS s "
            "ON s.hour = ? AND s.request_id = k.value",
            (json.dumps(request_ids.tolist()), hour),
        ).fetchall()
        new = ~np.isin(request_ids, np.array([row[0] for row in before], np.int64))
        rows = [(hour, request) for request in request_ids[new].tolist()]
        self._db.executemany("INSERT INTO slates VALUES (?, ?)", rows)
        return new

    def write_rollout(self, rollout: str, known: RolloutRow) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO rollouts VALUES (?, ?, ?)", (rollout, known.exposed_at, int(known.retired))
        )

    def delete_rollout(self, rollout: str) -> None:
        self._db.execute("DELETE FROM rollouts WHERE rollout = ?", (rollout,))

    def add_arm(self, arm: ArmKey, avoid: Collection[int]) -> ArmRow | None:
        """Adds an arm whose sums are 0. If all numbers are taken, it gets the number of a dropped arm.

        Args:
            avoid: numbers of dropped arms that may not be used again yet.

        Returns:
            None if all ``MAX_ARMS`` numbers are those of arms that are not dropped, or are to be avoided.
        """
        taken = dict(self._db.execute("SELECT id, dropped FROM arms").fetchall())
        free = next((number for number in range(MAX_ARMS) if number not in taken), None)
        if free is None:
            free = next((number for number, dropped in taken.items() if dropped and number not in avoid), None)
            if free is None:
                return None
            self._db.execute("DELETE FROM viewers WHERE id BETWEEN ? AND ?", _viewer_range(free))
            self._db.execute("DELETE FROM arms WHERE id = ?", (free,))
        row = ArmRow(free, np.zeros((len(SLICES), SUMS_PER_ARM)), np.zeros(AUDIENCE_PER_ARM))
        self._db.execute(
            "INSERT INTO arms (id, rollout, arm, release, sums, audience) VALUES (?, ?, ?, ?, ?, ?)",
            (free, arm.rollout, arm.arm.value, arm.release, row.sums.tobytes(), row.audience.tobytes()),
        )
        return row

    def write_sums(self, arm: ArmRow) -> None:
        self._db.execute(
            "UPDATE arms SET sums = ?, audience = ? WHERE id = ?", (arm.sums.tobytes(), arm.audience.tobytes(), arm.id)
        )

    def drop_arm(self, arm: ArmRow) -> None:
        """Marks the arm as dropped; ``delete_expired`` deletes its viewers in batches."""
        self._db.execute("UPDATE arms SET dropped = 1 WHERE id = ?", (arm.id,))

    def add_received(self, counts: Iterable[tuple[ReceivedKey, int]], now: float) -> None:
        self._db.executemany(
            "INSERT INTO received VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE "
            "SET count = count + excluded.count, at = excluded.at",
            [(*key, count, now) for key, count in counts],
        )

    def read_viewers(self, keys: NDArray[np.int64]) -> ViewerTotals:
        """Totals of the viewers with these ascending keys (``viewer_keys``); zeros for viewers without a row."""
        rows = self._db.execute(
            "SELECT v.id, v.totals, v.outcomes, v.arrival FROM json_each(?) AS k "
            "CROSS JOIN viewers AS v ON v.id = k.value",
            (json.dumps(keys.tolist()),),
        ).fetchall()
        known = ViewerTotals.unknown(len(keys))
        if rows:
            index = np.searchsorted(keys, np.array([row[0] for row in rows], np.int64))
            blobs = np.frombuffer(b"".join([row[1] for row in rows]))
            known.totals[index] = blobs.reshape(len(rows), len(SLICES), COLUMNS_PER_VIEWER)
            known.outcomes[index] = [row[2] for row in rows]
            known.arrival[index] = [row[3] for row in rows]
        return known

    def are_known(self, keys: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each of these keys is a viewer with an impression or outcome."""
        rows = self._db.execute(
            "SELECT v.id FROM json_each(?) AS k CROSS JOIN viewers AS v ON v.id = k.value", (json.dumps(keys.tolist()),)
        )
        return np.isin(keys, np.array([row[0] for row in rows], np.int64))

    def write_viewers(self, keys: NDArray[np.int64], viewers: ViewerTotals) -> None:
        raw = viewers.totals.tobytes()
        size = len(SLICES) * COLUMNS_PER_VIEWER * 8
        blobs = [raw[start : start + size] for start in range(0, len(raw), size)]
        rows: Sequence[tuple[object, ...]] = list(
            zip(keys.tolist(), blobs, viewers.outcomes.tolist(), viewers.arrival.tolist(), strict=True)
        )
        self._db.executemany("INSERT OR REPLACE INTO viewers VALUES (?, ?, ?, ?)", rows)

    def count_viewers(self, viewer_ids: NDArray[np.int64]) -> int:
        """Returns the number of rows of these viewers, one per arm that showed them something."""
        rows = self._db.execute(
            "SELECT count(*) FROM json_each(?) AS k CROSS JOIN viewers AS v ON v.id = k.value",
            (json.dumps(_keys_on_all_arms(viewer_ids)),),
        )
        return int(rows.fetchone()[0])

    def erase_viewers(self, viewer_ids: NDArray[np.int64]) -> int:
        """Deletes the totals of these viewers on all arms; the arms' sums stay. Returns the number of deleted rows.

        A viewer who comes back counts as a new one.
        """
        keys = json.dumps(_keys_on_all_arms(viewer_ids))
        return self._db.execute("DELETE FROM viewers WHERE id IN (SELECT value FROM json_each(?))", (keys,)).rowcount

    def delete_totals(self, arm: ArmRow, limit: int) -> int:
        """Deletes the totals of at most ``limit`` viewers of an arm, whose sums stay. Returns their number."""
        return self._db.execute(
            "DELETE FROM viewers WHERE id IN (SELECT id FROM viewers WHERE id BETWEEN ? AND ? LIMIT ?)",
            (*_viewer_range(arm.id), limit),
        ).rowcount

    def read_counted_types(self, hour: int, impression_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Bits of the outcome types already counted for these ascending impressions of one hour."""
        counted = self._db.execute(
            "SELECT s.impression_id, s.types FROM json_each(?) AS k CROSS JOIN seen AS s "
            "ON s.hour = ? AND s.impression_id = k.value",
            (json.dumps(impression_ids.tolist()), hour),
        ).fetchall()
        types = np.zeros(len(impression_ids), np.int64)
        if counted:
            rows = np.array(counted, np.int64)
            types[np.searchsorted(impression_ids, rows[:, 0])] = rows[:, 1]
        return types

    def write_counted_types(self, hour: int, impression_ids: NDArray[np.int64], types: NDArray[np.int64]) -> None:
        rows = [
            (hour, impression, bits) for impression, bits in zip(impression_ids.tolist(), types.tolist(), strict=True)
        ]
        self._db.executemany("INSERT OR REPLACE INTO seen VALUES (?, ?, ?)", rows)

    def delete_expired(
        self, *, seen_before_hour: int, slates_before_hour: int, received_before: float, limit: int
    ) -> int:
        """Deletes expired rows and dropped arms, at most ``limit`` rows of each kind. Returns the number deleted."""
        deleted = self._db.execute(
            "DELETE FROM seen WHERE (hour, impression_id) IN "
            "(SELECT hour, impression_id FROM seen WHERE hour < ? ORDER BY hour LIMIT ?)",
            (seen_before_hour, limit),
        ).rowcount
        deleted += self._db.execute(
            "DELETE FROM slates WHERE (hour, request_id) IN "
            "(SELECT hour, request_id FROM slates WHERE hour < ? ORDER BY hour LIMIT ?)",
            (slates_before_hour, limit),
        ).rowcount
        for (number,) in self._db.execute("SELECT id FROM arms WHERE dropped").fetchall():
            span = (*_viewer_range(number), limit)
            viewers = self._db.execute(
                "DELETE FROM viewers WHERE id IN (SELECT id FROM viewers WHERE id BETWEEN ? AND ? LIMIT ?)", span
            ).rowcount
            deleted += viewers
            if not viewers:
                self._db.execute("DELETE FROM arms WHERE id = ?", (number,))
        self._db.execute("DELETE FROM received WHERE at < ?", (received_before,))
        return deleted


def _viewer_range(arm_id: int) -> tuple[int, int]:
    """First and last row id of an arm's viewers."""
    first = arm_id << ARM_SHIFT
    return first, first + (1 << ARM_SHIFT) - 1


def _keys_on_all_arms(viewer_ids: NDArray[np.int64]) -> list[int]:
    arms = np.arange(MAX_ARMS, dtype=np.int64)[:, None]
    keys: list[int] = viewer_keys(arms, viewer_ids[None, :]).ravel().tolist()
    return keys
