"""Keeps a video table fresh: follows the overlay, which holds uploads and changed features, and applies it.

A thread polls the overlay, so no request waits for it. All feature changes of one poll become one version of the table,
so that a request never mixes features of different times. If the overlay cannot be read, the error is logged and
counted, the table stays as it is, and the next poll tries again.
"""

# Shapes: N videos of the table, C changed rows, L live numbers

from __future__ import annotations

import logging
import time
import weakref
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry

from reelway.platform.contracts.feature_names import VIDEO_LIVE_DENSE
from reelway.platform.contracts.ids import short_id
from reelway.platform.contracts.release_files import videos_schema
from reelway.platform.errors import DataError, ReelwayError
from reelway.platform.eventlog.feature_changelog import CREATORS, ENGAGEMENT, FIELDS, FeatureChangelog, latest_rows
from reelway.platform.eventlog.upload_overlay import REQUEST_INTERVAL_S, OverlayRequests, UploadChangelog
from reelway.platform.supervised_thread import SupervisedThread
from reelway.serving.metrics import OverlayMetrics
from reelway.serving.video_table import ABSENT, F32, I64, VideoTable

log = logging.getLogger(__name__)

POLL_INTERVAL_S: Final = 0.5
"""Interval between two polls of the overlay."""


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


class UploadOverlay:
    """Appends the rows of a release's overlay to its video table. Only one thread calls ``poll``."""

    def __init__(self, table: VideoTable, changelog: UploadChangelog) -> None:
        self._table = weakref.ref(table)
        self._changelog = changelog
        self._sequence = 0

    def poll(self) -> int:
        """Appends all new rows and returns their number.

        Raises:
            StorageError: if the overlay cannot be read.
            DataError: if a change is malformed, or does not continue the rows of the table.
        """
        table = self._table()
        if table is None:
            return 0
        appended = 0
        for change in self._changelog.changes_after(self._sequence):
            next_row = len(table) + table.uploads.rows
            rows = change.rows.filter(pc.greater_equal(change.rows["row"], next_row))  # a snapshot repeats earlier rows
            numbers = rows["row"].to_numpy()
            if not np.array_equal(numbers, np.arange(next_row, next_row + len(numbers))):
                raise DataError(
                    f"overlay, change {change.sequence}: has rows from {numbers[0]} on, expected {next_row}; "
                    "start this replica again"
                )
            if len(numbers):
                table.append_uploads(rows.select(videos_schema(table.embedding.shape[1]).names))
            appended += len(numbers)
            self._sequence = change.sequence
        return appended


class OverlayFollower:
    """Follows the overlay of one release: uploads, and features of videos and creators.

    It also states regularly that the release is served, so that the overlay writer embeds uploads for it.
    """

    def __init__(self, table: VideoTable, overlay: str, release: str, metrics: OverlayMetrics) -> None:
        self._table = weakref.ref(table)
        self._release = release
        self._requests = OverlayRequests(overlay)
        self._uploads = UploadOverlay(table, UploadChangelog(overlay, release, table.embedding.shape[1]))
        self._features = FeatureOverlay(table, FeatureChangelog(overlay))
        self._metrics = metrics
        self._read_at = time.monotonic()
        self._next_request = self._read_at

    def follow(self, every_s: float) -> None:
        """Polls until the table is released."""
        failed = False
        while (table := self._table()) is not None:
            self._metrics.rows.set(table.uploads.rows)
            del table  # the thread must not keep the table open while it sleeps
            try:
                self._poll()
                failed = False
            except Exception as error:  # the thread must go on: without it, the table would stay as it is
                if not failed:
                    log.error(
                        "release %s: overlay is not read: %s: %s", short_id(self._release), type(error).__name__, error,
                        exc_info=not isinstance(error, ReelwayError),
                    )  # fmt: skip
                failed = True
                self._metrics.faults.inc()
            self._metrics.age.set(time.monotonic() - self._read_at)
            time.sleep(every_s)

    def _poll(self) -> None:
        self._uploads.poll()
        self._features.poll()
        self._read_at = now = time.monotonic()
        if now >= self._next_request:
            self._requests.request(self._release, time.time())
            self._next_request = now + REQUEST_INTERVAL_S


def start_follower(
    table: VideoTable, overlay: str, release: str, *, every_s: float = POLL_INTERVAL_S
) -> SupervisedThread:
    """Starts a thread that applies the overlay until the table is released or the process ends."""
    follower = OverlayFollower(table, overlay, release, OverlayMetrics(CollectorRegistry(), release))
    thread = SupervisedThread(follower.follow, args=(every_s,), name="live-overlay", daemon=True)
    thread.start()
    return thread
