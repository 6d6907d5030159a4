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
from numpy.typing import NDArray

from reelway.platform.contracts.feature_names import VIDEO_LIVE_DENSE
from reelway.platform.errors import DataError, StorageError
from reelway.platform.eventlog.feature_changelog import CREATORS, ENGAGEMENT, FIELDS, FeatureChangelog, latest_rows
from reelway.serving.video_table import ABSENT, F32, I64, VideoTable

log = logging.getLogger(__name__)

POLL_INTERVAL_S: Final = 1.0
"""Interval between two polls of the changelog."""


class FeatureOverlay:
    """Applies the changelog to one video table. Only one thread calls ``poll``; readers of the table need no lock.

    The newest rows of videos and creators that the table lacks are kept: an upload that is appended later gets them.
    """

    def __init__(self, table: VideoTable, changelog: FeatureChangelog) -> None:
        self._table = weakref.ref(table)  # the follower ends when its release is closed
        self._changelog = changelog
        self._sequence = 0
        self._as_of_s: float | None = None
        self._without_rows: dict[str, dict[int, F32]] = {ENGAGEMENT: {}, CREATORS: {}}
        self._rows = len(table)

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
        added = np.arange(self._rows, len(table) + table.uploads.rows, dtype=np.int64)
        changes = self._changelog.changes_after(self._sequence)
        if not changes and not len(added):
            return 0
        self._inherit_features(table, added)
        self._rows += len(added)
        if not changes:
            return len(added)
        rows = latest_rows([change.rows for change in changes])
        videos, video_values = _of(rows, ENGAGEMENT)
        creators, creator_values = _of(rows, CREATORS)
        video_rows = table.rows_of(videos).astype(np.int64)
        creator_rows, of = table.rows_of_creators(creators)
        self._keep(ENGAGEMENT, videos, video_values, video_rows != ABSENT)
        self._keep(CREATORS, creators, creator_values, np.isin(np.arange(len(creators)), of))
        self._as_of_s = changes[-1].as_of_us / 1e6
        video_values, video_rows = video_values[video_rows != ABSENT], video_rows[video_rows != ABSENT]
        changed = self._write(table, (video_rows, video_values), (creator_rows, creator_values[of]))
        self._sequence = changes[-1].sequence
        return changed + len(added)

    def _write(self, table: VideoTable, videos: tuple[I64, F32], creators: tuple[I64, F32]) -> int:
        """Publishes one version with these rows and values of both views."""
        changed = np.union1d(videos[0], creators[0])
        dense = table.live.at(changed)
        for view, (rows, values) in ((ENGAGEMENT, videos), (CREATORS, creators)):
            dense[np.ix_(np.searchsorted(changed, rows), _columns(view))] = values
        table.overlay(changed.astype(np.int32), dense, as_of_s=self._as_of_s)
        return len(changed)

    def _keep(self, view: str, entities: I64, values: F32, has_rows: NDArray[np.bool_]) -> None:
        kept = self._without_rows[view]
        for index in np.flatnonzero(~has_rows).tolist():
            kept[int(entities[index])] = values[index]

    def _inherit_features(self, table: VideoTable, added: I64) -> None:
        """Gives appended rows the newest features: of the video's former row, and of another row of the creator."""
        if not len(added):
            return
        ids, creators = table.video_id[added], table.creator_id[added]
        dense = table.live.at(added)
        first, of = table.rows_of_creators(np.unique(creators))
        earlier = first < self._rows
        position = np.searchsorted(np.unique(creators), creators)
        sibling = np.full(len(np.unique(creators)), ABSENT, dtype=np.int64)
        sibling[of[earlier]] = first[earlier]
        former = table.former_rows_of(ids, before=self._rows)
        for source, view in ((former, ENGAGEMENT), (sibling[position], CREATORS)):
            known = source != ABSENT
            columns = _columns(view)
            dense[np.ix_(known, columns)] = table.live.at(source[known])[:, columns]
            kept = self._without_rows[view]
            for index, entity in enumerate((ids if view == ENGAGEMENT else creators).tolist()):
                if entity in kept:
                    dense[index, columns] = kept[entity]
        for view, entities in ((ENGAGEMENT, ids), (CREATORS, creators)):
            for entity in entities.tolist():
                self._without_rows[view].pop(entity, None)
        table.overlay(added.astype(np.int32), dense, as_of_s=self._as_of_s)


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
