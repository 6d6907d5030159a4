"""Fresh numbers for a video table: follows the stream processor's changelog and lays each change over the snapshot.

It never holds up a request and refuses to mix moments: all changes that one look finds become one version of the table.
A changelog that cannot be read leaves the table as it is, which is logged, and is looked at again. A video or creator
that the release does not have is left out.
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

from reelway.platform.contracts.features import VIDEO_LIVE_DENSE
from reelway.platform.errors import DataError, StorageError
from reelway.platform.eventlog.changelog import CREATORS, ENGAGEMENT, FIELDS, Changelog, latest_rows
from reelway.serving.video_table import ABSENT, F32, I64, VideoTable

log = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 1.0


class LiveOverlay:
    """One table's view of the changelog. ``poll`` is for one thread; readers of the table need not know."""

    def __init__(self, table: VideoTable, changelog: Changelog) -> None:
        self._table = weakref.ref(table)  # a release that is closed takes its follower with it
        self._changelog = changelog
        self._sequence = 0
        order = np.argsort(table.creator_id, kind="stable")
        self._by_creator = order.astype(np.int64)
        self._creators = table.creator_id[order]

    @property
    def sequence(self) -> int:
        """The last change that the table has."""
        return self._sequence

    @property
    def over(self) -> bool:
        """Whether nobody has the table any more."""
        return self._table() is None

    def poll(self) -> int:
        """Apply what is new; returns how many rows of the table changed.

        Raises:
            StorageError: the changelog cannot be reached.
            DataError: a change is not one.
        """
        table = self._table()
        if table is None:
            return 0
        changes = self._changelog.after(self._sequence)
        if not changes:
            return 0
        rows = latest_rows([change.rows for change in changes])
        videos = _of(rows, ENGAGEMENT)
        creators = _of(rows, CREATORS)
        at_video, video_values = table.rows_of(videos[0]).astype(np.int64), videos[1]
        at_video, video_values = at_video[at_video != ABSENT], video_values[at_video != ABSENT]
        at_creator, creator_values = self._spread(*creators)
        changed = np.union1d(at_video, at_creator)
        dense = table.live.at(changed)
        dense[np.ix_(np.searchsorted(changed, at_video), _columns(ENGAGEMENT))] = video_values
        dense[np.ix_(np.searchsorted(changed, at_creator), _columns(CREATORS))] = creator_values
        table.overlay(changed.astype(np.int32), dense, as_of_s=changes[-1].as_of_us / 1e6)
        self._sequence = changes[-1].sequence
        return len(changed)

    def _spread(self, creator: I64, values: F32) -> tuple[I64, F32]:
        """Creators' values as rows of their videos."""
        first = np.searchsorted(self._creators, creator, side="left")
        count = np.searchsorted(self._creators, creator, side="right") - first
        start = np.repeat(first - np.concatenate([[0], np.cumsum(count)[:-1]]), count) if len(creator) else first
        return self._by_creator[start + np.arange(int(count.sum()))], np.repeat(values, count, axis=0)


def _columns(view: str) -> I64:
    return np.array([VIDEO_LIVE_DENSE.index(name) for name in FIELDS[view]], dtype=np.int64)


def _of(rows: pa.Table, view: str) -> tuple[I64, F32]:
    """Ids and values of one view's rows; what is unknown is NaN, as in the release."""
    mine = rows.filter(pa.array(np.array([word == view for word in rows["view"].to_pylist()], dtype=np.bool_)))
    values = [mine[name].to_numpy().astype(np.float32) for name in FIELDS[view]]
    return mine["entity_id"].to_numpy(), np.stack(values, axis=1) if values else np.zeros((0, 0), np.float32)


def follow(table: VideoTable, place: str, *, every_s: float = LOOK_EVERY_S) -> threading.Thread:
    """Keep the table fresh from a thread, which ends with the table or the process."""
    overlay = LiveOverlay(table, Changelog(place))
    thread = threading.Thread(target=_look, args=(overlay, every_s), name="live-overlay", daemon=True)
    thread.start()
    return thread


def _look(overlay: LiveOverlay, every_s: float) -> None:
    failed = False
    while not overlay.over:
        try:
            overlay.poll()
            failed = False
        except (StorageError, DataError) as error:
            if not failed:
                log.error("video features stay as they are: %s", error)
            failed = True
        time.sleep(every_s)
