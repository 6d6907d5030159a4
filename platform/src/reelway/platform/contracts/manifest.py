"""The release manifest: an immutable description of all files that are promoted and rolled back together.

A release's id is the SHA-256 of its canonical manifest (sorted keys, no white space, without ``signature``). Releases
with the same content have the same id, and any changed byte changes the id.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Final, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from reelway.platform.contracts.feature_dimensions import FeatureDimensions

SCHEMA_VERSION: Final = 1
MAX_MANIFEST_BYTES: Final = 1 << 20
"""Largest ``manifest.json`` that is written or read."""

VIEWER_TOWER_FILE: Final = "viewer_tower.onnx"
VIDEO_TOWER_FILE: Final = "video_tower.onnx"
RANKER_FILE: Final = "ranker.onnx"
INDEX_FILE: Final = "index.faiss"
VIDEOS_FILE: Final = "videos.arrow"
POPULAR_FILE: Final = "popular.arrow"
NEIGHBOURS_FILE: Final = "neighbours.arrow"
CONTENT_NEIGHBOURS_FILE: Final = "content_neighbours.arrow"
CREATORS_FILE: Final = "creators.arrow"
BLEND_FILE: Final = "blend.yaml"
CALIBRATION_FILE: Final = "calibration.json"
MANIFEST_FILE: Final = "manifest.json"

REHEARSAL_PREFIX: Final = "rehearsal-"
"""Name prefix of drill releases, which `latest` never resolves to."""

RELEASE_FILES: Final = (
    VIEWER_TOWER_FILE, VIDEO_TOWER_FILE, RANKER_FILE, INDEX_FILE, VIDEOS_FILE, POPULAR_FILE, NEIGHBOURS_FILE,
    CONTENT_NEIGHBOURS_FILE, CREATORS_FILE, BLEND_FILE, CALIBRATION_FILE,
)  # fmt: skip

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FileEntry(BaseModel):
    """Digest and size of one file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: Sha256
    size_bytes: Annotated[int, Field(ge=0, le=1 << 50)]


class TrainingWindow(BaseModel):
    """Time range of the training events, [start, end)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    start: AwareDatetime
    end: AwareDatetime


class FeatureServiceRef(BaseModel):
    """A Feast feature service: its name, and the digest of its views, fields, types and widths."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    digest: Sha256


class Dimensions(BaseModel):
    """Shapes that must agree between the files; ``verify`` reads them from the files and compares."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    features: FeatureDimensions
    """Copied from the schema of the data set that the models were trained on."""

    embedding: Annotated[int, Field(gt=0)]
    viewer_dense: Annotated[int, Field(gt=0)]
    video_dense: Annotated[int, Field(gt=0)]
    videos: Annotated[int, Field(gt=0)]
    tasks: tuple[str, ...]


class GateResult(BaseModel):
    """One quality gate: the metric's value, its bound, and whether the gate passed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    value: float
    bound: float
    comparison: Literal[">=", "<="]
    passed: bool
    detail: str = ""


class Waiver(BaseModel):
    """A person's decision, signed with the manifest, that a release may take traffic although a gate failed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gate: Annotated[str, Field(min_length=1)]
    reason: Annotated[str, Field(min_length=1)]
    by: Annotated[str, Field(min_length=1)]


class Manifest(BaseModel):
    """The manifest. ``signature`` is base64 of an Ed25519 signature over the canonical bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    name: str
    parent: str | None = None
    created_at: AwareDatetime
    code_version: str
    seed: int
    training_window: TrainingWindow
    feature_services: tuple[FeatureServiceRef, ...]
    dimensions: Dimensions
    metrics: dict[str, float]
    gates: tuple[GateResult, ...]
    waivers: tuple[Waiver, ...] = ()
    files: dict[str, FileEntry]
    config: dict[str, Any] = Field(default_factory=dict)
    signature: str | None = None

    def canonical_bytes(self) -> bytes:
        """Returns the signed bytes: JSON with sorted keys, no white space, without the signature.

        An empty ``waivers`` is left out, so it does not change the id.
        """
        body = self.model_dump(mode="json", exclude={"signature"} if self.waivers else {"signature", "waivers"})
        return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()

    @property
    def release_id(self) -> str:
        """Hex SHA-256 of the canonical bytes; the first 12 characters are the short id."""
        return hashlib.sha256(self.canonical_bytes()).hexdigest()
