"""Outcomes as event log records: round trips, partitions and ids."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from reelway.platform.errors import DataError
from reelway.platform.eventlog.outcome_events import (
    OUTCOME_EVENT_SCHEMA,
    OUTCOME_TYPES,
    decode_outcomes,
    derive_outcome_ids,
    encode_outcomes,
)

N = 200


def batch() -> pa.RecordBatch:
    rng = np.random.default_rng(0)
    kind = rng.integers(0, len(OUTCOME_TYPES), N)
    impression = rng.integers(0, 2**53, N)
    columns = {
        "outcome_id": derive_outcome_ids(impression, kind), "impression_id": impression, "request_id": impression,
        "viewer_id": rng.integers(0, 30, N), "video_id": rng.integers(0, 30, N), "position": rng.integers(0, 9, N),
        "shown_at": rng.integers(0, 2**40, N), "release": ["r"] * N, "arm": ["stable"] * N, "source": ["ann"] * N,
        "propensity": rng.random(N), "type": [str(OUTCOME_TYPES[k]) for k in kind], "value": np.ones(N),
        "event_time": rng.integers(0, 2**40, N), "done_at": [None] * N,
        "creator_id": [7] * N, "topic": [3] * N, "duration_ms": [20_000] * N,
        "rollout": ["r-1"] * N, "weight": [0.5] * N, "slices": [3] * N, "authenticated": rng.random(N) < 0.5,
    }  # fmt: skip
    arrays = [
        pa.array(columns[field.name]).cast(pa.int64()).cast(field.type)
        if pa.types.is_timestamp(field.type)
        else pa.array(columns[field.name]).cast(field.type)
        for field in OUTCOME_EVENT_SCHEMA
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=OUTCOME_EVENT_SCHEMA)


@pytest.mark.parametrize("partitions", [1, 4])
def test_outcomes_round_trip_with_one_partition_per_viewer(partitions: int) -> None:
    records = list(encode_outcomes(batch(), partitions, 1 << 20))
    tables = {record.partition: decode_outcomes(record.payload) for record in records}
    assert len(tables) == len(records) == partitions
    all_outcomes = pa.concat_tables(table.unify_dictionaries() for table in tables.values())
    expected = pa.Table.from_batches([batch()]).sort_by("outcome_id")
    assert all_outcomes.sort_by("outcome_id").to_pylist() == expected.to_pylist()
    viewers = [set(table["viewer_id"].to_pylist()) for table in tables.values()]
    assert sum(map(len, viewers)) == len(set().union(*viewers))


def test_outcome_id_depends_on_impression_and_type_only() -> None:
    impression = np.repeat(np.arange(1000), len(OUTCOME_TYPES))
    kind = np.tile(np.arange(len(OUTCOME_TYPES)), 1000)
    ids = derive_outcome_ids(impression, kind)
    assert len(np.unique(ids)) == len(ids)
    assert (ids >= 0).all()
    assert (ids == derive_outcome_ids(impression, kind)).all()


@pytest.mark.parametrize("max_record_bytes", [1_000, 5_000, 20_000])
def test_outcomes_are_split_below_the_record_limit(max_record_bytes: int) -> None:
    records = list(encode_outcomes(batch(), 1, max_record_bytes))
    assert len(records) > 1 or max_record_bytes == 20_000
    tables = [decode_outcomes(record.payload) for record in records]
    for table, record in zip(tables, records, strict=True):
        assert len(record.payload) <= max_record_bytes or table.num_rows == 1
    assert pa.concat_tables(tables).to_pylist() == batch().to_pylist()


def encode(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def test_reader_ignores_columns_of_a_newer_version() -> None:
    table = pa.Table.from_batches([batch()])
    newer = table.add_column(3, pa.field("device", pa.string()), [pa.array(["phone"] * N)])
    newer = newer.select(newer.column_names[::-1])
    assert decode_outcomes(encode(newer)).equals(table)


def test_nullable_column_that_a_record_lacks_is_null() -> None:
    table = pa.Table.from_batches([batch()])
    assert decode_outcomes(encode(table.drop_columns("done_at"))).equals(table)


@pytest.mark.parametrize("column", ["viewer_id", "value"])
def test_decoding_rejects_a_record_without_a_required_column(column: str) -> None:
    table = pa.Table.from_batches([batch()])
    without = table.drop_columns(column)
    with pytest.raises(DataError, match="has schema"):
        decode_outcomes(encode(without))
    nulls = without.append_column(column, pa.nulls(N, table.schema.field(column).type))
    with pytest.raises(DataError, match=f"200 nulls in column '{column}'"):
        decode_outcomes(encode(nulls))


def test_decoding_rejects_every_truncated_or_damaged_record() -> None:
    """A damaged record raises ``DataError`` or decodes to rows of the schema; it never raises anything else."""
    payload = encode(pa.Table.from_batches([batch().slice(0, 3)]))
    rng = np.random.default_rng(1)
    rejected = 0
    for _ in range(2_000):
        damaged = bytearray(payload[: int(rng.integers(1, len(payload) + 1))])
        damaged[int(rng.integers(len(damaged)))] = int(rng.integers(256))
        try:
            assert decode_outcomes(bytes(damaged)).schema == OUTCOME_EVENT_SCHEMA
        except DataError:
            rejected += 1
    assert rejected > 500


def test_decoding_rejects_a_record_of_another_schema() -> None:
    with pytest.raises(DataError, match="no batch of outcomes"):
        decode_outcomes(b"not arrow")
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pa.schema([("a", pa.int64())])):
        pass
    with pytest.raises(DataError, match="has schema"):
        decode_outcomes(sink.getvalue().to_pybytes())
