"""The videos of a release as memory-mapped columns, shared by all replicas of a node.

The features of 500 candidates are read with one gather from a few matrices, without an object or a store read per
video. Fresher live features are overlaid as a new immutable version, so a reader sees one version from start to end.
"""

# Shapes: N videos of the table, C requested rows, D embedding, S static features, L live features, H hashes

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.platform.contracts import feature_names as names
from reelway.platform.contracts.feature_dimensions import FeatureDimensions
from reelway.platform.contracts.manifest import VIDEOS_FILE
from reelway.platform.contracts.release_files import dimensions_of, videos_schema
from reelway.platform.errors import IncompatibleReleaseError
from reelway.platform.features import on_demand

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

    snapshot: F32  # [N, L]
    fresh: F32  # [F, L]
    overlay_rows: Rows | None = None  # [N] row of ``fresh``, ABSENT if unchanged; None: all unchanged
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
        overlay_rows = (
            np.full(len(self.snapshot), ABSENT, np.int32) if self.overlay_rows is None else self.overlay_rows.copy()
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
        self.embedding = _matrix(batch, "embedding")
        expected = videos_schema(self.embedding.shape[1])
        if not batch.schema.equals(expected):
            raise IncompatibleReleaseError(
                f"{VIDEOS_FILE} has schema\n{batch.schema}\nexpected\n{expected}\nrebuild the release"
            )
        self.dimensions = _dimensions(batch)
        self.video_id: I64 = _vector(batch, "video_id")
        self.creator_id: I64 = _vector(batch, "creator_id")
        self.topic: NDArray[np.int32] = _vector(batch, "topic")
        self.uploaded_at_s: F64 = _vector(batch, "uploaded_at_s")
        self._creator_codes = _matrix(batch, "creator_codes")
        self._categories = _matrix(batch, "video_categories")
        self._static = _matrix(batch, "static_dense")
        self._titles = batch.column("title")
        snapshot = _matrix(batch, "live_dense")
        self._live = LiveFeatures(snapshot, fresh=snapshot[:0])
        if len(self) and (np.diff(self.video_id) <= 0).any():
            row = int(np.argmax(np.diff(self.video_id) <= 0)) + 1
            raise IncompatibleReleaseError(
                f"{VIDEOS_FILE}, row {row}: saw video_id {self.video_id[row]} after {self.video_id[row - 1]}, "
                "expected ascending ids; rebuild the release"
            )

    def __len__(self) -> int:
        return int(self._batch.num_rows)

    @property
    def live(self) -> LiveFeatures:
        """The present version of the live features; later overlays do not change the returned object."""
        return self._live

    def rows_of(self, video_ids: NDArray[np.integer[Any]]) -> Rows:
        """Returns the rows of the videos, ``ABSENT`` for a video that the table lacks. Shapes: ``[C] -> [C]``."""
        ids = np.asarray(video_ids, dtype=np.int64)
        if not len(self):
            return np.full(ids.shape, ABSENT, dtype=np.int32)
        index = np.searchsorted(self.video_id, ids)
        index[index == len(self)] = 0
        return np.where(self.video_id[index] == ids, index, ABSENT).astype(np.int32)

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
        duration: list[int] = np.nan_to_num(self._static[rows, _DURATION] * 1000.0, nan=0.0).astype(np.int64).tolist()
        return duration

    def titles(self, rows: NDArray[np.integer[Any]]) -> list[str | None]:
        """Titles of a slate's videos, ``None`` for ``ABSENT``; for people, never for all candidates."""
        return [None if row == ABSENT else self._titles[row].as_py() for row in rows.tolist()]

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
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise ValueError(f"rows span {rows.min()}..{rows.max()}, expected 0..{len(self) - 1}")
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
