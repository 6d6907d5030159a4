"""The HTTP API of the recommender: request, response and error bodies, published at ``/openapi.json``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from reelway.platform.contracts.events import OUTCOME_HORIZON_S, Arm, OutcomeType
from reelway.platform.contracts.ids import MAX_ID

MAX_COUNT = 100
MAX_OUTCOMES = 1_000
"""Maximum number of outcomes in one request."""
MAX_WATCH_MS = OUTCOME_HORIZON_S * 1_000

Degradation = Literal["no_viewer_row", "no_retrieval", "no_ranker", "no_reranker"]
"""Degradation level: the stage for which the request used a fallback."""


class RequestContext(BaseModel):
    """The client's context at the time of the request."""

    model_config = ConfigDict(extra="forbid")

    device: Annotated[str, Field(max_length=64)] = "unknown"
    region: Annotated[str | None, Field(max_length=64)] = None
    language: Annotated[str | None, Field(max_length=64)] = None
    time: AwareDatetime | None = Field(default=None, description="RFC 3339 with a zone; the server's clock when absent")


class RecommendRequest(BaseModel):
    """Request body of ``POST /v1/recommend``."""

    model_config = ConfigDict(extra="forbid")

    viewer_id: Annotated[int, Field(ge=0, le=MAX_ID, strict=True)]
    count: Annotated[int, Field(ge=1, le=MAX_COUNT, strict=True)] = 20
    context: RequestContext = Field(default_factory=RequestContext)


class RecommendedVideo(BaseModel):
    """One position of the slate."""

    video_id: int
    creator_id: int
    position: int
    score: float = Field(description="weighted value the slate was ordered by; comparable within one response only")
    source: str = Field(description="the retrieval source that proposed the video")
    reason: str = Field(description="one readable sentence, e.g. 'because you watched ...'")
    title: str | None = None
    token: str = Field(description="signed impression token; send it back with every outcome")


class RecommendResponse(BaseModel):
    """The ordered slate. ``degraded`` is empty if every stage answered."""

    request_id: int
    viewer_id: int
    release: str
    arm: Arm
    degraded: list[Degradation] = Field(default_factory=list)
    videos: list[RecommendedVideo]


class ReportedOutcome(BaseModel):
    """One action of a viewer on one video of a slate."""

    model_config = ConfigDict(extra="forbid")

    token: str = Field(description="the video's impression token, as it came with the slate")
    type: OutcomeType
    value: Annotated[float | None, Field(ge=0, le=MAX_WATCH_MS, allow_inf_nan=False)] = Field(
        default=None, description="watched milliseconds for `watch`; 1 or absent for everything else"
    )
    event_time: AwareDatetime | None = Field(
        default=None, description="when it was done, RFC 3339 with a zone; the moment of its arrival when absent"
    )


class OutcomesRequest(BaseModel):
    """Request body of ``POST /v1/outcomes``. Sending it again is safe: an outcome is counted once."""

    model_config = ConfigDict(extra="forbid")

    outcomes: Annotated[list[ReportedOutcome], Field(min_length=1, max_length=MAX_OUTCOMES)]


class RefusedOutcome(BaseModel):
    """One invalid outcome. Sending it again cannot succeed."""

    index: int = Field(description="its place in the request, from 0")
    message: str


class OutcomesResponse(BaseModel):
    """Results of the outcomes of one request. The accepted ones are in the event log when this answer is sent.

    ``accepted`` and ``refused`` add up to the whole request.
    """

    accepted: int
    refused: list[RefusedOutcome] = Field(default_factory=list)


class FieldError(BaseModel):
    """One invalid field: its location, the problem and the received value."""

    field: str
    message: str
    value: object = None


class ErrorResponse(BaseModel):
    """Body of every 4xx answer."""

    error: str
    fields: list[FieldError] = Field(default_factory=list)
