"""The HTTP API of the catalogue, for an internal port: uploads, updates, takedowns and restorations.

=======================  =====================================================================
``POST /v1/catalogue``   ``{"changes": [{"op": "upsert" | "takedown" | "restore", ...}]}``
``GET /v1/catalogue``    takedowns in effect, and the number of records in each topic
``GET /healthz``         without a token: whether the process answers
``GET /metrics``         without a token: Prometheus' text format
=======================  =====================================================================

A change is accepted once it is durable in the event log. Each refused change is named with its index and the problem;
the others are accepted. A request that is rejected as a whole gets ``{"error": ...}`` and is counted.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

from prometheus_client import CollectorRegistry, generate_latest
from pydantic import BaseModel, ConfigDict
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from reelway.platform.cli.catalogue.catalogue_files import RefusedChange, check_changes
from reelway.platform.contracts.feature_dimensions import FeatureDimensions
from reelway.platform.errors import StorageError
from reelway.platform.eventlog.catalogue_events import Takedown
from reelway.platform.eventlog.catalogue_log import CataloguePublisher
from reelway.platform.eventlog.topics import Topic
from reelway.platform.request_body import BodyLimit, RequestBodyError, parse_json, read_body
from reelway.platform.telemetry import counter

log = logging.getLogger(__name__)

CATALOGUE_PATH: Final = "/v1/catalogue"
MAX_CHANGES: Final = 1_000
"""Changes of one request."""
BODY_LIMIT: Final = BodyLimit(16 << 20, "send fewer changes per request", timeout_s=10.0)
_REJECTED_KINDS: Final = {
    HTTPStatus.UNAUTHORIZED: "unauthorized",
    HTTPStatus.NOT_FOUND: "not_found",
    HTTPStatus.METHOD_NOT_ALLOWED: "not_found",
    HTTPStatus.UNPROCESSABLE_ENTITY: "invalid",
    HTTPStatus.SERVICE_UNAVAILABLE: "not_stored",
}


class PublishedChanges(BaseModel):
    """Response of ``POST /v1/catalogue``; ``line`` of a refused change is its index in the request.

    A refused change has no ``input``: the client has it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    accepted: int
    refused: Sequence[RefusedChange] = ()


class CatalogueStatus(BaseModel):
    """Response of ``GET /v1/catalogue``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    takedowns: Sequence[Takedown]
    catalogue_end: dict[int, int]
    takedowns_end: dict[int, int]


def catalogue_status(publisher: CataloguePublisher) -> CatalogueStatus:
    """Reads the takedowns in effect and the ends of the topics."""
    ends = publisher.end_offsets()
    return CatalogueStatus(
        takedowns=publisher.read_takedowns().takedowns(),
        catalogue_end=dict(ends[Topic.CATALOGUE]),
        takedowns_end=dict(ends[Topic.TAKEDOWNS]),
    )


def catalogue_application(
    publisher: CataloguePublisher, token: str, dimensions: FeatureDimensions | None = None
) -> Starlette:
    """Returns the application.

    Args:
        token: bearer token that every call of ``/v1/catalogue`` must send.
        dimensions: dimensions of the data set; None: content vectors and topics are not checked.
    """
    registry = CollectorRegistry()
    changes_total = counter("reelway_catalogue_changes_total", "Changes by result.", ["result"], registry)
    failures = counter("reelway_catalogue_faults_total", "Requests that the event log failed.", [], registry)
    rejected_total = counter(
        "reelway_catalogue_rejected_requests_total", "Requests that were rejected as a whole, by kind.", ["kind"],
        registry,
    )  # fmt: skip
    for result in ("accepted", "refused"):
        changes_total.labels(result)

    async def publish(request: Request) -> Response:
        _check_token(request, token)
        lines = enumerate(_changes_in(await read_body(request.scope, request.receive, BODY_LIMIT)))
        checked = await run_in_threadpool(check_changes, lines, dimensions)
        try:
            await run_in_threadpool(publisher.publish, checked.accepted)
        except StorageError as error:
            failures.inc()
            log.error("catalogue changes not stored: %s", error)
            raise HTTPException(503, f"cannot store the changes: {error}; send the request again") from error
        changes_total.labels("accepted").inc(len(checked.accepted))
        changes_total.labels("refused").inc(len(checked.refused))
        refused = [change.model_copy(update={"input": None}) for change in checked.refused]
        return _json(PublishedChanges(accepted=len(checked.accepted), refused=refused))

    async def status(request: Request) -> Response:
        _check_token(request, token)
        try:
            return _json(await run_in_threadpool(catalogue_status, publisher))
        except StorageError as error:
            failures.inc()
            raise HTTPException(503, str(error)) from error

    async def reject(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        rejected_total.labels(_REJECTED_KINDS.get(HTTPStatus(error.status_code), "other")).inc()
        return _error_response(error.status_code, error.detail, error.headers)

    async def reject_body(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestBodyError)
        rejected_total.labels(error.kind).inc()
        return _error_response(error.status, str(error))

    async def healthz(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics_text(_: Request) -> Response:
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    application = Starlette(
        routes=[
            Route(CATALOGUE_PATH, publish, methods=["POST"]),
            Route(CATALOGUE_PATH, status, methods=["GET"]),
            Route("/healthz", healthz, methods=["GET"]),
            Route("/metrics", metrics_text, methods=["GET"]),
        ],
        exception_handlers={HTTPException: reject, RequestBodyError: reject_body},
    )
    application.router.redirect_slashes = False  # a redirect would repeat the Host header of the request
    return application


def _error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """Returns an error that ends its connection, because the rest of the body may be unread."""
    return JSONResponse({"error": message}, status, {"Connection": "close", **(headers or {})})


def _json(value: BaseModel) -> Response:
    return Response(value.model_dump_json(exclude_none=True), media_type="application/json")


def _check_token(request: Request, token: str) -> None:
    kind, _, credentials = request.headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(credentials.strip().encode(), token.encode())
    if kind.lower() != "bearer" or not right:
        raise HTTPException(401, "missing or wrong bearer token", {"WWW-Authenticate": "Bearer"})


def _changes_in(body: bytes) -> list[Any]:
    try:
        changes = parse_json(body)["changes"]
    except ValueError as error:
        raise HTTPException(422, f'not JSON: {error}; expected an object {{"changes": [...]}}') from None
    except (TypeError, KeyError):
        raise HTTPException(422, 'expected a JSON object {"changes": [...]}') from None
    if not isinstance(changes, list) or len(changes) > MAX_CHANGES:
        raise HTTPException(422, f"changes: expected a list of at most {MAX_CHANGES}")
    return changes
