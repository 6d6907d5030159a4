"""Schemas of a release's Arrow files.

Each file is an Arrow IPC file with one uncompressed record batch, so that the replicas of a node can map it into memory
and share the pages.

``index.faiss`` is an inner-product index whose ids are row numbers of ``videos.arrow``. It may compress the vectors.
Retrieval therefore takes ``INDEX_OVERFETCH`` times the wanted number of videos from it and scores them again with the
vectors of ``videos.arrow``.
"""

from __future__ import annotations

from typing import Final

import pyarrow as pa

from reelway.platform.contracts.feature_dimensions import FeatureDimensions
from reelway.platform.contracts.feature_names import ID_HASHES, VIDEO_CATEGORIES, VIDEO_LIVE_DENSE, VIDEO_STATIC_DENSE

NEIGHBOURS_PER_VIDEO: Final = 20
SIMILAR_CREATORS: Final = 10
VIDEOS_PER_CREATOR: Final = 10
INDEX_OVERFETCH: Final = 3
OVERLAY_CAPACITY: Final = 50_000
"""Rows that the overlay may add to the video table of a release: uploads and updates since it was built."""


_DIMENSIONS_KEY: Final = b"reelway.dimensions"


def with_dimensions(schema: pa.Schema, dimensions: FeatureDimensions) -> pa.Schema:
    """Returns the schema with ``dimensions`` in its metadata: serving assembles a viewer's inputs by them."""
    return schema.with_metadata({_DIMENSIONS_KEY: dimensions.to_json()})


def dimensions_of(schema: pa.Schema) -> FeatureDimensions | None:
    """Returns the dimensions that ``with_dimensions`` stored; None if the schema has none.

    Raises:
        ValidationError: if the metadata is not ``FeatureDimensions``.
    """
    stored = (schema.metadata or {}).get(_DIMENSIONS_KEY)
    return None if stored is None else FeatureDimensions.from_json(stored)


def videos_schema(embedding_dim: int) -> pa.Schema:
    """Columns of ``videos.arrow``: one row per servable video, ascending ``video_id``.

    Fixed-width columns map to matrices. The file's schema also carries the dimensions (``with_dimensions``).
    """
    return pa.schema(
        [
            pa.field("video_id", pa.int64(), nullable=False),
            pa.field("creator_id", pa.int64(), nullable=False),
            pa.field("topic", pa.int32(), nullable=False),
            pa.field("uploaded_at_s", pa.float64(), nullable=False),
            pa.field("title", pa.string()),
            pa.field("creator_codes", pa.list_(pa.int64(), ID_HASHES), nullable=False),
            pa.field("video_categories", pa.list_(pa.int64(), len(VIDEO_CATEGORIES)), nullable=False),
            pa.field("static_dense", pa.list_(pa.float32(), len(VIDEO_STATIC_DENSE)), nullable=False),
            pa.field("live_dense", pa.list_(pa.float32(), len(VIDEO_LIVE_DENSE)), nullable=False),
            pa.field("embedding", pa.list_(pa.float32(), embedding_dim), nullable=False),  # unit length
        ]
    )


POPULAR_SCHEMA: Final = pa.schema(
    [
        pa.field("list", pa.string(), nullable=False),  # "popular", "trending", or "trending:<region>"
        pa.field("rank", pa.int32(), nullable=False),  # 0 is the most popular
        pa.field("video_id", pa.int64(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
    ]
)

NEIGHBOURS_SCHEMA: Final = pa.schema(
    [
        pa.field("video_id", pa.int64(), nullable=False),  # in the order of videos.arrow
        pa.field(
            "rows", pa.list_(pa.int32(), NEIGHBOURS_PER_VIDEO), nullable=False
        ),  # rows of videos.arrow, -1 for none
    ]
)
"""Schema of ``neighbours.arrow`` (item to item) and ``content_neighbours.arrow`` (content vectors)."""

CREATORS_SCHEMA: Final = pa.schema(
    [
        pa.field("creator_id", pa.int64(), nullable=False),  # ascending; every creator of videos.arrow
        pa.field("similar", pa.list_(pa.int32(), SIMILAR_CREATORS), nullable=False),  # rows of this file, -1 for none
        pa.field("best", pa.list_(pa.int32(), VIDEOS_PER_CREATOR), nullable=False),  # rows of videos.arrow, -1 for none
    ]
)
