"""Turns feature values into model inputs and decides the order of every vector.

Training calls it with a whole Parquet table. Serving calls it with one viewer's row. Values stay raw (see
``contracts.feature_names``): a missing number is NaN, and a missing id or category has code 0. Widths and vocabulary
sizes are those of the given ``FeatureDimensions``.
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

from reelway.platform.contracts import feature_names as names
from reelway.platform.contracts.feature_dimensions import FeatureDimensions
from reelway.platform.contracts.ids import MAX_ID
from reelway.platform.errors import FeatureError
from reelway.platform.features import on_demand
from reelway.platform.features.hashing import MISSING_ID, category_codes, id_codes

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class RaggedColumn:
    """Lists of different lengths: row i is ``values[offsets[i]:offsets[i + 1]]``."""

    values: NDArray[Any]
    offsets: I64

    def __len__(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True)
class ViewerArrays:
    """Inputs of the viewer tower, by the names of ``VIEWER_TOWER_INPUTS``."""

    viewer_dense: F32  # [B, len(dimensions.viewer_dense)]
    viewer_categories: I64  # [B, len(VIEWER_CATEGORIES)]
    history_codes: I64  # [B, L, H]; latest video last, padded in front with 0
    history_weights: F32  # [B, L]
    history_age_h: F32  # [B, L] hours between the watch and the request; 0 where padded

    def as_inputs(self) -> dict[str, NDArray[Any]]:
        return {name: getattr(self, name) for name in names.VIEWER_TOWER_INPUTS}


@dataclass(frozen=True)
class VideoArrays:
    """Inputs of the video tower and the ranker, by the names of ``VIDEO_TOWER_INPUTS`` and ``RANKER_INPUTS``."""

    video_codes: I64  # [C, H]
    creator_codes: I64  # [C, H]
    video_categories: I64  # [C, len(VIDEO_CATEGORIES)]; topic + 1, so that 0 is unknown
    video_static_dense: F32  # [C, len(VIDEO_STATIC_DENSE)]
    video_dense: F32  # [C, len(VIDEO_DENSE)]
    visual: F32  # [C, dimensions.visual]; zeros where has_visual is 0
    audio: F32  # [C, dimensions.audio]
    text: F32  # [C, dimensions.text]


Column = NDArray[Any] | RaggedColumn | Sequence[Any]
Columns = Mapping[str, Column]


def columns_from_table(table: pa.Table) -> dict[str, Column]:
    """Returns Arrow columns as numpy arrays and ``RaggedColumn`` lists; only strings become Python objects."""
    columns: dict[str, Column] = {}
    for name in table.column_names:
        array = table.column(name).combine_chunks()
        if isinstance(array, pa.ChunkedArray):
            array = array.chunk(0) if array.num_chunks else pa.array([], array.type)
        kind = array.type
        if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
            offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
            columns[name] = RaggedColumn(array.flatten().to_numpy(zero_copy_only=False), offsets)
        elif pa.types.is_dictionary(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
            columns[name] = array.to_pylist()
        elif pa.types.is_integer(kind) and array.null_count:
            columns[name] = array.cast(pa.float64()).to_numpy(zero_copy_only=False)
        else:
            columns[name] = array.to_numpy(zero_copy_only=False)
    return columns


def columns_from_row(row: Mapping[str, Any]) -> dict[str, Column]:
    """Returns one row of an online store as columns of length one."""
    columns: dict[str, Column] = {}
    for name, value in row.items():
        if isinstance(value, list | tuple | np.ndarray):
            columns[name] = RaggedColumn(np.asarray(value), np.array([0, len(value)], dtype=np.int64))
        else:
            columns[name] = [value]
    return columns


def _floats(columns: Columns, name: str, rows: int) -> NDArray[np.float64]:
    column = columns.get(name)
    if column is None or (isinstance(column, RaggedColumn) and len(column.values) == 0):
        return np.full(rows, np.nan)
    if isinstance(column, RaggedColumn):
        raise TypeError(f"feature {name!r} is a list, expected one number per row")
    return np.asarray(column, dtype=np.float64)


def _category_codes(columns: Columns, name: str, rows: int, buckets: int) -> I64:
    column = columns.get(name)
    if column is None:
        return np.zeros(rows, dtype=np.int64)
    return category_codes(column, buckets)  # type: ignore[arg-type]


def _integers(columns: Columns, name: str, rows: int, largest: int) -> I64:
    """Returns an integer column; ``MISSING_ID`` where a value is missing.

    Raises:
        FeatureError: if a value is above ``largest``.
    """
    return _checked(_floats(columns, name, rows), name, largest)


def _checked(values: NDArray[np.float64], name: str, largest: int) -> I64:
    values = np.where(np.isnan(values), MISSING_ID, values)
    if (excess := values > largest).any():
        raise FeatureError(
            f"feature {name!r}: value {int(values[excess][0])} is above the limit {largest}; correct the data set, or "
            "import it again so that its schema fits"
        )
    return values.astype(np.int64)


def _vectors(columns: Columns, name: str, rows: int, width: int) -> tuple[F32, NDArray[np.bool_]]:
    """Returns a list column as a matrix ``[rows, width]``, and which rows have a value.

    A row without a list, with a list of another width, or with a value that is not finite is zeros and ``False``: a
    viewer's row that an older schema wrote must not fail the request. ``training.rows`` rejects such widths.
    """
    out = np.zeros((rows, width), dtype=np.float32)
    column = columns.get(name)
    if not isinstance(column, RaggedColumn) or not width:
        return out, np.zeros(rows, dtype=np.bool_)
    present = np.diff(column.offsets) == width
    if present.any():
        take = column.offsets[:-1][present, None] + np.arange(width)
        out[present] = column.values[take]
    bad = present & ~np.isfinite(out).all(axis=1)
    out[bad] = 0.0
    return out, present & ~bad


def _latest(column: Column | None, rows: int, length: int, fill: float) -> NDArray[np.float64]:
    """Returns the last ``length`` values of each list, right-aligned and padded in front with ``fill``."""
    out = np.full((rows, length), fill)
    if not isinstance(column, RaggedColumn) or not len(column.values):
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
    dimensions: FeatureDimensions,
) -> ViewerArrays:
    """Returns viewer rows (the fields of ``VIEWER_VIEWS``) at their request times as model inputs.

    Args:
        columns: field name -> one value per row; an absent field is missing in every row.
        request_time_s: Unix seconds, ``[B]``.
        device: one string per row.

    Raises:
        FeatureError: if a video id is above ``MAX_ID``.
    """
    rows, length = len(request_time_s), dimensions.history_length
    affinity_BT, has_affinity = _vectors(columns, "topic_affinity", rows, dimensions.topics)
    affinity_BT[~has_affinity] = np.nan
    context = on_demand.cyclic_time(request_time_s)
    context["account_age_d"] = on_demand.account_age_d(request_time_s, _floats(columns, "created_at_s", rows))
    times_BL = _latest(columns.get("history_times_s"), rows, length, np.nan)
    age_BL = np.maximum(request_time_s[:, None] - times_BL, 0.0) / 3600.0
    context["hours_since_last_activity"] = age_BL[:, -1]  # NaN without a history
    weights_BL = _latest(columns.get("history_weights"), rows, length, 0.0)
    context |= on_demand.session_features(request_time_s, times_BL, weights_BL)
    dense = np.column_stack(
        [
            *(_floats(columns, name, rows) for name in names.VIEWER_ACTIVITY),
            affinity_BT,
            *(context[name] for name in names.VIEWER_CONTEXT),
        ]
    ).astype(np.float32)
    buckets = dimensions.category_buckets
    codes = [_category_codes(columns, name, rows, buckets) for name in names.VIEWER_CATEGORIES[:-1]]
    videos_BL = _checked(_latest(columns.get("history_videos"), rows, length, MISSING_ID), "history_videos", MAX_ID)
    return ViewerArrays(
        viewer_dense=dense,
        viewer_categories=np.column_stack([*codes, category_codes(device, buckets)]),
        history_codes=id_codes(videos_BL, dimensions.id_buckets),
        history_weights=weights_BL.astype(np.float32),
        history_age_h=np.nan_to_num(age_BL, nan=0.0).astype(np.float32),
    )


def assemble_videos(
    columns: Columns, request_time_s: NDArray[np.float64], dimensions: FeatureDimensions
) -> VideoArrays:
    """Returns video rows (``video_id`` and the fields of the video and creator views) as model inputs.

    Args:
        columns: field name -> one value per row; an absent field is missing in every row.
        request_time_s: Unix seconds, ``[C]``; only ``hours_since_upload`` depends on it.

    Raises:
        FeatureError: if an id is above ``MAX_ID``, or a topic is not among the topics of ``dimensions``.
    """
    rows = len(request_time_s)
    vectors = {name: _vectors(columns, name, rows, width) for name, width in dimensions.content.items()}
    static = np.column_stack([_floats(columns, "duration_s", rows), *(present for _, present in vectors.values())])
    live = np.column_stack([_floats(columns, name, rows) for name in names.VIDEO_LIVE_DENSE])
    age_h = on_demand.hours_since_upload(request_time_s, _floats(columns, "uploaded_at_s", rows))
    topic = np.maximum(_integers(columns, "topic", rows, dimensions.topics - 1) + 1, 0)
    language = _category_codes(columns, "video_language", rows, dimensions.category_buckets)
    return VideoArrays(
        video_codes=id_codes(_integers(columns, "video_id", rows, MAX_ID), dimensions.id_buckets),
        creator_codes=id_codes(_integers(columns, "creator_id", rows, MAX_ID), dimensions.id_buckets),
        video_categories=np.column_stack([topic, language]),
        video_static_dense=static.astype(np.float32),
        video_dense=np.column_stack([static, live, age_h]).astype(np.float32),
        **{name: values for name, (values, _) in vectors.items()},
    )
