"""The HTTP API of the service: routes, validation errors and schema. Imports no Ray.

``/v1/recommend``, ``/v1/outcomes`` and ``/healthz`` are for clients. All other paths are for the service itself:
``internal_api`` serves them at a port of its own, and a client receives 404.

Status codes:

- 400: the body ended early; the client does not receive the response.
- 401: the viewer's identity is not proven, and the service demands a proof (see ``access``).
- 403: the request is about another viewer than the proven one.
- 404, 405: there is no such path, or it has another method.
- 408: the body did not arrive in time.
- 413: the body is too long.
- 415: the body is compressed.
- 422: the request is invalid; the response names up to ``MAX_REPORTED`` invalid fields.
- 429: too many requests are in flight (load shedding), or come from one viewer or address.
- 503: an error that no fallback covers. Failed stages do not lead to an error; the slate comes from their fallbacks.
  Proofs are answered with 503 while there are no keys to verify them.
  Outcomes are rejected with 503 while the event log does not accept them. So are long bodies while many are arriving.

A request that HAProxy cannot parse is answered by HAProxy itself, with a short HTML page and status 400, 408 or 422.
``/-/healthz`` and ``/-/routes`` of Ray Serve, the names of the applications, are readable by clients.

All other 4xx and 5xx responses have the body ``ErrorResponse``. ``record_rejected`` counts every rejected request.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from json import JSONDecodeError
from typing import Any, Final, NamedTuple, Protocol, cast

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

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
from reelway.platform.request_body import BodyLimit, BodyLimitMiddleware, RequestBodyError, parse_json
from reelway.platform.rollout.traffic.access_options import AuthMode
from reelway.platform.rollout.traffic.routing import Routing
from reelway.serving.access import AccessError, ForbiddenError, ViewerAccess
from reelway.serving.access.middleware import AccessMiddleware, caller_of

log = logging.getLogger(__name__)

MAX_REPORTED: Final = 20
"""Invalid fields that a response names."""
SHOWN_CHARACTERS: Final = 100
"""Longest value, or part of a field's path, that a response repeats."""


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
    authentication: AuthMode = Field(default="off", description="how a client proves which viewer it is")


class RecommendService(Protocol):
    """The implementation behind the routes."""

    async def recommend(self, request: RecommendRequest, *, authenticated: bool) -> PendingResponse: ...

    async def report_outcomes(self, request: OutcomesRequest, viewer_id: int | None) -> OutcomesResponse:
        """Records outcomes of one viewer, or of any viewers if ``viewer_id`` is None."""
        ...

    def current_releases(self) -> CurrentReleases: ...

    async def metrics_text(self) -> bytes: ...

    def record_rejected(self, kind: str) -> None:
        """Counts a request that was rejected: ``invalid``, ``not_found``, or a kind of ``RequestBodyError``."""
        ...

    def record_denied(self, reason: str) -> None:
        """Counts a request that was denied; the reason is that of an ``AccessError``."""
        ...

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
HEALTH: Final = "/healthz"
CURRENT_RELEASES: Final = "/v1/releases/current"
METRICS: Final = "/metrics"
MAX_RECOMMEND_BYTES: Final = 16 << 10
MAX_OUTCOMES_BYTES: Final = 1 << 20
"""Four times the size of a request with 1,000 outcomes."""
BODY_LIMITS: Final = {
    RECOMMEND: BodyLimit(MAX_RECOMMEND_BYTES, "send only the fields of the request"),
    OUTCOMES: BodyLimit(MAX_OUTCOMES_BYTES, "send fewer outcomes per request"),
}
BODY_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": ErrorResponse, "description": description}
    for status, description in (
        (401, "The viewer's identity is not proven; see WWW-Authenticate."),
        (403, "The request is about another viewer than the proven one."),
        (408, "The body did not arrive in time."),
        (413, "The body is too long."),
        (415, "The body is compressed."),
        (422, "The request is invalid."),
        (429, "Too many requests; see Retry-After."),
    )
}
RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    **BODY_RESPONSES,
    200: {"model": RecommendResponse},
}
OUTCOMES_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    **BODY_RESPONSES,
    503: {"model": ErrorResponse, "description": "The event log accepts nothing now; see Retry-After."},
}


def build_http_api(service: RecommendService, access: ViewerAccess) -> FastAPI:
    """Returns the ASGI application, which closes the service when it ends.

    Args:
        access: who may ask.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    api = FastAPI(
        title="Reelway recommendations",
        description="Slates of short videos. Send a video's token back with every outcome.",
        version="1",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    api.router.route_class = StrictJsonRoute

    # The response model is valid by construction, so FastAPI need not validate it again. RESPONSES documents it.
    @api.post(RECOMMEND, responses=RESPONSES)
    async def recommend(request: RecommendRequest, http: Request) -> Response:
        """Returns an ordered slate for one viewer, known or unknown."""
        caller = caller_of(http.scope)
        if caller.authenticated and caller.viewer_id != request.viewer_id:
            raise ForbiddenError(
                "viewer", f"viewer_id {request.viewer_id}: the proven identity is another viewer; ask for that viewer"
            )
        answer = await service.recommend(request, authenticated=caller.authenticated)
        body = answer.response.model_dump_json()
        return Response(body, media_type="application/json", background=cast(Any, answer.background))

    @api.post(OUTCOMES, response_model=OutcomesResponse, responses=OUTCOMES_RESPONSES)
    async def report(request: OutcomesRequest, http: Request) -> Response:
        """Records up to 1,000 outcomes.

        The response is sent once they are in the event log; without a response, send them again.
        """
        try:
            answer = await service.report_outcomes(request, caller_of(http.scope).viewer_id)
        except (ServingError, StorageError, MalformedFileError) as error:
            log.error("outcomes not recorded: %s", error)
            return service_unavailable("the outcomes cannot be recorded now; send them again")
        return Response(answer.model_dump_json(), media_type="application/json")

    @api.get(CURRENT_RELEASES)
    async def releases() -> CurrentReleases:
        """Returns the releases behind this service and their shares of the traffic."""
        return service.current_releases()

    @api.get(HEALTH)
    async def healthz() -> Health:
        """Whether this router can answer."""
        return Health(authentication=access.options.mode)

    @api.get(METRICS, response_class=Response)
    async def metrics() -> Response:
        """Returns the metrics of all stages on this node, for Prometheus."""
        return Response(await service.metrics_text(), media_type=CONTENT_TYPE_LATEST)

    _handle_errors(api, service)
    api.add_middleware(BodyLimitMiddleware, limits=BODY_LIMITS, reject=_body_rejection(service))
    api.add_middleware(
        AccessMiddleware,
        access=access,
        guarded=(RECOMMEND, OUTCOMES),
        public=(HEALTH,),
        deny=_denial(service),
        hide=_hiding(service),
    )
    api.add_middleware(LoadSheddingMiddleware, service=service)
    return api


def _handle_errors(api: FastAPI, service: RecommendService) -> None:
    @api.exception_handler(RequestValidationError)
    async def reject_invalid(_: Request, error: RequestValidationError) -> Response:
        service.record_rejected("invalid")
        fields = [field_error(detail) for detail in error.errors()[:MAX_REPORTED]]
        named = ", ".join(dict.fromkeys(field.field for field in fields))
        return error_response(422, ErrorResponse(error=f"the request is invalid; correct {named}", fields=fields))

    @api.exception_handler(AccessError)
    async def denied(_: Request, error: AccessError) -> Response:
        return _denial(service)(error)

    @api.exception_handler(OverloadedError)
    async def turned_away(_: Request, error: OverloadedError) -> Response:
        return too_many_requests(error)

    @api.exception_handler(Exception)
    async def unavailable(_: Request, error: Exception) -> Response:
        log.error("request failed", exc_info=error)
        return service_unavailable("the request could not be answered; try again")

    @api.exception_handler(HTTPException)
    async def reject(_: Request, error: HTTPException) -> Response:
        service.record_rejected("not_found")
        return error_response(error.status_code, ErrorResponse(error=str(error.detail)), error.headers)


def _body_rejection(service: RecommendService) -> Callable[[RequestBodyError], Response]:
    def reject(error: RequestBodyError) -> Response:
        service.record_rejected(error.kind)
        return error_response(error.status, ErrorResponse(error=str(error)), error.headers)

    return reject


def _denial(service: RecommendService) -> Callable[[AccessError], Response]:
    def deny(error: AccessError) -> Response:
        service.record_denied(error.reason)
        return error_response(error.status, ErrorResponse(error=str(error)), error.headers)

    return deny


def _hiding(service: RecommendService) -> Callable[[], Response]:
    def hide() -> Response:
        service.record_rejected("not_found")
        return not_found()

    return hide


def not_found() -> Response:
    """Returns the response to a path that does not exist."""
    return error_response(404, ErrorResponse(error="Not Found"))


def error_response(status: int, body: ErrorResponse, headers: Mapping[str, str] | None = None) -> Response:
    """Returns a response with an error as JSON."""
    return Response(body.model_dump_json(), status, headers, media_type="application/json")


def too_many_requests(error: OverloadedError) -> Response:
    """Returns a 429 response with a Retry-After header."""
    return error_response(429, ErrorResponse(error=str(error)), {"Retry-After": "1"})


def service_unavailable(message: str) -> Response:
    """Returns a 503 response with a Retry-After header."""
    return error_response(503, ErrorResponse(error=message), {"Retry-After": "1"})


class StrictJsonRequest(Request):
    """A request whose body is parsed by ``parse_json``.

    Starlette's parser accepts NaN and lone surrogates, and raises other errors than ``JSONDecodeError`` for a long
    number, deep nesting and invalid UTF-8.
    """

    async def json(self) -> Any:
        try:
            return parse_json(await self.body())
        except ValueError as error:
            raise JSONDecodeError(str(error), "", 0) from error


class StrictJsonRoute(APIRoute):
    """Calls the endpoint with a ``StrictJsonRequest``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(StrictJsonRequest(request.scope, request.receive))

        return handle_strictly


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
    if error["type"] == "json_invalid":
        return FieldError(field="body", message=f"not JSON: {error['ctx']['error']}")
    if isinstance(error.get("input"), bytes):
        return FieldError(field="body", message="not sent as JSON; send the header Content-Type: application/json")
    path = ".".join(str(part)[:SHOWN_CHARACTERS] for part in error["loc"] if part != "body")
    return FieldError(field=path or "body", message=error["msg"], value=_shown(error.get("input")))


def _shown(value: object) -> str | int | float | None:
    """Returns a value that a response can repeat; None for a long one, an object and a float that JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float) and len(str(value)) <= SHOWN_CHARACTERS else None
