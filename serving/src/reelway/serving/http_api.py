"""The HTTP face of the service: routes, validation errors and schema. It knows neither Ray nor how a slate is made.

A wrong request is answered 422 with every field that is wrong. A fault inside is answered with a slate from a lower
rung; only when not even that is possible is it 503, never 500. More than can be answered in time is sent away with 429.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple, Protocol, cast

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.types import ASGIApp, Receive, Scope, Send

from reelway.platform.contracts.api import ErrorResponse, FieldError, RecommendRequest, RecommendResponse
from reelway.platform.contracts.events import Arm
from reelway.platform.errors import OverloadedError
from reelway.platform.rollout.traffic.routing import Routing

log = logging.getLogger(__name__)

VALUE_LENGTH = 100


class ServedRelease(BaseModel):
    """One release that takes traffic, or is ready to."""

    release: str
    arm: Arm
    weight_basis_points: int


class CurrentReleases(BaseModel):
    """``GET /v1/releases/current``: what this router does, which may be short of what it was told.

    ``routing`` is what it acts upon: while releases are being opened it is the one before, and where one could not be
    opened its arm has weight 0 here. ``open`` are the releases held ready; ``faults`` says why others are not.
    """

    rollout: str
    salt: str
    routing: Routing
    releases: list[ServedRelease]
    open: list[str]
    faults: dict[str, str] = {}


class Answer(NamedTuple):
    """A slate, and what is to be started once it is on its way."""

    response: RecommendResponse
    afterwards: Callable[[], Awaitable[None]] | None = None


class Health(BaseModel):
    """``GET /healthz``."""

    status: str = "ok"


class Service(Protocol):
    """What stands behind the routes."""

    async def recommend(self, request: RecommendRequest) -> Answer: ...

    def current_releases(self) -> CurrentReleases: ...

    async def metrics_text(self) -> bytes: ...

    def count_refused(self) -> None: ...

    def refuse_unread(self) -> None:
        """Send a request away whoever it is from.

        Raises:
            OverloadedError: nobody can be answered now.
        """
        ...


RECOMMEND: Final = "/v1/recommend"
RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    200: {"model": RecommendResponse},
    422: {"model": ErrorResponse},
    429: {"model": ErrorResponse, "description": "Too many requests are under way; see Retry-After."},
}


def build_http_api(service: Service) -> FastAPI:
    """The ASGI application."""
    api = FastAPI(
        title="Reelway recommendations",
        description="Slates of short videos. Send a video's token back with every outcome.",
        version="1",
    )

    # The answer is already valid, so it is written as it is; the models below are what /openapi.json says of it.
    @api.post(RECOMMEND, responses=RESPONSES)
    async def recommend(request: RecommendRequest) -> Response:
        """An ordered slate for one viewer, known or unknown."""
        answer = await service.recommend(request)
        body = answer.response.model_dump_json()
        return Response(body, media_type="application/json", background=cast(Any, answer.afterwards))

    @api.get("/v1/releases/current")
    async def releases() -> CurrentReleases:
        """The releases behind this service and their share of the traffic."""
        return service.current_releases()

    @api.get("/healthz")
    async def healthz() -> Health:
        """Whether this router can answer."""
        return Health()

    @api.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """All stages' metrics of this node, for Prometheus."""
        return Response(await service.metrics_text(), media_type=CONTENT_TYPE_LATEST)

    @api.exception_handler(RequestValidationError)
    async def refuse(_: Request, error: RequestValidationError) -> Response:
        service.count_refused()
        fields = [field_error(one) for one in error.errors()]
        named = ", ".join(dict.fromkeys(field.field for field in fields))
        body = ErrorResponse(error=f"the request is invalid; correct {named}", fields=fields)
        return JSONResponse(body.model_dump(mode="json"), status_code=422)

    @api.exception_handler(OverloadedError)
    async def turned_away(_: Request, error: OverloadedError) -> Response:
        return come_back(error)

    @api.exception_handler(Exception)
    async def unavailable(_: Request, error: Exception) -> Response:
        log.error("a request could not be answered", exc_info=error)
        body = ErrorResponse(error="no answer is possible now; try again")
        return JSONResponse(body.model_dump(mode="json"), status_code=503, headers={"Retry-After": "1"})

    api.add_middleware(TurnAwayUnread, service=service)
    return api


def come_back(error: OverloadedError) -> Response:
    """429, and when to ask again."""
    body = ErrorResponse(error=str(error))
    return JSONResponse(body.model_dump(mode="json"), status_code=429, headers={"Retry-After": "1"})


class TurnAwayUnread:
    """Before a request is read: what is sent away must cost little, since there is most of it when there is least time.

    An ASGI middleware.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] == RECOMMEND:
            try:
                self._service.refuse_unread()
            except OverloadedError as error:
                app = come_back(error)
        await app(scope, receive, send)


def field_error(error: dict[str, Any]) -> FieldError:
    """One of pydantic's errors in our words: a dotted path within the body, and the value seen if it is short."""
    path = [str(part) for part in error["loc"] if part != "body"]
    if error["type"] == "json_invalid":
        reason = error.get("ctx", {}).get("error", "invalid JSON")
        return FieldError(field="body", message=f"not JSON: {reason} at character {error['loc'][-1]}")
    seen = error.get("input")
    shown = seen if isinstance(seen, str | int | float | bool) and len(str(seen)) <= VALUE_LENGTH else None
    return FieldError(field=".".join(path) or "body", message=error["msg"], value=shown)
