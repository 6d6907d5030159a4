"""The event schema: impressions, viewers' outcomes, and the tables of viewers, creators and videos.

Every data set, simulated or imported, is a folder with these tables (see ``DATASET_TABLES``). Times are UTC
microseconds.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import pyarrow as pa

TIMESTAMP_TYPE: Final = pa.timestamp("us", tz="UTC")
STRING_DICTIONARY_TYPE: Final = pa.dictionary(pa.int32(), pa.string())


class OutcomeType(StrEnum):
    """A viewer's action on an impression. The value of ``watch`` is the watched milliseconds; the others have 1."""

    WATCH = "watch"
    LIKE = "like"
    SHARE = "share"
    SAVE = "save"
    FOLLOW = "follow"
    COMMENT = "comment"
    SKIP = "skip"
    NOT_INTERESTED = "not_interested"
    REPORT = "report"
    BLOCK_CREATOR = "block_creator"
    BLOCK_TOPIC = "block_topic"


class Arm(StrEnum):
    """Arm of a rollout that serves a request. The router assigns it once per request."""

    STABLE = "stable"
    CANARY = "canary"
    HOLDOUT = "holdout"
    SHADOW = "shadow"


LONG_WATCH_RATIO: Final = 0.7
LONG_WATCH_CAP_MS: Final = 30_000.0
"""A long watch is ``watch_ms >= min(LONG_WATCH_RATIO * duration_ms, LONG_WATCH_CAP_MS)``."""

OUTCOME_HORIZON_S: Final = 24 * 3600
"""An outcome later than this after its impression is not counted."""

OUTCOME_WEIGHTS: Final[dict[str, float]] = {
    "long_watch": 1.0,
    "like": 1.0,
    "share": 1.5,
    "save": 1.2,
    "follow": 1.5,
    "comment": 1.0,
    "skip": -0.5,
    "not_interested": -2.0,
    "report": -3.0,
    "block_creator": -2.0,
    "block_topic": -2.0,
}
"""Weight of one outcome as a signal of taste. An impression's weight is the sum, clipped to ``WEIGHT_BOUNDS``."""
WEIGHT_BOUNDS: Final = (-3.0, 5.0)

VIEWERS: Final = pa.schema(
    [
        pa.field("viewer_id", pa.int64(), nullable=False),
        pa.field("created_at", TIMESTAMP_TYPE, nullable=False),
        pa.field("region", pa.string()),
        pa.field("language", pa.string()),
        pa.field("segment", pa.string()),  # age band, occupation or any coarse group of the data source
    ]
)

CREATORS: Final = pa.schema(
    [
        pa.field("creator_id", pa.int64(), nullable=False),
        pa.field("created_at", TIMESTAMP_TYPE, nullable=False),
        pa.field("followers", pa.int64(), nullable=False),  # at created_at; later growth comes from follow outcomes
    ]
)

VIDEOS: Final = pa.schema(
    [
        pa.field("video_id", pa.int64(), nullable=False),
        pa.field("creator_id", pa.int64(), nullable=False),
        pa.field("uploaded_at", TIMESTAMP_TYPE, nullable=False),
        pa.field("duration_ms", pa.int32(), nullable=False),
        pa.field("topic", pa.int32(), nullable=False),
        pa.field("language", pa.string()),
        pa.field("title", pa.string()),
        pa.field("visual", pa.list_(pa.float32())),  # widths: FeatureDimensions; null where missing
        pa.field("audio", pa.list_(pa.float32())),
        pa.field("text", pa.list_(pa.float32())),
    ]
)

IMPRESSIONS: Final = pa.schema(
    [
        pa.field("impression_id", pa.int64(), nullable=False),
        pa.field("request_id", pa.int64(), nullable=False),
        pa.field("viewer_id", pa.int64(), nullable=False),
        pa.field("video_id", pa.int64(), nullable=False),
        pa.field("position", pa.int16(), nullable=False),  # 0 is the top of the slate
        pa.field("event_time", TIMESTAMP_TYPE, nullable=False),
        pa.field("release", STRING_DICTIONARY_TYPE, nullable=False),
        pa.field("arm", STRING_DICTIONARY_TYPE, nullable=False),
        pa.field("source", STRING_DICTIONARY_TYPE, nullable=False),
        pa.field("propensity", pa.float32(), nullable=False),  # probability of this video at this position, in (0, 1]
        pa.field("device", STRING_DICTIONARY_TYPE, nullable=False),
    ]
)

OUTCOMES: Final = pa.schema(
    [
        pa.field("outcome_id", pa.int64(), nullable=False),
        pa.field("impression_id", pa.int64(), nullable=False),
        pa.field("viewer_id", pa.int64(), nullable=False),
        pa.field("video_id", pa.int64(), nullable=False),
        pa.field("type", STRING_DICTIONARY_TYPE, nullable=False),  # an OutcomeType
        pa.field("value", pa.float32(), nullable=False),  # watched milliseconds for watch, else 1
        pa.field("event_time", TIMESTAMP_TYPE, nullable=False),  # never before the impression's event_time
    ]
)

DATASET_TABLES: Final[dict[str, pa.Schema]] = {
    "viewers": VIEWERS,
    "creators": CREATORS,
    "videos": VIDEOS,
    "impressions": IMPRESSIONS,
    "outcomes": OUTCOMES,
}
"""Table name -> schema. Files: ``<data set>/<table>.parquet``, with events sorted by ``event_time``, then id."""
