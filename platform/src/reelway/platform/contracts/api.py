"""The HTTP API of the recommender: request, response and error bodies, published at ``/openapi.json``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from reelway.platform.contracts.events import Arm
from reelway.platform.contracts.ids import MAX_ID

MAX_COUNT = 100

Rung = Literal["no_viewer_row", "no_retrieval", "no_ranker", "no_reranker"]
"""A rung of the degradation ladder that a request had to step down to."""


class RequestContext(BaseModel):
    """What the client knows about the moment of the request."""

    model_config = ConfigDict(extra="forbid")

    device: Annotated[str, Field(max_length=64)] = "unknown"
    region: Annotated[str | None, Field(max_length=64)] = None
    language: Annotated[str | None, Field(max_length=64)] = None
    time: AwareDatetime | None = Field(default=None, description="RFC 3339 with a zone; the server's clock when absent")


class RecommendRequest(BaseModel):
    """``POST /v1/recommend``."""

    model_config = ConfigDict(extra="forbid")

    viewer_id: Annotated[int, Field(ge=0, le=MAX_ID, strict=True)]
    count: Annotated[int, Field(ge=1, le=MAX_COUNT, strict=True)] = 20
    context: RequestContext = Field(default_factory=RequestContext)


class RecommendedVideo(BaseModel):
    """One place of the slate."""

    video_id: int
    creator_id: int
    position: int
    score: float = Field(description="weighted value the slate was ordered by; comparable within one response only")
    source: str = Field(description="the retrieval source that proposed the video")
    reason: str = Field(description="one readable sentence, e.g. 'because you watched ...'")
    title: str | None = None
    token: str = Field(description="signed impression token; send it back with every outcome")


class RecommendResponse(BaseModel):
    """The ordered answer. ``degraded`` is empty when every stage answered."""

    request_id: int
    viewer_id: int
    release: str
    arm: Arm
    degraded: list[Rung] = Field(default_factory=list)
    videos: list[RecommendedVideo]


class FieldError(BaseModel):
    """One invalid field: where it is, what was wrong, and the value seen."""

    field: str
    message: str
    value: object = None


class ErrorResponse(BaseModel):
    """Body of every 4xx answer."""

    error: str
    fields: list[FieldError] = Field(default_factory=list)
