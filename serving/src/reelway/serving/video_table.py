"""The videos of a release as memory-mapped columns, shared by all replicas of a node.

The features of 500 candidates are read with one gather from a few matrices, without an object or a store read per
video. Fresher live features are overlaid as a new immutable version, so a reader sees one version from start to end.

Uploads since the release was built are rows N, N + 1, ...: the extension. An update of a video is a new row as well,
and its former rows lead to the new one. ``servable_rows`` gives the present row of each row, or ``ABSENT`` if the video
was taken down.
"""

# Shapes: N videos of the release, M rows of the extension, C requested rows, D embedding, S static features,
# L live features, H hashes

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.platform.contracts import feature_names as names
from reelway.platform.contracts.feature_dimensions import FeatureDimensions
from reelway.platform.contracts.manifest import VIDEOS_FILE
from reelway.platform.contracts.release_files import OVERLAY_CAPACITY, dimensions_of, videos_schema
from reelway.platform.errors import IncompatibleReleaseError
from reelway.platform.eventlog.catalogue_events import NOTHING_TAKEN_DOWN, ChangedStatus, TakenDown
from reelway.platform.features import on_demand
from reelway.serving.table_columns import NO_UPLOADS, Column, Uploads, index_in_sorted

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Rows = NDArray[np.int32]

ABSENT: Final = -1
"""Row number of a video that the table does not have."""
_STATIC: Final = slice(0, len(names.VIDEO_STATIC_DENSE))
_LIVE: Final = slice(_STATIC.stop, _STATIC.stop + len(names.VIDEO_LIVE_DENSE))
_DURATION: Final = names.VIDEO_STATIC_DENSE.index("duration_s")
_FOLLOWERS: Final = names.VIDEO_LIVE_DENSE.index("creator_followers")
_HOURS: Final = names.VIDEO_DENSE.index("hours_since_upload")


@dataclass(frozen=True)
class VideoInputs:
    """The ranker's inputs that describe videos, by the names of ``RANKER_INPUTS``."""

    video_dense: F32  # [C, len(VIDEO_DENSE)]
    video_categories: I64  # [C, len(VIDEO_CATEGORIES)]
    creator_codes: I64  # [C, H]
    video_embedding: F32  # [C, D]

    def as_inputs(self) -> dict[str, NDArray[Any]]:
        """Returns the arrays by input name."""
        return dict(vars(self))


@dataclass(frozen=True)
class LiveFeatures:
    """One immutable version of the live features: the snapshot of the release, overlaid with fresher rows.

    The snapshot consists of the file's pages, which all replicas of a node share. A version costs the memory of all
    rows that were ever changed, and 4 bytes per video of the table to find them.
    """

    snapshot: Column  # [N + M, L]
    fresh: F32  # [F, L]
    overlay_rows: Rows | None = None  # [N + capacity] row of ``fresh``, ABSENT if unchanged; None: all unchanged
    version: int = 0
    as_of_s: float | None = None  # time that the features describe; None: the release's time

    def at(self, rows: NDArray[np.integer[Any]]) -> F32:
        """Returns the live features of the videos at ``rows``. Shapes: ``[C] -> [C, L]``."""
        values: F32 = self.snapshot.take(rows, axis=0)
        if self.overlay_rows is not None:
            fresh_row = self.overlay_rows[rows]
            changed = np.flatnonzero(fresh_row != ABSENT)
            values[changed] = self.fresh[fresh_row[changed]]
        return values

    def with_updates(self, rows: NDArray[np.integer[Any]], dense: F32, as_of_s: float | None = None) -> LiveFeatures:
        """Returns the next version with ``dense`` ``[C, L]`` at ``rows`` ``[C]``; of repeated rows the last wins."""
        rows_with_capacity = len(self.snapshot.base) + OVERLAY_CAPACITY
        overlay_rows = (
            np.full(rows_with_capacity, ABSENT, np.int32) if self.overlay_rows is None else self.overlay_rows.copy()
        )
        new = np.unique(rows[overlay_rows[rows] == ABSENT])
        overlay_rows[new] = len(self.fresh) + np.arange(len(new), dtype=np.int32)
        fresh = np.concatenate([self.fresh, np.empty((len(new), dense.shape[1]), np.float32)])
        fresh[overlay_rows[rows]] = dense
        for published in (overlay_rows, fresh):
            published.flags.writeable = False
        return LiveFeatures(self.snapshot, fresh, overlay_rows, self.version + 1, as_of_s)


class VideoTable:
    """The video table of a release. Rows are positions in ``videos.arrow``; ``index.faiss`` uses the same numbers.

    Raises:
        IncompatibleReleaseError: if the batch does not have ``videos_schema``, or its ids are not ascending.
    """

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._batch = batch  # keeps the mapping alive
        self.release_use: object = None  # keeps the release in the node's cache
        embedding = _matrix(batch, "embedding")
        expected = videos_schema(embedding.shape[1])
        if not batch.schema.equals(expected):
            raise IncompatibleReleaseError(
                f"{VIDEOS_FILE} has schema\n{batch.schema}\nexpected\n{expected}\nrebuild the release"
            )
        self.dimensions = _dimensions(batch)
        self.embedding = Column(embedding)
        self.video_id = Column(_vector(batch, "video_id"))
        self.creator_id = Column(_vector(batch, "creator_id"))
        self.topic = Column(_vector(batch, "topic"))
        self.uploaded_at_s = Column(_vector(batch, "uploaded_at_s"))
        self._creator_codes = Column(_matrix(batch, "creator_codes"))
        self._categories = Column(_matrix(batch, "video_categories"))
        self._static = Column(_matrix(batch, "static_dense"))
        self._titles = batch.column("title")
        self._added_titles: list[str | None] = []
        snapshot = Column(_matrix(batch, "live_dense"))
        self._live = LiveFeatures(snapshot, fresh=snapshot.base[:0])
        self._uploads = NO_UPLOADS
        self._servable: Rows | None = None  # [N + capacity] see servable_rows; None: every row is its own
        self._taken_down = NOTHING_TAKEN_DOWN
        self._changing = threading.Lock()  # the overlay's follower and that of the takedowns change the table
        ids = self.video_id.base
        if len(self) and (np.diff(ids) <= 0).any():
            row = int(np.argmax(np.diff(ids) <= 0)) + 1
            raise IncompatibleReleaseError(
                f"{VIDEOS_FILE}, row {row}: saw video_id {ids[row]} after {ids[row - 1]}, "
                "expected ascending ids; rebuild the release"
            )

    def __len__(self) -> int:
        """The videos of the release, N, without the extension."""
        return int(self._batch.num_rows)

    @property
    def live(self) -> LiveFeatures:
        """The present version of the live features; later overlays do not change the returned object."""
        return self._live

    @property
    def uploads(self) -> Uploads:
        """The present version of the extension's indexes."""
        return self._uploads

    def rows_of(self, video_ids: NDArray[np.integer[Any]]) -> Rows:
        """Returns the newest rows of the videos, ``ABSENT`` for a video that the table lacks. Shapes: ``[C] -> [C]``.

        A video that was taken down has a row; see ``servable_rows``.
        """
        return self._newest_rows(np.asarray(video_ids, dtype=np.int64), self._uploads)

    def former_rows_of(self, video_ids: I64, before: int) -> Rows:
        """Returns the newest rows below the row number ``before``, ``ABSENT`` where there is none."""
        added = before - len(self)
        return self._newest_rows(
            video_ids, Uploads.of(self.video_id.added[:added], self.uploaded_at_s.added[:added], len(self))
        )

    def has_rows(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
        """Whether the table has each row. Another process may have read more of the extension. ``[C] -> [C]``."""
        known: NDArray[np.bool_] = rows < len(self) + self._uploads.rows
        return known

    def servable_rows(self, rows: NDArray[np.integer[Any]]) -> Rows:
        """Returns the row that each row's video is served by now. Shapes: ``[C] -> [C]``.

        ``ABSENT`` stands for a video that was taken down, and for a row that this table does not have (yet).
        """
        known = (rows >= 0) & self.has_rows(rows)
        servable = self._servable
        if servable is None:
            return np.where(known, rows, ABSENT).astype(np.int32)
        return np.where(known, servable[rows], ABSENT).astype(np.int32)

    def rows_of_creators(self, creator_ids: I64) -> tuple[I64, I64]:
        """Returns all rows of the creators, and for each row the index of its creator. Shapes: ``[C] -> [R], [R]``."""
        order, creators = self._creator_index
        first = np.searchsorted(creators, creator_ids, side="left")
        count = np.searchsorted(creators, creator_ids, side="right") - first
        of = np.repeat(np.arange(len(creator_ids)), count)
        start = np.repeat(first - (np.cumsum(count) - count), count)
        rows = order[start + np.arange(len(of))].astype(np.int64)
        by_id = np.argsort(creator_ids, kind="stable")
        found = index_in_sorted(creator_ids[by_id], self.creator_id.added)
        added = np.flatnonzero(found >= 0)
        return np.concatenate([rows, added + len(self)]), np.concatenate([of, by_id[found[added]]])

    def append_uploads(self, uploads: pa.Table) -> None:
        """Appends rows to the extension: uploads, and new versions of videos that the table has.

        Args:
            uploads: complete rows of ``videos_schema``, in the order of their row numbers.

        Raises:
            ValueError: if the extension would have more than ``OVERLAY_CAPACITY`` rows.
        """
        batch = uploads.combine_chunks().to_batches()[0]
        with self._changing:
            before = self._uploads.rows
            if before + batch.num_rows > OVERLAY_CAPACITY:
                raise ValueError(f"{before + batch.num_rows} rows of uploads, expected at most {OVERLAY_CAPACITY}")
            self._added_titles.extend(batch.column("title").to_pylist())
            for name in ("video_id", "creator_id", "topic", "uploaded_at_s"):
                getattr(self, name).append(_vector(batch, name))
            for column, name in (
                (self.embedding, "embedding"), (self._creator_codes, "creator_codes"),
                (self._categories, "video_categories"), (self._static, "static_dense"),
                (self._live.snapshot, "live_dense"),
            ):  # fmt: skip
                column.append(_matrix(batch, name))
            index = Uploads.of(self.video_id.added, self.uploaded_at_s.added, len(self))
            self._refresh_servable(self._all_rows_of(self.video_id.added[before:]), index)
            self._uploads = index

    def take_down(self, taken_down: TakenDown, changed: ChangedStatus | None = None) -> None:
        """Hides all videos that are taken down, and all videos of creators that are.

        Args:
            taken_down: all takedowns in effect.
            changed: videos and creators whose status changed since the last call; None: any may have changed.
        """
        with self._changing:
            before, self._taken_down = self._taken_down, taken_down
            if changed is None:
                changed = ChangedStatus(
                    np.union1d(before.videos, taken_down.videos), np.union1d(before.creators, taken_down.creators)
                )
            try:
                rows = np.union1d(self._all_rows_of(changed.videos), self.rows_of_creators(changed.creators)[0])
                if len(rows):
                    self._refresh_servable(rows, self._uploads)
            except BaseException:  # the next call must find the difference again
                self._taken_down = before
                raise

    def _newest_rows(self, ids: I64, uploads: Uploads) -> Rows:
        rows = index_in_sorted(self.video_id.base, ids).astype(np.int32)
        if not uploads.rows:
            return rows
        found = index_in_sorted(uploads.video_id, ids)
        return np.where(found >= 0, uploads.newest_row[found], rows).astype(np.int32)

    def _all_rows_of(self, video_ids: I64) -> I64:
        """Returns every row of the videos, also rows that a newer version has replaced."""
        rows = index_in_sorted(self.video_id.base, video_ids)
        added = np.flatnonzero(np.isin(self.video_id.added, video_ids)) + len(self)
        return np.concatenate([rows[rows >= 0], added])

    def _refresh_servable(self, rows: I64, uploads: Uploads) -> None:
        """Publishes a version of ``_servable`` with new values at ``rows``."""
        newest = self._newest_rows(self.video_id[rows], uploads)
        is_down = index_in_sorted(self._taken_down.videos, self.video_id[rows]) >= 0
        is_down |= index_in_sorted(self._taken_down.creators, self.creator_id[newest]) >= 0
        if self._servable is None:
            servable = np.arange(len(self) + OVERLAY_CAPACITY, dtype=np.int32)
        else:
            servable = self._servable.copy()
        servable[rows] = np.where(is_down, ABSENT, newest)
        servable.flags.writeable = False
        self._servable = servable

    @cached_property
    def _creator_index(self) -> tuple[Rows, I64]:
        """Rows of the release in the order of their creators, and those creators."""
        order = np.argsort(self.creator_id.base, kind="stable").astype(np.int32)
        return order, self.creator_id.base[order]

    def gather(self, rows: NDArray[np.integer[Any]], request_time_s: float) -> VideoInputs:
        """Returns the ranker's inputs of the videos at ``rows`` (none is ``ABSENT``) at the time of the request."""
        dense = np.empty((len(rows), len(names.VIDEO_DENSE)), dtype=np.float32)
        dense[:, _STATIC] = self._static.take(rows, axis=0)
        dense[:, _LIVE] = self._live.at(rows)
        dense[:, _HOURS] = on_demand.hours_since_upload(np.asarray(request_time_s), self.uploaded_at_s[rows])
        return VideoInputs(
            dense,
            self._categories.take(rows, axis=0),
            self._creator_codes.take(rows, axis=0),
            self.embedding.take(rows, axis=0),
        )

    def creator_followers(self, rows: NDArray[np.integer[Any]]) -> F32:
        """Followers of the videos' creators, NaN where unknown. Shapes: ``[C] -> [C]``."""
        followers: F32 = self._live.at(rows)[:, _FOLLOWERS]
        return followers

    def duration_ms(self, rows: NDArray[np.integer[Any]]) -> list[int]:
        """Whole milliseconds, 0 where unknown."""
        duration_ms = self._static.take(rows)[:, _DURATION] * 1000.0
        whole: list[int] = np.nan_to_num(duration_ms, nan=0.0).astype(np.int64).tolist()
        return whole

    def titles(self, rows: NDArray[np.integer[Any]]) -> list[str | None]:
        """Titles of a slate's videos, ``None`` for ``ABSENT``; for people, never for all candidates."""
        return [None if row == ABSENT else self._title(row) for row in rows.tolist()]

    def _title(self, row: int) -> str | None:
        if row >= len(self):
            return self._added_titles[row - len(self)]
        title: str | None = self._titles[row].as_py()
        return title

    def overlay(self, rows: NDArray[np.integer[Any]], live_dense: F32, as_of_s: float | None = None) -> int:
        """Overlays fresher live features and returns the number of the new version.

        Copies all rows that were changed before and 4 bytes per video of the table, so pass batches, not single events.

        Args:
            rows: rows to change, ``[C]``; the last value of a repeated row wins.
            live_dense: new values in the order of ``VIDEO_LIVE_DENSE``, ``[C, L]``.
            as_of_s: time in Unix seconds that the whole table then describes.

        Raises:
            ValueError: if the shapes do not match, or a row is outside of the table.
        """
        width = len(names.VIDEO_LIVE_DENSE)
        if live_dense.shape != (len(rows), width):
            raise ValueError(f"live_dense has shape {live_dense.shape}, expected {(len(rows), width)}")
        last = len(self) + self._uploads.rows - 1
        if len(rows) and (rows.min() < 0 or rows.max() > last):
            raise ValueError(f"rows span {rows.min()}..{rows.max()}, expected 0..{last}")
        self._live = self._live.with_updates(rows, live_dense, as_of_s)
        return self._live.version


def open_video_table(path: Path) -> VideoTable:
    """Maps ``videos.arrow`` into memory.

    Raises:
        IncompatibleReleaseError: if the file is not an Arrow file with one record batch; see also ``VideoTable``.
    """
    return VideoTable(open_record_batch(path))


def open_record_batch(path: Path) -> pa.RecordBatch:
    """Returns the only record batch of a release's Arrow file, memory-mapped.

    Raises:
        IncompatibleReleaseError: if the file is not an Arrow file, or has another number of batches than one.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path), "r"))
    except (pa.ArrowInvalid, OSError) as error:
        raise IncompatibleReleaseError(f"{path}: cannot be read as an Arrow IPC file: {error}") from error
    if reader.num_record_batches != 1:
        raise IncompatibleReleaseError(
            f"{path}: saw {reader.num_record_batches} record batches, expected 1; rebuild the release"
        )
    return reader.get_batch(0)


def _dimensions(batch: pa.RecordBatch) -> FeatureDimensions:
    try:
        dimensions = dimensions_of(batch.schema)
    except ValueError as error:
        raise IncompatibleReleaseError(f"{VIDEOS_FILE}: its feature dimensions are invalid: {error}") from error
    if dimensions is None:
        raise IncompatibleReleaseError(
            f"{VIDEOS_FILE}: its schema has no feature dimensions, expected with them; rebuild the release"
        )
    return dimensions


def _vector(batch: pa.RecordBatch, name: str) -> NDArray[Any]:
    values: NDArray[Any] = batch.column(name).to_numpy(zero_copy_only=True)
    return values


def _matrix(batch: pa.RecordBatch, name: str) -> NDArray[Any]:
    if name not in batch.schema.names or not pa.types.is_fixed_size_list(batch.schema.field(name).type):
        raise IncompatibleReleaseError(
            f"{VIDEOS_FILE}: column {name!r} is missing or not a fixed-size list; rebuild the release"
        )
    column = batch.column(name)
    values: NDArray[Any] = column.flatten().to_numpy(zero_copy_only=True)
    return values.reshape(len(column), column.type.list_size)
