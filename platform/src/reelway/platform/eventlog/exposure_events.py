"""Exposures as records of the event log: one row per impression, the rows of a slate next to each other.

A slate is identified by its ``request_id``. It may be in the log twice, because a router without an acknowledgement
appends it again; readers recognise it by its id. An empty slate has no rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pyarrow as pa

from reelway.platform.contracts.events import STRING_DICTIONARY_TYPE, TIMESTAMP_TYPE
from reelway.platform.eventlog.arrow_records import decode_rows, encode_by_viewer
from reelway.platform.eventlog.event_log import LogRecord

EXPOSURE_EVENT_SCHEMA: Final = pa.schema(
    [
        pa.field("request_id", pa.int64(), nullable=False),
        pa.field("impression_id", pa.int64(), nullable=False),
        pa.field("viewer_id", pa.int64(), nullable=False),
        pa.field("video_id", pa.int64(), nullable=False),
        pa.field("position", pa.int16(), nullable=False),  # 0 is the top of the slate
        pa.field("shown_at", TIMESTAMP_TYPE, nullable=False),  # by the router's clock
        pa.field("request_time", TIMESTAMP_TYPE, nullable=False),  # the client's context, else the router's clock
        pa.field("release", STRING_DICTIONARY_TYPE, nullable=False),
        pa.field("arm", STRING_DICTIONARY_TYPE, nullable=False),
        pa.field("rollout", STRING_DICTIONARY_TYPE, nullable=False),  # empty outside of a rollout
        pa.field("weight", pa.float32(), nullable=False),  # sequential.overlap_weight of the arms
        pa.field("slices", pa.int8(), nullable=False),  # sum of tokens.SLICE_BITS
        pa.field("source", STRING_DICTIONARY_TYPE, nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        pa.field("propensity", pa.float32(), nullable=False),
        pa.field("creator_id", pa.int64()),
        pa.field("topic", pa.int32()),
        pa.field("duration_ms", pa.int32()),
        pa.field("device", STRING_DICTIONARY_TYPE, nullable=False),
        pa.field("region", STRING_DICTIONARY_TYPE),
        pa.field("language", STRING_DICTIONARY_TYPE),
        pa.field(
            "authenticated", pa.bool_()
        ),  # whether the viewer proved its identity; null in older records: it did not
    ]
)


def encode_exposures(exposures: pa.RecordBatch, partitions: int, max_record_bytes: int) -> Iterator[LogRecord]:
    """Encodes a batch of ``EXPOSURE_EVENT_SCHEMA`` as records. All slates of a viewer share a partition."""
    return encode_by_viewer(exposures, partitions, max_record_bytes)


def decode_exposures(payload: bytes) -> pa.Table:
    """Decodes the exposures of one record into ``EXPOSURE_EVENT_SCHEMA``.

    Raises:
        DataError: if the record is not a batch of exposures.
    """
    return decode_rows(payload, EXPOSURE_EVENT_SCHEMA, "exposures")
