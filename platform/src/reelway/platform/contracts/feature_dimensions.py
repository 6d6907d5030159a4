"""Widths, vocabulary sizes and lengths of a data set's features: recorded with the data set, read everywhere else."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from reelway.platform.contracts.feature_names import (
    CONTENT_VECTORS,
    VIDEO_TOWER_INPUTS,
    VIEWER_ACTIVITY,
    VIEWER_CONTEXT,
)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class FeatureDimensions:
    """Widths, vocabulary sizes and lengths of one data set's features.

    The data set's ``schema.json`` holds them. Every later step copies them: the feature views, the trained models, the
    manifest and the video table of the release. ``verify`` compares the copies with the files.
    """

    visual: Annotated[int, Field(strict=True, ge=0)]
    """Values in a video's visual vector; 0 if the data set has no visual vectors."""
    audio: Annotated[int, Field(strict=True, ge=0)]
    text: Annotated[int, Field(strict=True, ge=0)]
    topics: Annotated[int, Field(strict=True, ge=1, le=4096)]
    """Topics are 0..topics-1; -1 is an unknown topic."""
    history_length: Annotated[int, Field(strict=True, ge=1, le=1000)] = 50
    """Latest impressions of a viewer that the history view keeps."""
    category_buckets: Annotated[int, Field(strict=True, ge=2)] = 64
    """Words (region, language, segment, device) are hashed to 1..category_buckets-1; 0 is missing."""
    id_buckets: Annotated[int, Field(strict=True, ge=2, le=2**31)] = 1 << 15
    """Ids are hashed ``ID_HASHES`` times to 1..id_buckets-1; 0 is padding."""

    @property
    def viewer_dense(self) -> tuple[str, ...]:
        """Names of the columns of ``viewer_dense``."""
        return (*VIEWER_ACTIVITY, *(f"topic_affinity_{i}" for i in range(self.topics)), *VIEWER_CONTEXT)

    @property
    def content(self) -> dict[str, int]:
        """Content vector -> width, in the order of ``VIDEO_TOWER_INPUTS``."""
        return {name: getattr(self, name) for name in CONTENT_VECTORS}

    def list_width(self, field: str) -> int:
        """Returns the number of values in a list feature, 0 for a field that is no list of a fixed width."""
        return {**self.content, "topic_affinity": self.topics}.get(field, 0)

    def to_json(self) -> str:
        """Returns JSON that ``from_json`` reads."""
        return _DIMENSIONS.dump_json(self, indent=2).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> FeatureDimensions:
        """Parses ``to_json``.

        Raises:
            ValidationError: if a field is missing, unknown, or out of range.
        """
        return _DIMENSIONS.validate_json(text)


def video_tower_inputs(dimensions: FeatureDimensions) -> tuple[str, ...]:
    """Returns the inputs of ``video_tower.onnx``: ``VIDEO_TOWER_INPUTS`` without content that the data set lacks."""
    return tuple(name for name in VIDEO_TOWER_INPUTS if dimensions.content.get(name, 1))


_DIMENSIONS: Final = TypeAdapter(FeatureDimensions)
SCHEMA_FILE: Final = "schema.json"
"""``FeatureDimensions`` as JSON: in the data set's folder, and copied to the folder of its features."""
