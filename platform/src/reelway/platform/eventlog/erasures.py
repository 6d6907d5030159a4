"""Erasure records: the event log states that everything before them about some viewers does not count any more.

An erasure is a batch without rows whose schema names the viewers in its metadata. It is appended to the exposures and
to the outcomes, in the partition of its viewers, so every reader meets it after the events that it covers. A reader
that does not know erasures reads a batch without rows. What a viewer does after the erasure counts again.
"""

# Shapes: N rows, E erased viewers

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Final
from uuid import uuid4

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.platform.contracts.ids import MAX_ID
from reelway.platform.errors import DataError
from reelway.platform.eventlog.arrow_records import encode_rows, viewer_partitions
from reelway.platform.eventlog.event_log import LogRecord
from reelway.platform.eventlog.exposure_events import EXPOSURE_EVENT_SCHEMA
from reelway.platform.eventlog.outcome_events import OUTCOME_EVENT_SCHEMA
from reelway.platform.eventlog.topics import Topic
from reelway.platform.features.hashing import mix64

I64 = NDArray[np.int64]
VIEWER_TOPICS: Final = {Topic.EXPOSURES: EXPOSURE_EVENT_SCHEMA, Topic.OUTCOMES: OUTCOME_EVENT_SCHEMA}
"""The topics whose events are about viewers, with their schemas."""
_KEY: Final = b"reelway.erased_viewers"
_LARGEST_ANONYMOUS: Final = -2  # -1 often stands for a missing value
NO_VIEWERS: Final[I64] = np.empty(0, np.int64)


def encode_erasures(viewer_ids: Sequence[int], topic: Topic, partitions: int) -> Iterator[LogRecord]:
    """Yields one record per partition of the viewers."""
    ids = np.array(sorted(set(viewer_ids)), np.int64)
    partition_E = viewer_partitions(ids, partitions)
    for partition in np.unique(partition_E).tolist():
        metadata = {_KEY: json.dumps(ids[partition_E == partition].tolist()).encode()}
        schema = VIEWER_TOPICS[topic].with_metadata(metadata)
        batch = pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)
        yield LogRecord(uuid4().hex, partition, encode_rows(batch))


def erased_viewers(payload: bytes) -> I64:
    """Returns the viewers ``[E]`` that a record erases; none for a record of events or one that cannot be read."""
    if _KEY not in payload:  # nearly all records
        return NO_VIEWERS
    try:
        metadata = pa.ipc.open_stream(payload).schema.metadata or {}
        return np.array(json.loads(metadata.get(_KEY, b"[]")), np.int64)
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError):
        return NO_VIEWERS


def rows_kept(viewer_id_N: I64, erased: I64) -> NDArray[np.bool_]:
    """Returns which rows are not those of erased viewers. Shapes: ``[N], [E] -> [N]``."""
    return ~np.isin(viewer_id_N, erased)


def anonymous_ids(impression_id_N: I64) -> I64:
    """Returns the ids that replace a viewer: negative, and different for every impression. Shapes: ``[N] -> [N]``.

    No viewer has a negative id. Nothing connects two impressions of an erased viewer.
    """
    mixed = mix64(impression_id_N.astype(np.uint64)) & np.uint64(MAX_ID)
    return np.asarray(_LARGEST_ANONYMOUS - mixed.astype(np.int64))


def anonymised_ids(viewer_id_N: I64, impression_id_N: I64, erased: I64) -> I64:
    """Returns the viewer of each row, with anonymous ids for erased viewers. Shapes: ``[N], [N], [E] -> [N]``."""
    return np.where(np.isin(viewer_id_N, erased), anonymous_ids(impression_id_N), viewer_id_N)


def anonymised(rows: pa.Table, erased: I64) -> pa.Table:
    """Returns events in which erased viewers have anonymous ids; their requests get the impressions' ids.

    The counts of videos, which are sums over viewers, stay what they were: parity recomputes them from such rows.
    """
    viewer_id_N = rows["viewer_id"].to_numpy()
    impression_id_N = rows["impression_id"].to_numpy()
    columns = {"viewer_id": anonymised_ids(viewer_id_N, impression_id_N, erased)}
    if "request_id" in rows.column_names:
        gone_N = np.isin(viewer_id_N, erased)
        columns["request_id"] = np.where(gone_N, impression_id_N, rows["request_id"].to_numpy())
    for name, values in columns.items():
        index = rows.schema.get_field_index(name)
        rows = rows.set_column(index, rows.schema.field(index), pa.array(values))
    return rows


def of_known_viewers(rows: pa.Table) -> pa.Table:
    """Returns the rows whose viewers are not anonymous."""
    known_N = rows["viewer_id"].to_numpy() > _LARGEST_ANONYMOUS
    return rows if known_N.all() else rows.filter(pa.array(known_N))


def viewer_rows(payload: bytes, viewer_ids: I64) -> dict[int, int]:
    """Returns how many rows of each of the viewers a record has; no entry for a viewer without rows.

    Raises:
        DataError: if the record is no batch with a column ``viewer_id``.
    """
    viewer_id_N = _viewer_column(_read_batch(payload), payload)
    found, counts = np.unique(viewer_id_N[~rows_kept(viewer_id_N, viewer_ids)], return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def anonymised_record(payload: bytes, viewer_ids: I64) -> bytes:
    """Returns a record in which the viewers have anonymous ids: the same object if it has none of them.

    Columns of newer versions of the schema stay.

    Raises:
        DataError: if the record is no batch with the columns ``viewer_id`` and ``impression_id``.
    """
    table = _read_batch(payload)
    if rows_kept(_viewer_column(table, payload), viewer_ids).all():
        return payload
    try:
        rows = anonymised(table.unify_dictionaries().combine_chunks(), viewer_ids)
    except (pa.ArrowException, KeyError) as error:
        raise _no_batch(payload, error) from error
    return encode_rows(rows.to_batches()[0])


def _read_batch(payload: bytes) -> pa.Table:
    try:
        return pa.ipc.open_stream(payload).read_all()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _no_batch(payload, error) from error


def _viewer_column(table: pa.Table, payload: bytes) -> I64:
    try:
        return np.asarray(table["viewer_id"].cast(pa.int64()).to_numpy(), np.int64)
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise _no_batch(payload, error) from error


def _no_batch(payload: bytes, error: Exception) -> DataError:
    return DataError(f"event log: a record of {len(payload)} bytes is no batch of events: {error}")
