"""Imports event files (Parquet or CSV, one row per impression) into the event schema.

``reelway import events --help`` documents the columns. Viewer, video and time are required; flags are 0 or 1.
``id_mapping`` defines how ids become contract ids, ``time_columns`` which times are accepted.
"""

# Shapes: N impressions

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reelway.pipelines.datasets.checks import CheckLimits
from reelway.pipelines.datasets.columns import dictionary_column, earliest_by_key, float32_column, time_column
from reelway.pipelines.datasets.id_mapping import IdMapper, read_ids
from reelway.pipelines.datasets.source_table import TEXT, SourceTable
from reelway.pipelines.datasets.time_columns import read_times_us
from reelway.platform.contracts.events import (
    CREATORS,
    IMPRESSIONS,
    OUTCOMES,
    VIDEOS,
    VIEWERS,
    Arm,
    OutcomeType,
)
from reelway.platform.errors import EmptyDatasetError

I64 = NDArray[np.int64]

_FLAGS: Final = tuple(kind.value for kind in OutcomeType if kind is not OutcomeType.WATCH)
_DEFAULT_DURATION_MS: Final = 30_000
_INT, _TEXT = pa.int64(), pa.string()
_EVENT_COLUMNS: Final[Mapping[str, pa.DataType | None]] = {
    **dict.fromkeys(("viewer_id", "video_id", "event_time", "impression_id", "request_id"), TEXT),
    **dict.fromkeys(("release", "arm", "source", "device"), TEXT),
    **dict.fromkeys(("position", "propensity", "watch_ms", *_FLAGS)),
}
_VIDEO_COLUMNS: Final[Mapping[str, pa.DataType | None]] = {
    **dict.fromkeys(("video_id", "creator_id", "uploaded_at", "language", "title"), TEXT),
    **dict.fromkeys(("duration_ms", "topic", "visual", "audio", "text")),
}
_LIMITS: Final = CheckLimits()


def import_events(
    path: Path, videos_path: Path | None = None
) -> tuple[dict[str, pa.Table], dict[str, Any], dict[str, pa.Table]]:
    """Returns the five tables, the data set's info, and the extra table ``id_map``.

    Raises:
        MalformedFileError: if a file does not match the documentation of ``reelway import events``.
        EmptyDatasetError: if there are no rows.
    """
    source, ids = SourceTable(path, _EVENT_COLUMNS), IdMapper()
    if not source.rows:
        raise EmptyDatasetError(f"{path}: 0 rows, expected at least one impression")
    about = SourceTable(videos_path, _VIDEO_COLUMNS) if videos_path else None
    (viewer,) = ids.map_columns("viewer_id", read_ids(source, "viewer_id"))
    video, *video_ids = ids.map_columns(
        "video_id", read_ids(source, "video_id"), *([read_ids(about, "video_id")] if about else [])
    )
    at_us = read_times_us(source, "event_time", source.require("event_time"))
    impression = _ids_or_row_numbers(source, ids, "impression_id", at_us)
    request = (
        impression
        if source.get("request_id") is None
        else ids.map_columns("request_id", read_ids(source, "request_id"))[0]
    )
    # rows that the data checks will set aside date no entity
    timely = (at_us >= _LIMITS.first_time_us) & (at_us <= _LIMITS.last_time_us)
    if not timely.any():
        timely[:] = True
    shown, shown_us = earliest_by_key(video[timely], at_us[timely])
    listed = video_ids[0] if video_ids else shown
    slot = np.minimum(np.searchsorted(shown, listed), len(shown) - 1)
    first_us = np.where(shown[slot] == listed, shown_us[slot], shown_us.min())
    videos = _videos(about, ids, listed, first_us)
    viewers, viewer_first_us = earliest_by_key(viewer[timely], at_us[timely])
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


def _ids_or_row_numbers(source: SourceTable, ids: IdMapper, name: str, at_us: I64) -> I64:
    if source.get(name) is not None:
        return ids.map_columns(name, read_ids(source, name))[0]
    rank = np.empty(len(at_us), dtype=np.int64)
    rank[np.argsort(at_us, kind="stable")] = np.arange(len(at_us))
    return rank


def _videos(source: SourceTable | None, ids: IdMapper, video_ids: I64, uploaded_us: I64) -> pa.Table:
    """Returns the table ``videos``, from the videos file if given; ``uploaded_us`` replaces missing upload times."""
    columns: dict[str, Any] = {
        "video_id": video_ids,
        "creator_id": np.zeros(len(video_ids), dtype=np.int64),
        "uploaded_at": time_column(uploaded_us),
        "duration_ms": np.full(len(video_ids), _DEFAULT_DURATION_MS, dtype=np.int32),
        "topic": np.full(len(video_ids), -1, dtype=np.int32),
    }
    if source:
        if source.get("creator_id") is not None:
            (columns["creator_id"],) = ids.map_columns("creator_id", read_ids(source, "creator_id", missing=""))
        if (uploaded := source.get("uploaded_at")) is not None:
            valid = uploaded.is_valid().to_numpy(zero_copy_only=False)
            columns["uploaded_at"] = time_column(
                np.where(valid, read_times_us(source, "uploaded_at", uploaded), uploaded_us)
            )
        columns["duration_ms"] = _numbers(source, "duration_ms", pa.int32(), _DEFAULT_DURATION_MS)
        columns["topic"] = _numbers(source, "topic", pa.int32(), -1)
        for name in ("language", "title", "visual", "audio", "text"):
            if (column := source.get(name)) is not None:
                kind = VIDEOS.field(name).type
                columns[name] = source.cast(name, column, kind, f"values of type {kind}")
    return pa.table([columns.get(f.name, pa.nulls(len(video_ids), f.type)) for f in VIDEOS], schema=VIDEOS)


def _impressions(source: SourceTable, impression: I64, request: I64, viewer: I64, video: I64, at_us: I64) -> pa.Table:
    columns: Mapping[str, Any] = {
        "impression_id": impression,
        "request_id": request,
        "viewer_id": viewer,
        "video_id": video,
        "position": _numbers(source, "position", pa.int16(), 0),
        "event_time": time_column(at_us),
        "release": _strings(source, "release", "import"),
        "arm": _strings(source, "arm", Arm.STABLE.value),
        "source": _strings(source, "source", "import"),
        "propensity": _numbers(source, "propensity", pa.float32(), 1.0),
        "device": _strings(source, "device", "unknown"),
    }
    return pa.table(columns, schema=IMPRESSIONS)


def _strings(source: SourceTable, name: str, default: str) -> pa.Array:
    array = source.get(name)
    if array is None:
        array = pa.nulls(source.rows, _TEXT)
    encoded = pc.fill_null(source.text(name, array), default).dictionary_encode()
    return dictionary_column(encoded.indices.to_numpy(), encoded.dictionary.to_pylist())


def _numbers(source: SourceTable, name: str, kind: pa.DataType, default: float) -> NDArray[Any]:
    """Returns a numeric column; ``default`` where it is absent or null."""
    array = source.get(name)
    if array is None:
        return np.full(source.rows, default, dtype=kind.to_pandas_dtype())
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.int8())
    is_number = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_null)
    if not any(accepts(array.type) for accepts in is_number):
        source.raise_if_any(name, array.is_valid(), array, "a number")
        array = pa.nulls(len(array), kind)
    cast = source.numbers(name, array, kind, f"a value of type {kind}")
    filled: NDArray[Any] = pc.fill_null(cast, pa.scalar(default, kind)).to_numpy(zero_copy_only=False)
    return filled


def _outcomes(source: SourceTable, impression: I64, viewer: I64, video: I64, at_us: I64) -> pa.Table:
    """Returns a watch at its end for each ``watch_ms``, and each flag one millisecond later."""
    watch_ms = _numbers(source, "watch_ms", pa.float64(), np.nan)
    hits = [np.flatnonzero(~np.isnan(watch_ms))]
    for name in _FLAGS:
        flag = _numbers(source, name, pa.float64(), 0.0)
        source.raise_if_any(name, pa.array(~np.isin(flag, (0.0, 1.0))), pa.array(flag), "0 or 1")
        hits.append(np.flatnonzero(flag))
    kind = np.repeat(np.arange(len(hits), dtype=np.int32), [len(hit) for hit in hits])
    row = np.concatenate(hits)
    watched_ms = np.clip(np.nan_to_num(watch_ms), 0.0, _LIMITS.max_watch_ms)
    end_us = at_us + 1000 + (watched_ms * 1000).astype(np.int64)
    out_us = end_us[row] + 1000 * (kind > 0)
    order = np.lexsort((kind, row, out_us))
    row, kind, out_us = row[order], kind[order], out_us[order]
    columns = {
        "outcome_id": np.arange(len(row), dtype=np.int64),
        "impression_id": impression[row],
        "viewer_id": viewer[row],
        "video_id": video[row],
        "type": dictionary_column(kind, [OutcomeType.WATCH.value, *_FLAGS]),
        "value": float32_column(np.where(kind == 0, watch_ms[row], 1.0)),
        "event_time": time_column(out_us),
    }
    return pa.table(columns, schema=OUTCOMES)
