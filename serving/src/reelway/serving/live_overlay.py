"""Keeps the live features of a video table fresh: follows the stream's changelog and overlays its changes.

A thread polls the changelog, so no request waits for it. All changes of one poll become one version of the table, so
that a request never mixes features of different times. If the changelog cannot be read, the error is logged, the table
keeps its features, and the next poll tries again. Videos and creators that the release lacks are left out.
"""

# Shapes: N videos of the table, C changed rows, L live numbers

from __future__ import annotations

import logging
import threading
import time
import weakref
from typing import Final

import numpy as np
import pyarrow as pa

from reelway.platform.contracts.feature_names import VIDEO_LIVE_DENSE
from reelway.platform.errors import DataError, StorageError
from reelway.platform.eventlog.feature_changelog import CREATORS, ENGAGEMENT, FIELDS, FeatureChangelog, latest_rows
from reelway.serving.video_table import ABSENT, F32, I64, VideoTable

log = logging.getLogger(__name__)

POLL_INTERVAL_S: Final = 1.0
"""Interval between two polls of the changelog."""


class FeatureOverlay:
    """Applies the changelog to one video table. Only one thread calls ``poll``; readers of the table need no lock."""

    def __init__(self, table: VideoTable, changelog: FeatureChangelog) -> None:
        self._table = weakref.ref(table)  # the follower ends when its release is closed
        self._changelog = changelog
        self._sequence = 0
        order = np.argsort(table.creator_id, kind="stable")
        self._by_creator = order.astype(np.int64)
        self._creators = table.creator_id[order]

    @property
    def sequence(self) -> int:
        """Sequence number of the last change that was applied."""
        return self._sequence

    @property
    def table_released(self) -> bool:
        """Whether the table was released by its last user."""
        return self._table() is None

    def poll(self) -> int:
        """Applies all new changes and returns the number of changed rows of the table.

        Raises:
            StorageError: if the changelog cannot be read.
            DataError: if a change is malformed.
        """
        table = self._table()
        if table is None:
            return 0
        changes = self._changelog.changes_after(self._sequence)
        if not changes:
            return 0
        rows = latest_rows([change.rows for change in changes])
        videos = _of(rows, ENGAGEMENT)
        creators = _of(rows, CREATORS)
        video_rows, video_values = table.rows_of(videos[0]).astype(np.int64), videos[1]
        video_rows, video_values = video_rows[video_rows != ABSENT], video_values[video_rows != ABSENT]
        creator_rows, creator_values = self._spread(*creators)
        changed = np.union1d(video_rows, creator_rows)
        dense = table.live.at(changed)
        dense[np.ix_(np.searchsorted(changed, video_rows), _columns(ENGAGEMENT))] = video_values
        dense[np.ix_(np.searchsorted(changed, creator_rows), _columns(CREATORS))] = creator_values
        table.overlay(changed.astype(np.int32), dense, as_of_s=changes[-1].as_of_us / 1e6)
        self._sequence = changes[-1].sequence
        return len(changed)

    def _spread(self, creator: I64, values: F32) -> tuple[I64, F32]:
        """Returns the rows of the creators' videos and the creators' values, repeated for each video."""
        first = np.searchsorted(self._creators, creator, side="left")
        count = np.searchsorted(self._creators, creator, side="right") - first
        start = np.repeat(first - np.concatenate([[0], np.cumsum(count)[:-1]]), count) if len(creator) else first
        return self._by_creator[start + np.arange(int(count.sum()))], np.repeat(values, count, axis=0)


def _columns(view: str) -> I64:
    return np.array([VIDEO_LIVE_DENSE.index(name) for name in FIELDS[view]], dtype=np.int64)


def _of(rows: pa.Table, view: str) -> tuple[I64, F32]:
    """Returns the entity ids and values of one view's rows; unknown values are NaN, as in the release."""
    of_view = rows.filter(pa.array(np.array([name == view for name in rows["view"].to_pylist()], dtype=np.bool_)))
    values = [of_view[name].to_numpy().astype(np.float32) for name in FIELDS[view]]
    return of_view["entity_id"].to_numpy(), np.stack(values, axis=1) if values else np.zeros((0, 0), np.float32)


def start_follower(table: VideoTable, changelog: str, *, every_s: float = POLL_INTERVAL_S) -> threading.Thread:
    """Starts a thread that applies the changelog until the table is released or the process ends."""
    overlay = FeatureOverlay(table, FeatureChangelog(changelog))
    thread = threading.Thread(target=_follow_until_released, args=(overlay, every_s), name="live-overlay", daemon=True)
    thread.start()
    return thread


def _follow_until_released(overlay: FeatureOverlay, every_s: float) -> None:
    failed = False
    while not overlay.table_released:
        try:
            overlay.poll()
            failed = False
        except (StorageError, DataError) as error:
            if not failed:
                log.error("video features are not updated: %s", error)
            failed = True
        time.sleep(every_s)
