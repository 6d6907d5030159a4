"""The HTTP API of the recommender: request, response and error bodies, published at ``/openapi.json``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from reelway.platform.contracts.events import OUTCOME_HORIZON_S, Arm, OutcomeType
from reelway.platform.contracts.ids import MAX_ID

MAX_COUNT = 100
MAX_OUTCOMES = 1_000
"""Maximum number of outcomes in one request."""
MAX_KEYS = 16
"""Maximum number of keys in an object of a request. Each unknown key costs time, because it is an error of its own."""
MAX_WATCH_MS = OUTCOME_HORIZON_S * 1_000

Degradation = Literal["no_viewer_row", "no_retrieval", "no_ranker", "no_reranker"]
"""Degradation level: the stage for which the request used a fallback."""


class RequestObject(BaseModel):
    """An object of a request body. It has no unknown key."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def limit_keys(cls, body: Any) -> Any:
        """Rejects an object with too many keys without an error for each of them."""
        for name, part in cls.objects_in(body):
            if isinstance(part, dict) and len(part) > MAX_KEYS:
                raise PydanticCustomError(
                    "too_many_keys", "{name} should have at most {limit} keys, not {keys}",
                    {"name": name, "limit": MAX_KEYS, "keys": len(part)},
                )  # fmt: skip
        return body

    @classmethod
    def objects_in(cls, body: Any) -> Iterator[tuple[str, Any]]:
        """Yields the objects whose keys are counted, with their names in an error."""
        yield "Object", body


class RequestContext(RequestObject):
    """The client's context at the time of the request."""

    device: Annotated[str, Field(max_length=64)] = "unknown"
    region: Annotated[str | None, Field(max_length=64)] = None
    language: Annotated[str | None, Field(max_length=64)] = None
    time: AwareDatetime | None = Field(default=None, description="RFC 3339 with a zone; the server's clock when absent")


class RecommendRequest(RequestObject):
    """Request body of ``POST /v1/recommend``."""

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


class OutcomesRequest(RequestObject):
    """Request body of ``POST /v1/outcomes``. Sending it again is safe: an outcome is counted once.

    Of invalid outcomes only the first one is reported.
    """

    outcomes: Annotated[list[ReportedOutcome], Field(min_length=1, max_length=MAX_OUTCOMES, fail_fast=True)]

    @classmethod
    def objects_in(cls, body: Any) -> Iterator[tuple[str, Any]]:
        """Yields the request and its outcomes. A validator of each outcome would take longer than its validation."""
        yield "Object", body
        outcomes = body.get("outcomes") if isinstance(body, dict) else None
        if isinstance(outcomes, list):
            for index, outcome in enumerate(outcomes[:MAX_OUTCOMES]):
                yield f"outcomes.{index}", outcome


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
