"""Training rows in memory: read once from Parquet and assembled by the code that serving runs.

Two exact savings let 300,000 rows fit in a few hundred megabytes: rows of one request share one viewer row (compared
value by value), and a video's content is stored once. Codes stay 16 or 32 bits wide until they are in a batch; a value
that does not fit its type is an error.
"""

# Shapes: N rows, V distinct viewer rows, M distinct videos, L history, H hashes, K tasks

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from numpy.typing import NDArray

from reelway.platform.contracts.feature_dimensions import FeatureDimensions
from reelway.platform.contracts.feature_names import RANKER_TASKS
from reelway.platform.errors import EmptyDatasetError, MalformedFileError
from reelway.platform.features.assembly import (
    VideoArrays,
    ViewerArrays,
    assemble_videos,
    assemble_viewers,
    columns_from_table,
)
from reelway.platform.features.dimensions import read_dimensions, write_dimensions

Arrays = TypeVar("Arrays", ViewerArrays, VideoArrays)
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

REQUIRED: Final = (
    "impression_id", "request_id", "viewer_id", "video_id", "creator_id", "event_time", "request_time_s", "device",
    "position", "weight", *RANKER_TASKS,
)  # fmt: skip
_CHUNK_ROWS = 32_768
_VIEWER_FIELDS = tuple(f.name for f in dataclasses.fields(ViewerArrays))
_VIDEO_FIELDS = tuple(f.name for f in dataclasses.fields(VideoArrays))
_NOT_ARRAYS: Final = ("viewers", "videos", "dimensions")
_CODES: Final = ("viewer_categories", "history_codes", "video_codes", "creator_codes", "video_categories")


@dataclass(frozen=True)
class TrainingRows:
    """All rows of a run, ascending in ``event_time_s``. Code arrays are int16 or int32; batches widen them."""

    impression_id: I64  # [N]
    request_id: I64
    viewer_id: I64
    video_id: I64
    event_time_s: F64
    request_time_s: F64
    position: NDArray[np.int16]  # -1: not shown
    weight: F32  # outcome weight
    labels: F32  # [N, K]; watch_s in seconds
    viewer_row: NDArray[np.int32]  # [N] -> row of viewers
    video_row: NDArray[np.int32]  # [N] -> row of videos
    video_dense: F32  # [N, len(VIDEO_DENSE)], at the row's time
    viewers: ViewerArrays  # [V, ...]
    videos: VideoArrays  # [M, ...]; video_dense there is of no particular time
    video_ids: I64  # [M], ascending
    video_creator_id: I64  # [M]; -1 where unknown
    video_uploaded_at_s: F64  # [M]; NaN where unknown
    dimensions: FeatureDimensions

    def __len__(self) -> int:
        return len(self.event_time_s)

    def cut_time_s(self, fraction: float) -> float:
        """Returns the time before which ``fraction`` of the rows lie; rows at exactly this time are after the cut."""
        position = round(len(self) * fraction)
        return float(np.inf) if position >= len(self) else float(self.event_time_s[position])

    def between(self, start_s: float, end_s: float) -> I64:
        """Returns the indices of the rows in ``[start_s, end_s)``."""
        first, last = np.searchsorted(self.event_time_s, [start_s, end_s], side="left")
        return np.arange(first, last, dtype=np.int64)


def load_rows(path: Path, dimensions: FeatureDimensions) -> TrainingRows:
    """Reads ``training_rows.parquet`` (a file, or a folder of files).

    Raises:
        EmptyDatasetError: if there are no rows.
        MalformedFileError: if the file or a column is missing, a label or time is null or not finite, a list has
            another width than ``dimensions`` states, or an integer does not fit its type.
        FeatureError: if an id or a topic is above its limit.
    """
    if not path.exists():
        raise MalformedFileError(path, "training rows; run `reelway features` first", seen="no such file")
    source = pads.dataset(path, format="parquet")
    if absent := [name for name in REQUIRED if name not in source.schema.names]:
        raise MalformedFileError(path, f"the columns {list(REQUIRED)}", seen="no such column", column=absent[0])
    parts = [_read_chunk(chunk, path, dimensions) for chunk in _chunks(source)]
    if not parts:
        raise EmptyDatasetError(
            f"{path}: 0 training rows, expected at least one impression with features; check the data set's window"
        )
    return _joined(parts, path, dimensions)


@dataclass(frozen=True)
class _Part:
    rows: dict[str, NDArray[Any]]
    viewers: ViewerArrays
    videos: VideoArrays
    video_ids: I64
    video_time_s: F64
    video_creator_id: I64
    video_uploaded_at_s: F64


def _chunks(source: pads.Dataset) -> Iterator[pa.Table]:
    pending: list[pa.RecordBatch] = []
    for batch in source.to_batches(batch_size=_CHUNK_ROWS):
        if batch.num_rows:
            pending.append(batch)
        if sum(b.num_rows for b in pending) >= _CHUNK_ROWS:
            yield pa.Table.from_batches(pending)
            pending = []
    if pending:
        yield pa.Table.from_batches(pending)


def _read_chunk(table: pa.Table, path: Path, dimensions: FeatureDimensions) -> _Part:
    # sorted by request, so that equal viewer rows are neighbours
    table = table.sort_by([("request_id", "ascending"), ("viewer_id", "ascending"), ("request_time_s", "ascending")])
    _check_widths(table, path, dimensions)
    columns = columns_from_table(table)
    plain = {name: columns[name] for name in REQUIRED if name != "device"}
    rows = {name: np.asarray(column) for name, column in plain.items()}
    rows["event_time_s"] = _seconds(table.column("event_time"))
    for name in ("event_time_s", "request_time_s", "weight", *RANKER_TASKS):
        _check_known(rows[name], path, name)
    del rows["event_time"]
    time_s = rows["request_time_s"].astype(np.float64)
    device = table.column("device").cast(pa.string()).to_pylist()
    viewers, viewer_row = _deduplicated_viewers(
        _narrow_codes(assemble_viewers(columns, time_s, device, dimensions), dimensions, path), rows["request_id"]
    )
    videos = _narrow_codes(assemble_videos(columns, time_s, dimensions), dimensions, path)
    rows["viewer_row"] = viewer_row
    rows["video_dense"] = videos.video_dense
    order = np.lexsort((time_s, rows["video_id"]))
    last = order[np.append(np.diff(rows["video_id"][order]) != 0, True)]
    creator = rows.pop("creator_id").astype(np.float64)
    uploaded_s = np.asarray(columns.get("uploaded_at_s", np.full(len(time_s), np.nan)), dtype=np.float64)
    return _Part(
        rows,
        viewers,
        _take(videos, last),
        video_ids=rows["video_id"][last].astype(np.int64),
        video_time_s=time_s[last],
        video_creator_id=np.nan_to_num(creator[last], nan=-1.0).astype(np.int64),
        video_uploaded_at_s=uploaded_s[last],
    )


def _seconds(column: pa.ChunkedArray) -> F64:
    if pa.types.is_timestamp(column.type):
        unit_s = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}[column.type.unit]
        return np.asarray(column.cast(pa.int64()).to_numpy(), dtype=np.float64) * unit_s
    return np.asarray(column.to_numpy(), dtype=np.float64)


def _check_known(values: NDArray[Any], path: Path, column: str) -> None:
    bad = ~np.isfinite(np.asarray(values, dtype=np.float64))
    if bad.any():
        raise MalformedFileError(path, "a finite number in every row", seen=f"{int(bad.sum())} without", column=column)


def _check_widths(table: pa.Table, path: Path, dimensions: FeatureDimensions) -> None:
    """Rejects a list feature of another width than that of the data set's schema.

    Raises:
        MalformedFileError: if a list that is not null has another number of values.
    """
    widths = {**dimensions.content, "topic_affinity": dimensions.topics}
    for name, width in widths.items():
        if name not in table.column_names or not pa.types.is_list(table.schema.field(name).type):
            continue
        lengths = pc.list_value_length(table[name]).drop_null()
        wrong = lengths.filter(pc.not_equal(lengths, width))
        if len(wrong):
            expected = f"{width} values as in the data set's schema; run `reelway features` again"
            raise MalformedFileError(path, expected, seen=f"a list of {wrong[0].as_py()}", column=name)


def fit_integers(values: NDArray[Any], kind: type[np.signedinteger[Any]], path: Path, column: str) -> NDArray[Any]:
    """Returns integers as a narrower type.

    Raises:
        MalformedFileError: if a value is outside the type's range. It would wrap around.
    """
    limits = np.iinfo(kind)
    outside = values[(values < limits.min) | (values > limits.max)]
    if len(outside):
        expected = f"an integer in {limits.min}..{limits.max} ({limits.dtype})"
        raise MalformedFileError(path, expected, seen=outside.flat[0].item(), column=column)
    return values.astype(kind)


def _narrow_codes(arrays: Arrays, dimensions: FeatureDimensions, path: Path) -> Arrays:
    """Codes as 16-bit integers if the largest possible code fits, else as 32-bit integers."""
    largest = max(dimensions.id_buckets, dimensions.category_buckets, dimensions.topics + 1) - 1
    kind = np.int16 if largest <= np.iinfo(np.int16).max else np.int32
    present = (name for name in _CODES if hasattr(arrays, name))
    return dataclasses.replace(
        arrays, **{name: fit_integers(getattr(arrays, name), kind, path, name) for name in present}
    )


def _take(arrays: Arrays, index: NDArray[Any]) -> Arrays:
    return type(arrays)(**{f.name: getattr(arrays, f.name)[index] for f in dataclasses.fields(arrays)})


def _concatenated(parts: list[Arrays]) -> Arrays:
    kind = type(parts[0])
    return kind(**{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(kind)})


def _deduplicated_viewers(viewers: ViewerArrays, request_id: I64) -> tuple[ViewerArrays, NDArray[np.int32]]:
    """Merges neighbouring rows of one request whose inputs are bitwise equal."""
    differs = np.ones(len(request_id), dtype=np.bool_)
    differs[1:] = request_id[1:] != request_id[:-1]
    for name in _VIEWER_FIELDS:
        values = np.ascontiguousarray(getattr(viewers, name)).reshape(len(request_id), -1)
        raw = values.view(np.uint8) if values.shape[1] else np.zeros((len(request_id), 0), np.uint8)
        differs[1:] |= (raw[1:] != raw[:-1]).any(axis=1)
    return _take(viewers, np.flatnonzero(differs)), (np.cumsum(differs) - 1).astype(np.int32)


def _joined(parts: list[_Part], path: Path, dimensions: FeatureDimensions) -> TrainingRows:
    start = np.cumsum([0, *(len(part.viewers.viewer_dense) for part in parts)])
    for part, offset in zip(parts, start, strict=False):
        part.rows["viewer_row"] = part.rows["viewer_row"] + np.int32(offset)
    rows = {name: np.concatenate([part.rows[name] for part in parts]) for name in parts[0].rows}
    order = np.lexsort((rows["impression_id"], rows["event_time_s"]))
    rows = {name: values[order] for name, values in rows.items()}
    ids = np.concatenate([part.video_ids for part in parts])
    by_id = np.lexsort((np.concatenate([part.video_time_s for part in parts]), ids))
    latest = by_id[np.append(np.diff(ids[by_id]) != 0, True)]
    video_ids = ids[latest]
    return TrainingRows(
        impression_id=rows["impression_id"].astype(np.int64),
        request_id=rows["request_id"].astype(np.int64),
        viewer_id=rows["viewer_id"].astype(np.int64),
        video_id=rows["video_id"].astype(np.int64),
        event_time_s=rows["event_time_s"],
        request_time_s=rows["request_time_s"].astype(np.float64),
        position=fit_integers(rows["position"], np.int16, path, "position"),
        weight=rows["weight"].astype(np.float32),
        labels=np.column_stack([rows[task] for task in RANKER_TASKS]).astype(np.float32),
        viewer_row=rows["viewer_row"].astype(np.int32),
        video_row=np.searchsorted(video_ids, rows["video_id"]).astype(np.int32),
        video_dense=rows["video_dense"],
        viewers=_concatenated([part.viewers for part in parts]),
        videos=_take(_concatenated([part.videos for part in parts]), latest),
        video_ids=video_ids,
        video_creator_id=np.concatenate([part.video_creator_id for part in parts])[latest],
        video_uploaded_at_s=np.concatenate([part.video_uploaded_at_s for part in parts])[latest],
        dimensions=dimensions,
    )


def save_arrays(rows: TrainingRows, folder: Path) -> None:
    """Writes one ``.npy`` file per array, which worker processes map and share instead of reading Parquet."""
    write_dimensions(folder, rows.dimensions)
    for name, values in _flat(rows).items():
        np.save(folder / f"{name}.npy", values, allow_pickle=False)


def digest_of_arrays(arrays: Mapping[str, NDArray[Any]]) -> str:
    """Returns the hex BLAKE2b over names, types, shapes and values."""
    digest = hashlib.blake2b(digest_size=16)
    for name, values in sorted(arrays.items()):
        digest.update(repr((name, values.dtype.str, values.shape)).encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def digest_of_rows(rows: TrainingRows) -> str:
    """Returns the digest of all arrays of the rows, so that it differs if any value differs."""
    return digest_of_arrays(_flat(rows))


def map_arrays(folder: Path) -> TrainingRows:
    """Maps the files of ``save_arrays`` read-only into memory."""

    def read(name: str) -> Any:
        return np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)

    viewers = ViewerArrays(**{name: read(f"viewers.{name}") for name in _VIEWER_FIELDS})
    videos = VideoArrays(**{name: read(f"videos.{name}") for name in _VIDEO_FIELDS})
    plain = {f.name: read(f.name) for f in dataclasses.fields(TrainingRows) if f.name not in _NOT_ARRAYS}
    return TrainingRows(viewers=viewers, videos=videos, dimensions=read_dimensions(folder), **plain)


def _flat(rows: TrainingRows) -> dict[str, NDArray[Any]]:
    flat: dict[str, NDArray[Any]] = {}
    for f in dataclasses.fields(rows):
        value = getattr(rows, f.name)
        if isinstance(value, np.ndarray):
            flat[f.name] = value
        elif f.name != "dimensions":
            flat |= {f"{f.name}.{inner.name}": getattr(value, inner.name) for inner in dataclasses.fields(value)}
    return flat
