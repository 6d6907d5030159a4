"""Imports event files (Parquet or CSV, one row per impression) into the event schema.

``reelway import events --help`` documents the columns. Viewer, video and time are required; flags are 0 or 1. Ids that
are not integers in 0..MAX_ID are numbered in order of appearance, and the table ``id_map`` of the data set maps the
numbers to the original ids.
"""

# Shapes: N impressions

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from reelway.pipelines.datasets.columns import dictionary_column, earliest_by_key, time_column
from reelway.pipelines.datasets.delimited import first_uncastable
from reelway.platform.contracts.events import (
    CREATORS,
    IMPRESSIONS,
    OUTCOMES,
    TIMESTAMP_TYPE,
    VIDEOS,
    VIEWERS,
    Arm,
    OutcomeType,
)
from reelway.platform.contracts.ids import MAX_ID
from reelway.platform.errors import EmptyDatasetError, MalformedFileError

I64 = NDArray[np.int64]

ID_MAP: Final = pa.schema(
    [
        pa.field("kind", pa.string(), nullable=False),  # viewer_id, video_id, creator_id, request_id, impression_id
        pa.field("original", pa.string(), nullable=False),
        pa.field("id", pa.int64(), nullable=False),
    ]
)
_FLAGS: Final = tuple(kind.value for kind in OutcomeType if kind is not OutcomeType.WATCH)
_DEFAULT_DURATION_MS: Final = 30_000
_INT, _TEXT = pa.int64(), pa.string()


class _SourceFile:
    """One file: its columns by name, and the row numbers for error messages."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if path.suffix == ".parquet":
                self.table, self._first_row = pq.read_table(path), 0
            elif path.suffix == ".csv":
                options = pacsv.ConvertOptions(strings_can_be_null=True, null_values=[""])
                self.table, self._first_row = pacsv.read_csv(path, convert_options=options), 2
            else:
                raise MalformedFileError(path, "a file ending in .parquet or .csv", seen=path.suffix)
        except FileNotFoundError:
            raise MalformedFileError(path, "a file", seen="no such file") from None
        except (pa.ArrowInvalid, OSError) as error:
            raise MalformedFileError(path, f"a readable {path.suffix} file", seen=str(error)) from error

    def get(self, name: str) -> pa.Array | None:
        if name not in self.table.column_names:
            return None
        chunks = self.table[name].chunks
        array = pa.concat_arrays(chunks) if chunks else pa.array([], self.table[name].type)
        return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array

    def require(self, name: str) -> pa.Array:
        array = self.get(name)
        if array is None:
            raise MalformedFileError(self.path, "this column", seen=self.table.column_names, column=name)
        self.raise_if_any(name, array.is_null(), array, "a value")
        return array

    def raise_if_any(self, name: str, bad: pa.Array, array: pa.Array, expected: str) -> None:
        row = pc.index(bad, True).as_py()
        if row >= 0:
            raise self._malformed(name, array, row, expected)

    def numbers(self, name: str, kind: pa.DataType, default: float) -> NDArray[Any]:
        """Returns a numeric column; ``default`` where it is absent or null."""
        array = self.get(name)
        if array is None:
            return np.full(self.table.num_rows, default, dtype=kind.to_pandas_dtype())
        if pa.types.is_boolean(array.type):
            array = array.cast(pa.int8())
        if not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type) or pa.types.is_null(array.type)):
            self.raise_if_any(name, array.is_valid(), array, "a number")
        try:
            cast = array.cast(kind)
        except pa.ArrowInvalid:
            raise self._malformed(name, array, first_uncastable(array, kind), f"a value of type {kind}") from None
        filled: NDArray[Any] = pc.fill_null(cast, pa.scalar(default, kind)).to_numpy(zero_copy_only=False)
        return filled

    def time_us(self, name: str, array: pa.Array) -> I64:
        """Returns RFC 3339 text, time columns or Unix seconds as microseconds."""
        kind = array.type
        if pa.types.is_timestamp(kind):
            array = array if kind.tz else array.cast(pa.timestamp(kind.unit, "UTC"))
            result: I64 = array.cast(TIMESTAMP_TYPE, safe=False).cast(_INT).to_numpy(zero_copy_only=False)
            return result
        if pa.types.is_integer(kind) or pa.types.is_floating(kind):
            seconds = array.cast(pa.float64()).to_numpy(zero_copy_only=False)
            self.raise_if_any(name, pa.array(~(np.abs(seconds) < 1e11)), array, "Unix time in seconds")
            rounded: I64 = np.rint(seconds * 1e6).astype(np.int64)
            return rounded
        text = array.cast(_TEXT)
        try:
            cast = text.cast(TIMESTAMP_TYPE)
        except pa.ArrowInvalid:
            row, expected = first_uncastable(text, TIMESTAMP_TYPE), "a time with its zone, like 2025-01-31T12:00:00Z"
            raise self._malformed(name, text, row, expected) from None
        parsed: I64 = cast.cast(_INT).to_numpy(zero_copy_only=False)
        return parsed

    def _malformed(self, name: str, array: pa.Array, row: int, expected: str) -> MalformedFileError:
        return MalformedFileError(self.path, expected, seen=array[row].as_py(), row=row + self._first_row, column=name)


class _IdMapper:
    """Maps the source's ids to contract ids."""

    def __init__(self) -> None:
        self._known: dict[str, pa.Array] = {}

    def map_columns(self, kind: str, *columns: pa.Array) -> list[I64]:
        """Returns the contract ids of all columns with this kind of id, one array per column.

        If all values are integers in 0..MAX_ID, they are kept. Otherwise every distinct value gets a number.
        """
        if all(_is_contract_id_column(column) for column in columns):
            return [column.cast(_INT).to_numpy(zero_copy_only=False) for column in columns]
        texts = [column.cast(_TEXT) for column in columns]
        self._known[kind] = pc.unique(pa.concat_arrays(texts))
        return [pc.index_in(text, self._known[kind]).cast(_INT).to_numpy(zero_copy_only=False) for text in texts]

    def table(self) -> pa.Table:
        """Returns all numbered ids in the schema ``ID_MAP``."""
        parts = [
            pa.table({"kind": pa.array([kind] * len(known), _TEXT), "original": known,
                      "id": pa.array(np.arange(len(known)))}, schema=ID_MAP)
            for kind, known in sorted(self._known.items())
        ]  # fmt: skip
        return pa.concat_tables(parts) if parts else ID_MAP.empty_table()


def _is_contract_id_column(column: pa.Array) -> bool:
    if not pa.types.is_integer(column.type):
        return False
    ends = pc.min_max(column).as_py()
    return not len(column) or (ends["min"] >= 0 and ends["max"] <= MAX_ID)


def import_events(
    path: Path, videos_path: Path | None = None
) -> tuple[dict[str, pa.Table], dict[str, Any], dict[str, pa.Table]]:
    """Returns the five tables, the data set's info, and the extra table ``id_map``.

    Raises:
        MalformedFileError: if a file does not match the documentation of ``reelway import events``.
        EmptyDatasetError: if there are no rows.
    """
    source, ids = _SourceFile(path), _IdMapper()
    rows = source.table.num_rows
    if not rows:
        raise EmptyDatasetError(f"{path}: 0 rows, expected at least one impression")
    about = _SourceFile(videos_path) if videos_path else None
    (viewer,) = ids.map_columns("viewer_id", source.require("viewer_id"))
    video, *video_ids = ids.map_columns(
        "video_id", source.require("video_id"), *([about.require("video_id")] if about else [])
    )
    at_us = source.time_us("event_time", source.require("event_time"))
    impression = _ids_or_row_numbers(source, ids, "impression_id", at_us)
    request = (
        impression
        if source.get("request_id") is None
        else ids.map_columns("request_id", source.require("request_id"))[0]
    )
    shown, shown_us = earliest_by_key(video, at_us)
    listed = video_ids[0] if video_ids else shown
    slot = np.minimum(np.searchsorted(shown, listed), len(shown) - 1)
    videos = _videos(about, ids, listed, np.where(shown[slot] == listed, shown_us[slot], at_us.min()))
    viewers, viewer_first_us = earliest_by_key(viewer, at_us)
    nothing = pa.nulls(len(viewers), _TEXT)
    creators, creator_first_us = earliest_by_key(
        videos["creator_id"].to_numpy(), videos["uploaded_at"].cast(_INT).to_numpy()
    )
    tables = {
        "viewers": pa.table([viewers, time_column(viewer_first_us), nothing, nothing, nothing], schema=VIEWERS),
        "creators": pa.table(
            [creators, time_column(creator_first_us), np.zeros(len(creators), np.int64)], schema=CREATORS
        ),
        "videos": videos,
        "impressions": _impressions(source, impression, request, viewer, video, at_us),
        "outcomes": _outcomes(source, impression, viewer, video, at_us),
    }
    info = {"name": path.stem, "source": str(path), "seed": None}
    return tables, info, {"id_map": ids.table()}


def _ids_or_row_numbers(source: _SourceFile, ids: _IdMapper, name: str, at_us: I64) -> I64:
    if source.get(name) is not None:
        return ids.map_columns(name, source.require(name))[0]
    rank = np.empty(len(at_us), dtype=np.int64)
    rank[np.argsort(at_us, kind="stable")] = np.arange(len(at_us))
    return rank


def _videos(source: _SourceFile | None, ids: _IdMapper, video_ids: I64, uploaded_us: I64) -> pa.Table:
    """Returns the table ``videos``, from the videos file if given; ``uploaded_us`` replaces missing upload times."""
    columns: dict[str, Any] = {
        "video_id": video_ids,
        "creator_id": np.zeros(len(video_ids), dtype=np.int64),
        "uploaded_at": time_column(uploaded_us),
        "duration_ms": np.full(len(video_ids), _DEFAULT_DURATION_MS, dtype=np.int32),
        "topic": np.full(len(video_ids), -1, dtype=np.int32),
    }
    if source:
        if (creator := source.get("creator_id")) is not None:
            named = pc.fill_null(creator.cast(_TEXT), "unknown") if creator.null_count else creator
            (columns["creator_id"],) = ids.map_columns("creator_id", named)
        if (uploaded := source.get("uploaded_at")) is not None:
            valid = uploaded.is_valid().to_numpy(zero_copy_only=False)
            uploaded_us = uploaded_us.copy()
            uploaded_us[valid] = source.time_us("uploaded_at", uploaded.filter(pa.array(valid)))
            columns["uploaded_at"] = time_column(uploaded_us)
        columns["duration_ms"] = source.numbers("duration_ms", pa.int32(), _DEFAULT_DURATION_MS)
        columns["topic"] = source.numbers("topic", pa.int32(), -1)
        for name in ("language", "title", "visual", "audio", "text"):
            if (column := source.get(name)) is not None:
                try:
                    columns[name] = column.cast(VIDEOS.field(name).type)
                except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                    raise MalformedFileError(
                        source.path, f"values of type {VIDEOS.field(name).type}", seen=str(error), column=name
                    ) from error
    return pa.table([columns.get(f.name, pa.nulls(len(video_ids), f.type)) for f in VIDEOS], schema=VIDEOS)


def _impressions(source: _SourceFile, impression: I64, request: I64, viewer: I64, video: I64, at_us: I64) -> pa.Table:
    columns: Mapping[str, Any] = {
        "impression_id": impression,
        "request_id": request,
        "viewer_id": viewer,
        "video_id": video,
        "position": source.numbers("position", pa.int16(), 0),
        "event_time": time_column(at_us),
        "release": _strings(source, "release", "import"),
        "arm": _strings(source, "arm", Arm.STABLE.value),
        "source": _strings(source, "source", "import"),
        "propensity": source.numbers("propensity", pa.float32(), 1.0),
        "device": _strings(source, "device", "unknown"),
    }
    return pa.table(columns, schema=IMPRESSIONS)


def _strings(source: _SourceFile, name: str, default: str) -> pa.Array:
    array = source.get(name)
    if array is None:
        array = pa.nulls(source.table.num_rows, _TEXT)
    encoded = pc.fill_null(array.cast(_TEXT), default).dictionary_encode()
    return dictionary_column(encoded.indices.to_numpy(), encoded.dictionary.to_pylist())


def _outcomes(source: _SourceFile, impression: I64, viewer: I64, video: I64, at_us: I64) -> pa.Table:
    """Returns a watch at its end for each ``watch_ms``, and each flag one millisecond later."""
    watch_ms = source.numbers("watch_ms", pa.float64(), np.nan)
    hits = [np.flatnonzero(~np.isnan(watch_ms))]
    for name in _FLAGS:
        flag = source.numbers(name, pa.float64(), 0.0)
        source.raise_if_any(name, pa.array(~np.isin(flag, (0.0, 1.0))), pa.array(flag), "0 or 1")
        hits.append(np.flatnonzero(flag))
    kind = np.repeat(np.arange(len(hits), dtype=np.int32), [len(hit) for hit in hits])
    row = np.concatenate(hits)
    end_us = at_us + 1000 + (np.nan_to_num(np.maximum(watch_ms, 0.0)) * 1000).astype(np.int64)
    out_us = end_us[row] + 1000 * (kind > 0)
    order = np.lexsort((kind, row, out_us))
    row, kind, out_us = row[order], kind[order], out_us[order]
    columns = {
        "outcome_id": np.arange(len(row), dtype=np.int64),
        "impression_id": impression[row],
        "viewer_id": viewer[row],
        "video_id": video[row],
        "type": dictionary_column(kind, [OutcomeType.WATCH.value, *_FLAGS]),
        "value": np.where(kind == 0, watch_ms[row], 1.0).astype(np.float32),
        "event_time": time_column(out_us),
    }
    return pa.table(columns, schema=OUTCOMES)
