"""Outcomes as records of the event log: Arrow batches that include what each outcome's token contains.

An outcome's id is derived from its impression and type, so it does not change when the outcome is sent again. Features
use ``event_time``, when the service received the outcome; ``done_at`` is the client's own time. Readers tolerate
outcome types that they do not know; see ``arrow_records`` for versions of the schema.
"""

# Shapes: N outcomes

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.platform.contracts.events import STRING_DICTIONARY_TYPE, TIMESTAMP_TYPE, OutcomeType
from reelway.platform.contracts.ids import MAX_ID
from reelway.platform.eventlog.arrow_records import decode_rows, encode_by_viewer
from reelway.platform.eventlog.event_log import LogRecord
from reelway.platform.features.hashing import mix64

OUTCOME_TYPES: Final = tuple(OutcomeType)
"""Outcome types in the order of their codes, which ids depend on. Append only."""

OUTCOME_EVENT_SCHEMA: Final = pa.schema(
    [
        pa.field("outcome_id", pa.int64(), nullable=False),
        pa.field("impression_id", pa.int64(), nullable=False),
        pa.field("request_id", pa.int64(), nullable=False),
        pa.field("viewer_id", pa.int64(), nullable=False),
        pa.field("video_id", pa.int64(), nullable=False),
        pa.field("position", pa.int16(), nullable=False),
        pa.field("shown_at", TIMESTAMP_TYPE, nullable=False),
        pa.field("release", STRING_DICTIONARY_TYPE, nullable=False),
        pa.field("arm", STRING_DICTIONARY_TYPE, nullable=False),
        pa.field("source", STRING_DICTIONARY_TYPE, nullable=False),
        pa.field("propensity", pa.float32(), nullable=False),
        pa.field("type", STRING_DICTIONARY_TYPE, nullable=False),  # an OutcomeType
        pa.field("value", pa.float32(), nullable=False),  # watched milliseconds for watch, else 1
        pa.field("event_time", TIMESTAMP_TYPE, nullable=False),  # when the service received it
        pa.field("done_at", TIMESTAMP_TYPE),  # the client's time, if it gave one
        pa.field("creator_id", pa.int64()),  # of the video; this and the following are null in records of older writers
        pa.field("topic", pa.int32()),
        pa.field("duration_ms", pa.int32()),
        pa.field("rollout", STRING_DICTIONARY_TYPE),  # empty outside of a rollout
        pa.field("weight", pa.float32()),  # sequential.overlap_weight of the arms when the video was shown
        pa.field("slices", pa.int8()),  # sum of tokens.SLICE_BITS
        pa.field(
            "authenticated", pa.bool_()
        ),  # whether the viewer proved its identity; null in older records: it did not
    ]
)


def derive_outcome_ids(impression_id: NDArray[np.int64], kind: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the ids derived from impression and type (index into ``OUTCOME_TYPES``). Shapes: ``[N], [N] -> [N]``."""
    mixed = mix64(impression_id.astype(np.uint64) * np.uint64(len(OUTCOME_TYPES) + 7) + kind.astype(np.uint64))
    return np.asarray(mixed & np.uint64(MAX_ID)).astype(np.int64)


def encode_outcomes(outcomes: pa.RecordBatch, partitions: int, max_record_bytes: int) -> Iterator[LogRecord]:
    """Encodes a batch of ``OUTCOME_EVENT_SCHEMA`` as records. All outcomes of a viewer share a partition."""
    return encode_by_viewer(outcomes, partitions, max_record_bytes)


def decode_outcomes(payload: bytes) -> pa.Table:
    """Decodes the outcomes of one record into ``OUTCOME_EVENT_SCHEMA``. Outcome types may be unknown.

    Raises:
        DataError: if the record is not a batch of outcomes.
    """
    return decode_rows(payload, OUTCOME_EVENT_SCHEMA, "outcomes")
