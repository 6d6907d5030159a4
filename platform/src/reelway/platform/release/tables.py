"""The Arrow tables of a release: memory-mapped, and checked against their schemas and against each other.

Serving maps these files and indexes them by row without further checks. Every row number and video id by which one
table refers to another is therefore checked here. Tables with several record batches or with compression cannot be
mapped and are rejected.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.platform.contracts.manifest import (
    CONTENT_NEIGHBOURS_FILE,
    CREATORS_FILE,
    NEIGHBOURS_FILE,
    POPULAR_FILE,
    VIDEOS_FILE,
    Dimensions,
)
from reelway.platform.contracts.release_files import (
    CREATORS_SCHEMA,
    NEIGHBOURS_SCHEMA,
    POPULAR_SCHEMA,
    dimensions_of,
    videos_schema,
)
from reelway.platform.errors import IncompatibleReleaseError

_ROWS_PER_PART: Final = 65_536


def open_table(path: Path, schema: pa.Schema) -> pa.RecordBatch:
    """Memory-maps the single record batch of an Arrow IPC file.

    Raises:
        IncompatibleReleaseError: if it is not an Arrow IPC file, has another schema, or not exactly one batch.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        actual_schema, batches = reader.schema, reader.num_record_batches
        batch = reader.get_batch(0) if batches else None
    except (pa.ArrowInvalid, OSError) as error:
        raise IncompatibleReleaseError(f"{path} is not an Arrow IPC file: {error}") from error
    if not actual_schema.equals(schema):
        raise IncompatibleReleaseError(
            f"{path} has another schema: {_first_difference(actual_schema, schema)}; build again"
        )
    if batch is None or batches != 1:
        raise IncompatibleReleaseError(f"{path} has {batches} record batches, expected 1, so that it can be mapped")
    return batch


def check_tables(folder: Path, dimensions: Dimensions) -> None:
    """Checks rows, order and references of all tables.

    Raises:
        IncompatibleReleaseError: if a check fails; the message names the file and the value.
    """
    videos = open_table(folder / VIDEOS_FILE, videos_schema(dimensions.embedding))
    popular = open_table(folder / POPULAR_FILE, POPULAR_SCHEMA)
    rows = videos.num_rows
    if rows != dimensions.videos:
        raise IncompatibleReleaseError(f"{VIDEOS_FILE} has {rows} rows, the manifest says {dimensions.videos}")
    video_id = videos.column("video_id").to_numpy()
    if rows > 1 and not (np.diff(video_id) > 0).all():
        raise IncompatibleReleaseError(f"{VIDEOS_FILE}: video_id does not ascend strictly; lookups would miss videos")
    lengths = _row_lengths(videos.column("embedding").flatten().to_numpy().reshape(rows, -1))
    if not np.allclose(lengths, 1.0, atol=1e-3):
        worst = int(np.argmax(np.nan_to_num(np.abs(lengths - 1.0), nan=np.inf)))
        raise IncompatibleReleaseError(
            f"{VIDEOS_FILE}, row {worst}: embedding has length {lengths[worst]:g}, expected 1"
        )
    _check_codes(videos, dimensions)
    unknown = np.setdiff1d(popular.column("video_id").to_numpy(), video_id)
    if len(unknown):
        raise IncompatibleReleaseError(f"{POPULAR_FILE} lists video {unknown[0]}, which {VIDEOS_FILE} does not have")
    for name in (NEIGHBOURS_FILE, CONTENT_NEIGHBOURS_FILE):
        neighbours = open_table(folder / name, NEIGHBOURS_SCHEMA)
        if not np.array_equal(neighbours.column("video_id").to_numpy(), video_id):
            raise IncompatibleReleaseError(f"{name} does not list the videos of {VIDEOS_FILE} in its order")
        _check_rows(name, neighbours.column("rows"), rows)
    creators = open_table(folder / CREATORS_FILE, CREATORS_SCHEMA)
    creator_id = videos.column("creator_id").to_numpy()
    if not np.array_equal(creators.column("creator_id").to_numpy(), np.unique(creator_id[creator_id >= 0])):
        raise IncompatibleReleaseError(
            f"{CREATORS_FILE} does not list the creators of {VIDEOS_FILE} in ascending order"
        )
    _check_rows(CREATORS_FILE, creators.column("similar"), creators.num_rows)
    _check_rows(CREATORS_FILE, creators.column("best"), rows)


def _row_lengths(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns the Euclidean length of each row, in parts: every process that serves the release checks it."""
    lengths = np.empty(len(matrix), dtype=np.float32)
    for start in range(0, len(matrix), _ROWS_PER_PART):
        lengths[start : start + _ROWS_PER_PART] = np.linalg.norm(matrix[start : start + _ROWS_PER_PART], axis=1)
    return lengths


def _check_rows(name: str, column: pa.FixedSizeListArray, rows: int) -> None:
    indices = column.flatten().to_numpy()
    if len(indices) and (indices.min() < -1 or indices.max() >= rows):
        raise IncompatibleReleaseError(
            f"{name} points to rows {indices.min()}..{indices.max()}, expected -1..{rows - 1}"
        )


def _check_codes(videos: pa.RecordBatch, dimensions: Dimensions) -> None:
    """Checks the recorded feature dimensions, and that every code is within its vocabulary."""
    features = dimensions.features
    try:
        recorded = dimensions_of(videos.schema)
    except ValueError as error:
        raise IncompatibleReleaseError(f"{VIDEOS_FILE}: its feature dimensions are invalid: {error}") from error
    if recorded != features:
        raise IncompatibleReleaseError(
            f"{VIDEOS_FILE} was written with {recorded}, the manifest says {features}; build the release again"
        )
    categories = videos.column("video_categories").flatten().to_numpy().reshape(videos.num_rows, -1)
    for name, values, low, high in (
        ("topic", videos.column("topic").to_numpy(), -1, features.topics - 1),
        ("creator_codes", videos.column("creator_codes").flatten().to_numpy(), 0, features.id_buckets - 1),
        ("video_categories (topic)", categories[:, 0], 0, features.topics),
        ("video_categories (language)", categories[:, 1], 0, features.category_buckets - 1),
    ):
        outside = values[(values < low) | (values > high)]
        if len(outside):
            raise IncompatibleReleaseError(
                f"{VIDEOS_FILE}, column {name}: value {outside[0]} is outside {low}..{high}, the range that the "
                "manifest's dimensions give; build the release again"
            )


def _first_difference(actual_schema: pa.Schema, expected: pa.Schema) -> str:
    for field in expected:
        index = actual_schema.get_field_index(field.name)
        if index < 0:
            return f"column {field.name!r} is missing"
        if not actual_schema.field(index).equals(field):
            actual = actual_schema.field(index)
            return f"column {field.name!r} is {actual.type} (nullable {actual.nullable}), expected {field.type}"
    extra = sorted(set(actual_schema.names) - set(expected.names))
    return f"columns {extra} are unexpected" if extra else "its columns are in another order"
