"""The HTTP API of the service: routes, validation errors and schema. Imports no Ray.

Status codes:

- 413: the body of reported outcomes is too long.
- 422: the request is invalid; the response names every invalid field.
- 429: too many requests are in flight (load shedding).
- 503: an error that no fallback covers. Failed stages do not lead to an error; the slate comes from their fallbacks.
  Outcomes are rejected with 503 while the event log does not accept them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, NamedTuple, Protocol, cast

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reelway.platform.contracts.api import (
    ErrorResponse,
    FieldError,
    OutcomesRequest,
    OutcomesResponse,
    RecommendRequest,
    RecommendResponse,
)
from reelway.platform.contracts.events import Arm
from reelway.platform.errors import MalformedFileError, OverloadedError, ServingError, StorageError
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

    async def report_outcomes(self, request: OutcomesRequest) -> OutcomesResponse: ...

    def current_releases(self) -> CurrentReleases: ...

    async def metrics_text(self) -> bytes: ...

    def record_invalid(self) -> None: ...

    def shed_before_read(self) -> None:
        """Rejects a request before it is read, if no viewer can be answered now.

        Raises:
            OverloadedError: if the request is rejected.
        """
        ...

    def close(self) -> None:
        """Writes what is still queued; blocks."""
        ...


RECOMMEND: Final = "/v1/recommend"
OUTCOMES: Final = "/v1/outcomes"
MAX_OUTCOMES_BYTES: Final = 1 << 20
"""Four times the size of a request with 1,000 outcomes."""
RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    200: {"model": RecommendResponse},
    422: {"model": ErrorResponse},
    429: {"model": ErrorResponse, "description": "Too many requests are in flight; see Retry-After."},
}
OUTCOMES_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    413: {"model": ErrorResponse},
    422: {"model": ErrorResponse},
    503: {"model": ErrorResponse, "description": "The event log accepts nothing now; see Retry-After."},
}


def build_http_api(service: RecommendService) -> FastAPI:
    """Returns the ASGI application, which closes the service when it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    api = FastAPI(
        title="Reelway recommendations",
        description="Slates of short videos. Send a video's token back with every outcome.",
        version="1",
        lifespan=lifespan,
    )

    # The response model is valid by construction, so FastAPI need not validate it again. RESPONSES documents it.
    @api.post(RECOMMEND, responses=RESPONSES)
    async def recommend(request: RecommendRequest) -> Response:
        """Returns an ordered slate for one viewer, known or unknown."""
        answer = await service.recommend(request)
        body = answer.response.model_dump_json()
        return Response(body, media_type="application/json", background=cast(Any, answer.background))

    @api.post(OUTCOMES, response_model=OutcomesResponse, responses=OUTCOMES_RESPONSES)
    async def report(request: OutcomesRequest) -> Response:
        """Records up to 1,000 outcomes.

        The response is sent once they are in the event log; without a response, send them again.
        """
        try:
            answer = await service.report_outcomes(request)
        except (ServingError, StorageError, MalformedFileError) as error:
            log.error("outcomes not recorded: %s", error)
            return service_unavailable("the outcomes cannot be recorded now; send them again")
        return Response(answer.model_dump_json(), media_type="application/json")

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
        return service_unavailable("the request could not be answered; try again")

    @api.exception_handler(HTTPException)
    async def reject(_: Request, error: HTTPException) -> Response:
        body = ErrorResponse(error=str(error.detail))
        return JSONResponse(body.model_dump(mode="json"), status_code=error.status_code, headers=error.headers)

    api.add_middleware(OutcomesLimitMiddleware)
    api.add_middleware(LoadSheddingMiddleware, service=service)
    return api


def too_many_requests(error: OverloadedError) -> Response:
    """Returns a 429 response with a Retry-After header."""
    body = ErrorResponse(error=str(error))
    return JSONResponse(body.model_dump(mode="json"), status_code=429, headers={"Retry-After": "1"})


def service_unavailable(message: str) -> Response:
    """Returns a 503 response with a Retry-After header."""
    body = ErrorResponse(error=message)
    return JSONResponse(body.model_dump(mode="json"), status_code=503, headers={"Retry-After": "1"})


class OutcomesLimitMiddleware:
    """ASGI middleware that rejects outcomes of more than ``MAX_OUTCOMES_BYTES`` before all are in memory."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != OUTCOMES:
            await self._app(scope, receive, send)
            return
        read = 0

        async def receive_some() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > MAX_OUTCOMES_BYTES:
                raise HTTPException(
                    413, f"the body has over {MAX_OUTCOMES_BYTES} bytes; send fewer outcomes per request"
                )
            return message

        await self._app(scope, receive_some, send)


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
