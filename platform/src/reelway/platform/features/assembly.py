"""Feature values in, model inputs out: the one place where the order of a vector is decided.

Training calls it on a whole Parquet table, serving on one viewer's row and a gather of the video table; both run
these lines, so a vector cannot be put together in two ways. Values stay raw (see ``contracts.features``); a
missing number is NaN, a missing id or word has code 0.
"""

# Shapes: B viewers (or rows), C videos, L history, H hashes, T topics

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reelway.platform.contracts import features as names
from reelway.platform.contracts.events import AUDIO_DIM, TEXT_DIM, TOPICS, VISUAL_DIM
from reelway.platform.features import on_demand
from reelway.platform.features.hashing import MISSING_ID, id_codes, word_codes

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Ragged:
    """Lists of different lengths: row i is ``values[offsets[i]:offsets[i + 1]]``."""

    values: NDArray[Any]
    offsets: I64

    def __len__(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True)
class ViewerArrays:
    """Inputs of the viewer side, by the names of ``VIEWER_TOWER_INPUTS``."""

    viewer_dense: F32  # [B, len(VIEWER_DENSE)]
    viewer_categories: I64  # [B, len(VIEWER_CATEGORIES)]
    history_codes: I64  # [B, L, H]; the latest video last, padded in front with 0
    history_weights: F32  # [B, L]
    history_age_h: F32  # [B, L] hours between the watch and the request; 0 where padded

    def as_inputs(self) -> dict[str, NDArray[Any]]:
        """The arrays by input name."""
        return {name: getattr(self, name) for name in names.VIEWER_TOWER_INPUTS}


@dataclass(frozen=True)
class VideoArrays:
    """Inputs of the video side, by the names of ``VIDEO_TOWER_INPUTS`` and ``RANKER_INPUTS``."""

    video_codes: I64  # [C, H]
    creator_codes: I64  # [C, H]
    video_categories: I64  # [C, len(VIDEO_CATEGORIES)]; topic + 1, so that 0 is unknown
    video_static_dense: F32  # [C, len(VIDEO_STATIC_DENSE)]
    video_dense: F32  # [C, len(VIDEO_DENSE)]
    visual: F32  # [C, VISUAL_DIM]; zeros where missing (has_visual says so)
    audio: F32  # [C, AUDIO_DIM]
    text: F32  # [C, TEXT_DIM]


Column = NDArray[Any] | Ragged | Sequence[Any]
Columns = Mapping[str, Column]


def columns_from_table(table: pa.Table) -> dict[str, Column]:
    """Arrow columns as numpy arrays and ``Ragged`` lists, without a Python object per row."""
    columns: dict[str, Column] = {}
    for name in table.column_names:
        array = table.column(name).combine_chunks()
        if isinstance(array, pa.ChunkedArray):
            array = array.chunk(0) if array.num_chunks else pa.array([], array.type)
        kind = array.type
        if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
            offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
            columns[name] = Ragged(array.flatten().to_numpy(zero_copy_only=False), offsets)
        elif pa.types.is_dictionary(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
            columns[name] = array.to_pylist()
        elif pa.types.is_integer(kind) and array.null_count:
            columns[name] = array.cast(pa.float64()).to_numpy(zero_copy_only=False)
        else:
            columns[name] = array.to_numpy(zero_copy_only=False)
    return columns


def columns_from_row(row: Mapping[str, Any]) -> dict[str, Column]:
    """One row (as an online store returns it) as columns of length one."""
    columns: dict[str, Column] = {}
    for name, value in row.items():
        if isinstance(value, list | tuple | np.ndarray):
            columns[name] = Ragged(np.asarray(value), np.array([0, len(value)], dtype=np.int64))
        else:
            columns[name] = [value]
    return columns


def _floats(columns: Columns, name: str, rows: int) -> NDArray[np.float64]:
    column = columns.get(name)
    if column is None or (isinstance(column, Ragged) and len(column.values) == 0):
        return np.full(rows, np.nan)
    if isinstance(column, Ragged):
        raise TypeError(f"feature {name!r} is a list, expected one number per row")
    return np.asarray(column, dtype=np.float64)


def _words(columns: Columns, name: str, rows: int) -> I64:
    column = columns.get(name)
    return word_codes(column) if column is not None else np.zeros(rows, dtype=np.int64)  # type: ignore[arg-type]


def _ids(columns: Columns, name: str, rows: int) -> I64:
    values = _floats(columns, name, rows)
    return np.where(np.isnan(values), MISSING_ID, values).astype(np.int64)


def _vectors(columns: Columns, name: str, rows: int, width: int) -> tuple[F32, NDArray[np.bool_]]:
    """A list column as a matrix; a row that has no list (or one of another width) is zeros and ``False``."""
    out = np.zeros((rows, width), dtype=np.float32)
    column = columns.get(name)
    if not isinstance(column, Ragged):
        return out, np.zeros(rows, dtype=np.bool_)
    present = np.diff(column.offsets) == width
    if present.any():
        take = column.offsets[:-1][present, None] + np.arange(width)
        out[present] = column.values[take]
    bad = present & ~np.isfinite(out).all(axis=1)
    out[bad] = 0.0
    return out, present & ~bad


def _latest(column: Column | None, rows: int, length: int, fill: float) -> NDArray[np.float64]:
    """The last ``length`` values of each list, right-aligned, padded in front with ``fill``."""
    out = np.full((rows, length), fill)
    if not isinstance(column, Ragged) or not len(column.values):
        return out
    ends = column.offsets[1:]
    counts = np.minimum(np.diff(column.offsets), length)
    slots = np.arange(length) - (length - counts)[:, None]  # B L: negative where padded
    present = slots >= 0
    source = (ends - counts)[:, None] + slots
    out[present] = column.values[source[present]]
    return out


def assemble_viewers(
    columns: Columns,
    request_time_s: NDArray[np.float64],
    device: Sequence[str | None],
    *,
    history_length: int = names.HISTORY_LENGTH,
) -> ViewerArrays:
    """Viewer rows (the fields of ``VIEWER_VIEWS``) at their request times as model inputs.

    Args:
        columns: field name -> one value per row; absent fields count as missing in every row.
        request_time_s: Unix seconds, ``[B]``.
        device: one word per row.
        history_length: L.
    """
    rows = len(request_time_s)
    affinity_BT, has_affinity = _vectors(columns, "topic_affinity", rows, TOPICS)
    affinity_BT[~has_affinity] = np.nan
    context = on_demand.cyclic_time(request_time_s)
    context["account_age_d"] = on_demand.account_age_d(request_time_s, _floats(columns, "created_at_s", rows))
    times_BL = _latest(columns.get("history_times_s"), rows, history_length, np.nan)
    age_BL = np.maximum(request_time_s[:, None] - times_BL, 0.0) / 3600.0
    context["hours_since_last_activity"] = age_BL[:, -1]  # NaN without a history
    dense = np.column_stack(
        [
            *(_floats(columns, name, rows) for name in names.VIEWER_ACTIVITY),
            affinity_BT,
            *(context[name] for name in names.VIEWER_DENSE[-len(context) :]),
        ]
    ).astype(np.float32)
    categories = np.column_stack(
        [*(_words(columns, name, rows) for name in names.VIEWER_CATEGORIES[:-1]), word_codes(device)]
    )
    videos_BL = _latest(columns.get("history_videos"), rows, history_length, MISSING_ID).astype(np.int64)
    weights_BL = _latest(columns.get("history_weights"), rows, history_length, 0.0).astype(np.float32)
    age_BL = np.nan_to_num(age_BL, nan=0.0)
    return ViewerArrays(dense, categories, id_codes(videos_BL), weights_BL, age_BL.astype(np.float32))


def assemble_videos(columns: Columns, request_time_s: NDArray[np.float64]) -> VideoArrays:
    """Video rows (``video_id`` and the fields of the video and creator views) as model inputs.

    Args:
        columns: field name -> one value per row; absent fields count as missing in every row.
        request_time_s: Unix seconds, ``[C]``; only ``hours_since_upload`` depends on it.
    """
    rows = len(request_time_s)
    visual, has_visual = _vectors(columns, "visual", rows, VISUAL_DIM)
    audio, has_audio = _vectors(columns, "audio", rows, AUDIO_DIM)
    text, has_text = _vectors(columns, "text", rows, TEXT_DIM)
    static = np.column_stack([_floats(columns, "duration_s", rows), has_visual, has_audio, has_text])
    live = np.column_stack([_floats(columns, name, rows) for name in names.VIDEO_LIVE_DENSE])
    age_h = on_demand.hours_since_upload(request_time_s, _floats(columns, "uploaded_at_s", rows))
    topic = np.clip(_ids(columns, "topic", rows) + 1, 0, TOPICS)
    return VideoArrays(
        video_codes=id_codes(_ids(columns, "video_id", rows)),
        creator_codes=id_codes(_ids(columns, "creator_id", rows)),
        video_categories=np.column_stack([topic, _words(columns, "video_language", rows)]),
        video_static_dense=static.astype(np.float32),
        video_dense=np.column_stack([static, live, age_h]).astype(np.float32),
        visual=visual,
        audio=audio,
        text=text,
    )
