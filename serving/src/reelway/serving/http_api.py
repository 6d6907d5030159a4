"""The HTTP API of the service: routes, validation errors and schema. Imports no Ray.

Status codes:

- 422: the request is invalid; the response names every invalid field.
- 429: too many requests are in flight (load shedding).
- 503: an error that no fallback covers. Failed stages do not lead to an error; the slate comes from their fallbacks.
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
    """A release that is routed to, with its share of the traffic."""

    release: str
    arm: Arm
    weight_basis_points: int


class CurrentReleases(BaseModel):
    """``GET /v1/releases/current``: the routing in effect, which may differ from the configured routing.

    While releases are being opened, ``routing`` is the previous routing. The arm of a release that could not be opened
    has weight 0. ``open`` lists the releases held open; ``faults`` has the reason why others could not be opened.
    """

    rollout: str
    salt: str
    routing: Routing
    releases: list[ServedRelease]
    open: list[str]
    faults: dict[str, str] = {}


class PendingResponse(NamedTuple):
    """A response, and the task to run after it was sent."""

    response: RecommendResponse
    background: Callable[[], Awaitable[None]] | None = None


class Health(BaseModel):
    """``GET /healthz``."""

    status: str = "ok"


class RecommendService(Protocol):
    """The implementation behind the routes."""

    async def recommend(self, request: RecommendRequest) -> PendingResponse: ...

    def current_releases(self) -> CurrentReleases: ...

    async def metrics_text(self) -> bytes: ...

    def record_invalid(self) -> None: ...

    def shed_before_read(self) -> None:
        """Rejects a request before it is read, if no viewer can be answered now.

        Raises:
            OverloadedError: if the request is rejected.
        """
        ...


RECOMMEND: Final = "/v1/recommend"
RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    200: {"model": RecommendResponse},
    422: {"model": ErrorResponse},
    429: {"model": ErrorResponse, "description": "Too many requests are in flight; see Retry-After."},
}


def build_http_api(service: RecommendService) -> FastAPI:
    """Returns the ASGI application."""
    api = FastAPI(
        title="Reelway recommendations",
        description="Slates of short videos. Send a video's token back with every outcome.",
        version="1",
    )

    # The response model is valid by construction, so FastAPI need not validate it again. RESPONSES documents it.
    @api.post(RECOMMEND, responses=RESPONSES)
    async def recommend(request: RecommendRequest) -> Response:
        """Returns an ordered slate for one viewer, known or unknown."""
        answer = await service.recommend(request)
        body = answer.response.model_dump_json()
        return Response(body, media_type="application/json", background=cast(Any, answer.background))

    @api.get("/v1/releases/current")
    async def releases() -> CurrentReleases:
        """Returns the releases behind this service and their shares of the traffic."""
        return service.current_releases()

    @api.get("/healthz")
    async def healthz() -> Health:
        """Whether this router can answer."""
        return Health()

    @api.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Returns the metrics of all stages on this node, for Prometheus."""
        return Response(await service.metrics_text(), media_type=CONTENT_TYPE_LATEST)

    @api.exception_handler(RequestValidationError)
    async def reject_invalid(_: Request, error: RequestValidationError) -> Response:
        service.record_invalid()
        fields = [field_error(detail) for detail in error.errors()]
        named = ", ".join(dict.fromkeys(field.field for field in fields))
        body = ErrorResponse(error=f"the request is invalid; correct {named}", fields=fields)
        return JSONResponse(body.model_dump(mode="json"), status_code=422)

    @api.exception_handler(OverloadedError)
    async def turned_away(_: Request, error: OverloadedError) -> Response:
        return too_many_requests(error)

    @api.exception_handler(Exception)
    async def unavailable(_: Request, error: Exception) -> Response:
        log.error("request failed", exc_info=error)
        body = ErrorResponse(error="the request could not be answered; try again")
        return JSONResponse(body.model_dump(mode="json"), status_code=503, headers={"Retry-After": "1"})

    api.add_middleware(LoadSheddingMiddleware, service=service)
    return api


def too_many_requests(error: OverloadedError) -> Response:
    """Returns a 429 response with a Retry-After header."""
    body = ErrorResponse(error=str(error))
    return JSONResponse(body.model_dump(mode="json"), status_code=429, headers={"Retry-After": "1"})


class LoadSheddingMiddleware:
    """ASGI middleware that rejects requests before they are read.

    A rejected request must be cheap, because most requests are rejected when the router is busiest.
    """

    def __init__(self, app: ASGIApp, service: RecommendService) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] == RECOMMEND:
            try:
                self._service.shed_before_read()
            except OverloadedError as error:
                app = too_many_requests(error)
        await app(scope, receive, send)


def field_error(error: dict[str, Any]) -> FieldError:
    """Converts a pydantic error: a dotted path within the body, the message, and the value if it is short."""
    path = [str(part) for part in error["loc"] if part != "body"]
    if error["type"] == "json_invalid":
        reason = error.get("ctx", {}).get("error", "invalid JSON")
        return FieldError(field="body", message=f"not JSON: {reason} at character {error['loc'][-1]}")
    value = error.get("input")
    shown = value if isinstance(value, str | int | float | bool) and len(str(value)) <= VALUE_LENGTH else None
    return FieldError(field=".".join(path) or "body", message=error["msg"], value=shown)
