"""Reads and writes a data set: one Parquet file per table of the event schema, ``dataset.json`` and ``schema.json``.

A data set is written atomically. A file that is missing, unreadable or of another schema is an error with the actual
and the expected state. ``datasets.checks`` validates the rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from reelway.platform.atomic_files import atomic_directory
from reelway.platform.contracts.events import DATASET_TABLES
from reelway.platform.contracts.feature_dimensions import FeatureDimensions
from reelway.platform.errors import MalformedFileError
from reelway.platform.features.dimensions import read_dimensions, write_dimensions

INFO_FILE: Final = "dataset.json"
_KEYS: Final = {
    "viewers": ("viewer_id",),
    "creators": ("creator_id",),
    "videos": ("video_id",),
    "impressions": ("event_time", "impression_id"),
    "outcomes": ("event_time", "outcome_id"),
}


@dataclass(frozen=True)
class Dataset:
    """The five tables of ``contracts.events.DATASET_TABLES``, their origin and their feature dimensions."""

    viewers: pa.Table
    creators: pa.Table
    videos: pa.Table
    impressions: pa.Table
    outcomes: pa.Table
    info: Mapping[str, Any]
    dimensions: FeatureDimensions

    @property
    def tables(self) -> dict[str, pa.Table]:
        return {name: getattr(self, name) for name in DATASET_TABLES}


def write_dataset(
    path: Path,
    tables: Mapping[str, pa.Table],
    info: Mapping[str, Any],
    dimensions: FeatureDimensions,
    *,
    extras: Mapping[str, pa.Table] | None = None,
) -> None:
    """Writes the five tables (events sorted by time, then id; entities by id), ``dataset.json`` and ``schema.json``.

    Args:
        tables: name -> table, with exactly the names of ``DATASET_TABLES``.
        info: origin of the data (name, source, seed ...); row counts and the first and last time are added.
        extras: further tables of the data set, such as ``rejected`` or ``id_map``.

    Raises:
        MalformedFileError: if a table is missing or not of its schema.
        StorageError: if the disk is full or not writable; ``path`` is unchanged.
    """
    if set(tables) != set(DATASET_TABLES):
        raise MalformedFileError(path, f"the tables {sorted(DATASET_TABLES)}", seen=sorted(tables))
    ready = {
        name: _sorted(name, cast_to_schema(path / f"{name}.parquet", tables[name], name)) for name in DATASET_TABLES
    }
    complete_info = {
        **info,
        "rows": {name: table.num_rows for name, table in ready.items()},
        **_time_span(ready["impressions"]),
    }
    with atomic_directory(path) as aside:
        for name, table in {**ready, **(extras or {})}.items():
            pq.write_table(table, aside / f"{name}.parquet", compression="zstd")
        write_dimensions(aside, dimensions)
        (aside / INFO_FILE).write_text(json.dumps(complete_info, indent=2, sort_keys=True, default=str) + "\n")


def read_dataset(path: Path) -> Dataset:
    """Reads a data set that ``write_dataset`` wrote.

    Raises:
        MalformedFileError: if a file is missing, unreadable or not of its schema.
    """
    tables = {}
    for name in DATASET_TABLES:
        file = path / f"{name}.parquet"
        try:
            table = pq.read_table(file)
        except FileNotFoundError:
            raise MalformedFileError(
                file, "a data set folder; create it with `reelway simulate` or `reelway import`", seen="no such file"
            ) from None
        except (pa.ArrowInvalid, OSError) as error:
            raise MalformedFileError(file, "a readable Parquet file", seen=str(error)) from error
        tables[name] = cast_to_schema(file, table, name)
    try:
        info = json.loads((path / INFO_FILE).read_text())
    except (OSError, ValueError) as error:
        raise MalformedFileError(path / INFO_FILE, "a JSON object", seen=str(error)) from error
    if not isinstance(info, dict):
        raise MalformedFileError(path / INFO_FILE, "a JSON object", seen=info)
    return Dataset(**tables, info=info, dimensions=read_dimensions(path))


def cast_to_schema(path: Path, table: pa.Table, name: str) -> pa.Table:
    """Casts a table to the schema ``DATASET_TABLES[name]`` without loss; absent nullable columns become null.

    Raises:
        MalformedFileError: if a required column is missing or has nulls, or a value does not fit the column's type.
    """
    columns = []
    for field in DATASET_TABLES[name]:
        if field.name not in table.column_names:
            if not field.nullable:
                raise MalformedFileError(
                    path, f"a column of type {field.type}", seen=f"only {table.column_names}", column=field.name
                )
            columns.append(pa.nulls(table.num_rows, field.type))
            continue
        column = table.column(field.name)
        try:
            column = column if column.type == field.type else column.cast(field.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise MalformedFileError(
                path, f"values of type {field.type}", seen=f"{column.type} ({error})", column=field.name
            ) from error
        if column.null_count and not field.nullable:
            row = pc.index(pc.is_null(column), True).as_py()
            raise MalformedFileError(path, f"a value of type {field.type}", seen=None, row=row, column=field.name)
        columns.append(column)
    return pa.table(columns, schema=DATASET_TABLES[name])


def _sorted(name: str, table: pa.Table) -> pa.Table:
    keys = _KEYS[name]
    order = np.lexsort([table.column(key).cast(pa.int64()).to_numpy() for key in reversed(keys)])
    if np.array_equal(order, np.arange(len(order))):
        return table
    return table.take(pa.array(order))


def _time_span(impressions: pa.Table) -> dict[str, str | None]:
    ends = pc.min_max(impressions["event_time"]).as_py()
    return {
        "first_time": ends["min"].isoformat() if ends["min"] else None,
        "last_time": ends["max"].isoformat() if ends["max"] else None,
    }
