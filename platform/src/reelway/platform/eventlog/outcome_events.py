"""Outcomes as records of the event log: Arrow batches that include what each outcome's token contains.

One record is one batch in Arrow's stream format and can be decoded alone. Writers and readers may have different
versions of the schema if the versions differ in nullable columns and outcome types only. A reader ignores columns that
it does not know, and sets nullable columns that are absent to null. Any other change needs a new topic.

An outcome's id is derived from its
impression and type, so it does not change when the outcome is sent again. Features use ``event_time``, when the service
received the outcome; ``done_at`` is the client's own time.
"""

# Shapes: N outcomes

from __future__ import annotations

from collections.abc import Iterator
from typing import Final
from uuid import uuid4

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.platform.contracts.events import STRING_DICTIONARY_TYPE, TIMESTAMP_TYPE, OutcomeType
from reelway.platform.contracts.ids import MAX_ID
from reelway.platform.errors import DataError
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
    ]
)


def derive_outcome_ids(impression_id: NDArray[np.int64], kind: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the ids derived from impression and type (index into ``OUTCOME_TYPES``). Shapes: ``[N], [N] -> [N]``."""
    mixed = mix64(impression_id.astype(np.uint64) * np.uint64(len(OUTCOME_TYPES) + 7) + kind.astype(np.uint64))
    return np.asarray(mixed & np.uint64(MAX_ID)).astype(np.int64)


def encode_outcomes(
    outcomes: pa.RecordBatch, partitions: int, time_us: int, max_record_bytes: int
) -> Iterator[LogRecord]:
    """Encodes a batch of ``OUTCOME_EVENT_SCHEMA`` as records. All outcomes of a viewer share a partition.

    A record of more than ``max_record_bytes`` is split. Its parts follow each other in their order.
    """
    for partition, selected in _by_partition(outcomes, partitions):
        for payload in _encoded_parts(selected, max_record_bytes):
            yield LogRecord(uuid4().hex, partition, time_us, payload)


def decode_outcomes(payload: bytes) -> pa.Table:
    """Decodes the outcomes of one record into ``OUTCOME_EVENT_SCHEMA``. Outcome types may be unknown.

    Raises:
        DataError: if the record is not a batch of outcomes.
    """
    try:
        table = pa.ipc.open_stream(payload).read_all().unify_dictionaries()
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"event log: a record of {len(payload)} bytes is no batch of outcomes: {error}") from error
    return pa.Table.from_arrays(
        [_read_column(table, field) for field in OUTCOME_EVENT_SCHEMA], schema=OUTCOME_EVENT_SCHEMA
    )


def _read_column(table: pa.Table, field: pa.Field) -> pa.ChunkedArray:
    indices = table.schema.get_all_field_indices(field.name)
    if not indices and field.nullable:
        return pa.chunked_array([pa.nulls(table.num_rows, field.type)])
    if len(indices) != 1 or table.schema.field(indices[0]).type != field.type:
        raise DataError(f"event log: a record has schema\n{table.schema}\nexpected\n{OUTCOME_EVENT_SCHEMA}")
    column = table.column(indices[0])
    if column.null_count and not field.nullable:
        raise DataError(f"event log: a record has {column.null_count} nulls in column {field.name!r}, expected none")
    return column


def _by_partition(outcomes: pa.RecordBatch, partitions: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    if partitions == 1:
        yield 0, outcomes
        return
    viewer = outcomes.column("viewer_id").to_numpy().astype(np.uint64)
    partition_N = (mix64(viewer) % np.uint64(partitions)).astype(np.int64)
    for partition in np.unique(partition_N).tolist():
        yield partition, outcomes.take(pa.array(np.flatnonzero(partition_N == partition)))


def _encoded_parts(outcomes: pa.RecordBatch, max_record_bytes: int) -> Iterator[bytes]:
    """One payload, or several of as many rows each if it is too large. A single row is not split."""
    payload = _encoded(outcomes)
    rows = outcomes.num_rows
    if len(payload) <= max_record_bytes or rows <= 1:
        yield payload
        return
    parts = min(-(-len(payload) // max_record_bytes), rows)
    rows_per_part = -(-rows // parts)
    for start in range(0, rows, rows_per_part):
        yield from _encoded_parts(outcomes.slice(start, rows_per_part), max_record_bytes)


def _encoded(outcomes: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_stream(sink, OUTCOME_EVENT_SCHEMA, options=options) as writer:
        writer.write_batch(outcomes)
    encoded: bytes = sink.getvalue().to_pybytes()
    return encoded
