"""Rows as records of the compacted topics ``rows-viewer`` and ``rows-video``: one JSON object per row.

The key names view and entity, so compaction keeps the newest row of each. Progress records state up to which time a
partition's rows of a view are complete.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from reelway.pipelines.features.labels import times_us
from reelway.pipelines.features.stream.entity_views import EmittedRows
from reelway.pipelines.features.stream.time_buckets import ENTITY_KEYS
from reelway.platform.contracts.events import TIMESTAMP_TYPE
from reelway.platform.errors import DataError

_TIMES = ("event_timestamp", "created_timestamp")


@dataclass(frozen=True)
class Row:
    """A row of a view."""

    view: str
    entity: int
    at_us: int
    fields: dict[str, Any]


@dataclass(frozen=True)
class ErasedRow:
    """The row of an entity was deleted: a tombstone."""

    view: str
    entity: int


@dataclass(frozen=True)
class Progress:
    """All rows of a view's partition up to ``as_of_us`` are in the topic."""

    view: str
    partition: int
    as_of_us: int


def row_key(view: str, entity: int) -> bytes:
    return f"{view}:{entity}".encode()


def encode_rows(emitted: Sequence[EmittedRows]) -> Iterator[tuple[bytes, bytes]]:
    """Yields key and value of each row."""
    for chunk in emitted:
        at_us = times_us(chunk.rows["event_timestamp"]).tolist()
        entities = chunk.rows[ENTITY_KEYS[chunk.view]].to_pylist()
        fields = chunk.rows.drop_columns([*_TIMES, ENTITY_KEYS[chunk.view]]).to_pylist()
        for entity, at, values in zip(entities, at_us, fields, strict=True):
            yield row_key(chunk.view, entity), json.dumps({"at_us": at, "fields": values}).encode()


def encode_progress(progress: Progress) -> tuple[bytes, bytes]:
    """Returns key and value of a progress record."""
    key = f"progress:{progress.view}:{progress.partition}".encode()
    return key, json.dumps({"as_of_us": progress.as_of_us}).encode()


def decode(key: bytes, value: bytes) -> Row | ErasedRow | Progress:
    """Returns what one record of either topic holds.

    Raises:
        DataError: if it is neither a row, progress nor the tombstone of a row.
    """
    try:
        names = key.decode().split(":")
        if not value and names[0] in ENTITY_KEYS:
            return ErasedRow(names[0], int(names[1]))
        content = json.loads(value)
        if names[0] == "progress":
            return Progress(names[1], int(names[2]), content["as_of_us"])
        return Row(names[0], int(names[1]), content["at_us"], content["fields"])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        view = key.partition(b":")[0]
        raise DataError(f"record with a key of {view!r} is no row of the stream: {type(error).__name__}") from error


def check_fields(row: Row, schemas: Mapping[str, pa.Schema]) -> None:
    """Checks that a row has a value for each column of its view.

    Raises:
        DataError: if it does not, because another version wrote it.
    """
    if row.view not in schemas:
        raise DataError(f"row of view {row.view!r}: this version has no such view")
    known = {*row.fields, *_TIMES, ENTITY_KEYS[row.view]}
    if missing := [name for name in schemas[row.view].names if name not in known]:
        raise DataError(f"row of view {row.view!r} lacks {', '.join(missing)}; another version wrote it")


def to_table(view: str, rows: Sequence[Row], schema: pa.Schema) -> pa.Table:
    """Returns rows of one view as a table.

    Args:
        schema: of the view's rows, as ``view_values_at`` returns them.
    """
    when = pa.array(np.array([row.at_us for row in rows], np.int64)).cast(TIMESTAMP_TYPE)
    known: dict[str, Any] = {ENTITY_KEYS[view]: [row.entity for row in rows], **dict.fromkeys(_TIMES, when)}
    columns = [
        pa.array(known[field.name] if field.name in known else [row.fields[field.name] for row in rows], field.type)
        if not isinstance(known.get(field.name), pa.Array)
        else known[field.name].cast(field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)
