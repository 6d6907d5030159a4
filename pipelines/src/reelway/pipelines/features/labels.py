"""Labels of impressions: one row per impression, with the ranker's labels and a weight for the viewer's history.

An impression without outcomes is a row of zeros. An outcome later than ``OUTCOME_HORIZON_S`` after its impression is
ignored.
"""

# Shapes: N impressions, E outcomes

from __future__ import annotations

from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reelway.platform.contracts.events import (
    LONG_WATCH_CAP_MS,
    LONG_WATCH_RATIO,
    OUTCOME_HORIZON_S,
    OUTCOME_WEIGHTS,
    TIMESTAMP_TYPE,
    WEIGHT_BOUNDS,
    OutcomeType,
)
from reelway.platform.contracts.feature_names import RANKER_TASKS
from reelway.platform.errors import DataError

I64 = NDArray[np.int64]

BINARY_OUTCOMES: Final = tuple(str(kind) for kind in OutcomeType if kind is not OutcomeType.WATCH)
LABELS: Final = (*RANKER_TASKS, "not_interested", "report", "block_creator", "block_topic")

LABELLED_SCHEMA: Final = pa.schema(
    [
        pa.field("impression_id", pa.int64(), nullable=False),
        pa.field("request_id", pa.int64(), nullable=False),
        pa.field("viewer_id", pa.int64(), nullable=False),
        pa.field("video_id", pa.int64(), nullable=False),
        pa.field("creator_id", pa.int64(), nullable=False),
        pa.field("video_topic", pa.int32(), nullable=False),
        pa.field("position", pa.int16(), nullable=False),
        pa.field("event_time", TIMESTAMP_TYPE, nullable=False),
        pa.field("request_time", TIMESTAMP_TYPE, nullable=False),  # first impression of the request
        pa.field("source", pa.string(), nullable=False),
        pa.field("propensity", pa.float32(), nullable=False),
        pa.field("device", pa.string(), nullable=False),
        *(pa.field(name, pa.float32(), nullable=False) for name in LABELS),
        pa.field("weight", pa.float32(), nullable=False),
        pa.field("outcome_time", TIMESTAMP_TYPE, nullable=False),  # when the last counted outcome became known
    ]
)


def times_us(column: pa.ChunkedArray) -> I64:
    """Returns a time column as microseconds since 1970."""
    values: I64 = column.cast(TIMESTAMP_TYPE).cast(pa.int64()).to_numpy()
    return values


def _rows_of(ids: I64, wanted: I64) -> tuple[I64, NDArray[np.bool_]]:
    """Returns the row of each wanted id, and whether the id exists."""
    if not len(ids):
        return np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=np.bool_)
    order = np.argsort(ids, kind="stable")
    slot = np.minimum(np.searchsorted(ids[order], wanted), len(ids) - 1)
    rows = order[slot]
    return rows, ids[rows] == wanted


def _string_column(column: pa.ChunkedArray) -> pa.Array:
    return pc.cast(column, pa.string()).combine_chunks()


def label_impressions(impressions: pa.Table, outcomes: pa.Table, videos: pa.Table) -> pa.Table:
    """Returns one row per impression in the schema ``LABELLED_SCHEMA``, in the order of the impressions.

    Binary labels are 0 or 1; ``watch_s`` is the longest reported watch. Applying an outcome twice changes nothing.
    ``request_time`` is the time of the request's first impression. The router knew no later features.

    Raises:
        DataError: if an impression shows a video that ``videos`` does not contain.
    """
    rows = impressions.num_rows
    impression_us = times_us(impressions["event_time"])
    video_row, known = _rows_of(videos["video_id"].to_numpy(), impressions["video_id"].to_numpy())
    if not known.all():
        missing = impressions["video_id"].to_numpy()[~known]
        raise DataError(
            f"impressions: {len(missing)} rows show videos that are not in the videos table (first: {missing[0]}); "
            "add these videos and run the data checks again"
        )
    row, matched = _rows_of(impressions["impression_id"].to_numpy(), outcomes["impression_id"].to_numpy())
    outcome_us = times_us(outcomes["event_time"])
    if rows:
        matched &= outcome_us <= impression_us[row] + OUTCOME_HORIZON_S * 1_000_000
    kind = _string_column(outcomes["type"])
    labels: dict[str, NDArray[np.float32]] = {}
    for name in BINARY_OUTCOMES:
        labels[name] = np.zeros(rows, dtype=np.float32)
        labels[name][row[matched & pc.equal(kind, name).to_numpy(zero_copy_only=False)]] = 1.0

    watch = matched & pc.equal(kind, str(OutcomeType.WATCH)).to_numpy(zero_copy_only=False)
    watch_ms = np.full(rows, -1.0)
    np.maximum.at(watch_ms, row[watch], outcomes["value"].to_numpy()[watch].astype(np.float64))
    duration_ms = videos["duration_ms"].to_numpy()[video_row] if rows else np.zeros(0)
    enough_ms = np.minimum(LONG_WATCH_RATIO * duration_ms, LONG_WATCH_CAP_MS)
    labels["long_watch"] = ((watch_ms >= 0) & (watch_ms >= enough_ms)).astype(np.float32)
    labels["watch_s"] = (np.maximum(watch_ms, 0.0) / 1000.0).astype(np.float32)
    weight = np.sum([value * labels[name].astype(np.float64) for name, value in OUTCOME_WEIGHTS.items()], axis=0)

    known_us = impression_us.copy()
    np.maximum.at(known_us, row[matched], outcome_us[matched])
    _, request = np.unique(impressions["request_id"].to_numpy(), return_inverse=True)
    request_us = np.full(request.max() + 1 if rows else 0, np.iinfo(np.int64).max)
    np.minimum.at(request_us, request, impression_us)

    columns = {
        **{name: impressions[name] for name in ("impression_id", "request_id", "viewer_id", "video_id", "position")},
        "creator_id": videos["creator_id"].to_numpy()[video_row] if rows else np.zeros(0, np.int64),
        "video_topic": videos["topic"].to_numpy()[video_row] if rows else np.zeros(0, np.int32),
        "event_time": impressions["event_time"],
        "request_time": pa.array(request_us[request], pa.int64()).cast(TIMESTAMP_TYPE),
        "source": _string_column(impressions["source"]),
        "propensity": impressions["propensity"],
        "device": _string_column(impressions["device"]),
        **labels,
        "weight": np.clip(weight, *WEIGHT_BOUNDS).astype(np.float32),
        "outcome_time": pa.array(known_us, pa.int64()).cast(TIMESTAMP_TYPE),
    }
    return pa.table([columns[name] for name in LABELLED_SCHEMA.names], schema=LABELLED_SCHEMA)
