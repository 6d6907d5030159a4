"""Encodes rows of events as records: one Arrow batch per record, in Arrow's stream format, that can be decoded alone.

Writers and readers may have different versions of a schema if the versions differ in nullable columns only. A reader
ignores columns that it does not know, and sets nullable columns that are absent to null. Any other change needs a new
topic.
"""

# Shapes: N rows

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.platform.errors import DataError
from reelway.platform.eventlog.event_log import LogRecord
from reelway.platform.features.hashing import mix64


def viewer_partitions(viewer_ids: NDArray[np.integer[Any]], partitions: int) -> NDArray[np.int64]:
    """Returns the partition of each viewer, in every topic with so many partitions. Shapes: ``[N] -> [N]``."""
    return (mix64(viewer_ids.astype(np.uint64)) % np.uint64(partitions)).astype(np.int64)


def encode_by_viewer(rows: pa.RecordBatch, partitions: int, max_record_bytes: int) -> Iterator[LogRecord]:
    """Encodes a batch with a column ``viewer_id``. All rows of a viewer share a partition.

    A record of more than ``max_record_bytes`` is split. Its parts follow each other in their order.
    """
    for partition, selected in _by_partition(rows, partitions):
        for payload in _encoded_parts(selected, max_record_bytes):
            yield LogRecord(uuid4().hex, partition, payload)


def encode_rows(rows: pa.RecordBatch) -> bytes:
    """Returns one record's payload."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_stream(sink, rows.schema, options=options) as writer:
        writer.write_batch(rows)
    encoded: bytes = sink.getvalue().to_pybytes()
    return encoded


def decode_rows(payload: bytes, schema: pa.Schema, events: str) -> pa.Table:
    """Decodes one record's payload into ``schema``.

    Args:
        events: what the rows are, for error messages: ``"outcomes"``.

    Raises:
        DataError: if the record is not a batch with these columns.
    """
    try:
        table = pa.ipc.open_stream(payload).read_all().unify_dictionaries()
        table.validate(full=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: a damaged column name
        raise DataError(f"event log: a record of {len(payload)} bytes is no batch of {events}: {error}") from error
    return pa.Table.from_arrays([_read_column(table, field, schema) for field in schema], schema=schema)


def _read_column(table: pa.Table, field: pa.Field, schema: pa.Schema) -> pa.ChunkedArray:
    indices = table.schema.get_all_field_indices(field.name)
    if not indices and field.nullable:
        return pa.chunked_array([pa.nulls(table.num_rows, field.type)])
    if len(indices) != 1 or table.schema.field(indices[0]).type != field.type:
        raise DataError(f"event log: a record has schema\n{table.schema}\nexpected\n{schema}")
    column = table.column(indices[0])
    if column.null_count and not field.nullable:
        raise DataError(f"event log: a record has {column.null_count} nulls in column {field.name!r}, expected none")
    return column


def _by_partition(rows: pa.RecordBatch, partitions: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    if partitions == 1:
        yield 0, rows
        return
    partition_N = viewer_partitions(rows.column("viewer_id").to_numpy(), partitions)
    for partition in np.unique(partition_N).tolist():
        yield partition, rows.take(pa.array(np.flatnonzero(partition_N == partition)))


def _encoded_parts(rows: pa.RecordBatch, max_record_bytes: int) -> Iterator[bytes]:
    """One payload, or several of as many rows each if it is too large. A single row is not split."""
    payload = encode_rows(rows)
    count = rows.num_rows
    if len(payload) <= max_record_bytes or count <= 1:
        yield payload
        return
    parts = min(-(-len(payload) // max_record_bytes), count)
    rows_per_part = -(-count // parts)
    for start in range(0, count, rows_per_part):
        yield from _encoded_parts(rows.slice(start, rows_per_part), max_record_bytes)
