"""Derives a data set's feature dimensions from its videos."""

# Shapes: N videos

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from reelway.platform.contracts.feature_dimensions import FeatureDimensions
from reelway.platform.contracts.feature_names import CONTENT_VECTORS
from reelway.platform.errors import ConfigError

MAX_INFERRED_TOPICS: Final = 1024
"""A topic at or above this limit is treated as an invalid value: the data checks reject its video."""


@dataclass(frozen=True)
class DimensionSettings:
    """Dimensions given as import options. None keeps the default; for ``topics`` it derives the number."""

    topics: int | None = None
    history_length: int | None = None
    category_buckets: int | None = None
    id_buckets: int | None = None

    def given(self) -> dict[str, int]:
        """The fields that are set."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}


def infer_dimensions(
    tables: Mapping[str, pa.Table], settings: DimensionSettings = DimensionSettings()
) -> FeatureDimensions:
    """Returns the dimensions that fit the table ``videos``.

    The width of a content vector is its most frequent length, 0 if all values are null. Data checks set aside the
    videos with another length. The number of topics is the largest topic plus one.

    Raises:
        ConfigError: if a setting is out of range.
    """
    videos = tables["videos"]
    widths = {name: _usual_length(videos[name]) if name in videos.column_names else 0 for name in CONTENT_VECTORS}
    topic = videos["topic"].to_numpy()
    topic = topic[topic < MAX_INFERRED_TOPICS]
    derived: dict[str, Any] = {**widths, "topics": max(1, int(topic.max(initial=-1)) + 1)}
    try:
        return FeatureDimensions(**{**derived, **settings.given()})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in problem["loc"])
        raise ConfigError(f"data set schema: {field} is {problem['input']!r}; {problem['msg'].lower()}") from error


def _usual_length(column: pa.ChunkedArray) -> int:
    if not pa.types.is_list(column.type):  # a column of nulls
        return 0
    lengths = pc.list_value_length(column).drop_null().to_numpy()
    lengths = lengths[lengths > 0]  # an empty list is an invalid vector, not a data set without vectors
    return int(np.bincount(lengths).argmax()) if len(lengths) else 0
