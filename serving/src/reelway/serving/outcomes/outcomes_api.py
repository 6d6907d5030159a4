"""``/v1/outcomes`` over HTTP: clients report outcomes, and Prometheus reads the counters.

Routes are relative: ``POST ""`` (or ``"/"``) and ``GET /metrics``. Behind Ray Serve's ``route_prefix="/v1/outcomes"``
a request has the prefix as its ``root_path`` (ASGI), which the routing removes. In a deployment::

    @serve.ingress(...)  # one replica: one process holds the file
    class Outcomes:
        def __init__(self, path, secrets):
            self._collector = OutcomeCollector(path)
            self._signer = TokenSigner(*secrets)

        def __serve_build_asgi_app__(self):
            return build_outcomes_api(self._collector, self._signer)

        async def expose(self, batch):  # called by the routers' `forward_exposures(buffer, handle.expose.remote)`
            await asyncio.wrap_future(self._collector.record_exposures(batch))
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reelway.platform.contracts.api import ErrorResponse, OutcomesRequest, OutcomesResponse
from reelway.platform.errors import MalformedFileError, ServingError, StorageError
from reelway.platform.tokens import TokenSigner
from reelway.serving.http_api import field_error
from reelway.serving.outcomes.collector import OutcomeCollector
from reelway.serving.outcomes.event_log_writer import EventLogWriter
from reelway.serving.outcomes.reported import read_outcomes

log = logging.getLogger(__name__)

MAX_BODY_BYTES: Final = 1 << 20
"""Four times the size of a request with 1,000 outcomes."""


def build_outcomes_api(
    collector: OutcomeCollector, signer: TokenSigner, appender: EventLogWriter | None = None
) -> FastAPI:
    """Builds the ASGI application. At shutdown it closes the collector and the event log writer."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(collector.close)
        if appender:
            await asyncio.to_thread(appender.close)

    api = FastAPI(
        title="Reelway outcomes",
        description="What viewers did with what they were shown. Send a video's token back with every outcome.",
        version="1",
        lifespan=lifespan,
    )
    api.add_middleware(_BodyLimitMiddleware)
    api.add_middleware(_RootPathMiddleware)

    answers: dict[int | str, dict[str, object]] = {
        413: {"model": ErrorResponse},
        422: {"model": ErrorResponse},
        503: {"model": ErrorResponse},
    }

    @api.post("/", response_model=OutcomesResponse, responses=answers)
    async def report(request: OutcomesRequest) -> Response:
        """Counts up to 1,000 outcomes. The answer is sent once they are on disk; without an answer, send them again."""
        columns, refused = read_outcomes(request.outcomes, signer)
        if refused:
            collector.count_refused(len(refused))
        logged = asyncio.wrap_future(appender.append(columns)) if appender else _no_event_log()
        counts, _ = await asyncio.gather(asyncio.wrap_future(collector.record_outcomes(columns)), logged)
        answer = OutcomesResponse(accepted=len(columns), refused=refused, **counts)
        return Response(answer.model_dump_json(), media_type="application/json")

    @api.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """The rollouts' sufficient statistics, for Prometheus or a direct scrape."""
        return Response(await asyncio.to_thread(collector.metrics_text), media_type=CONTENT_TYPE_LATEST)

    _install_error_handlers(api)
    return api


async def _no_event_log() -> None:
    """Awaited in place of an append if there is no event log."""


def _install_error_handlers(api: FastAPI) -> None:
    """Answers every error with an ``ErrorResponse``."""

    @api.exception_handler(RequestValidationError)
    async def reject_invalid(_: Request, error: RequestValidationError) -> Response:
        fields = [field_error(detail) for detail in error.errors()]
        named = ", ".join(dict.fromkeys(field.field for field in fields))
        body = ErrorResponse(error=f"the request is invalid; correct {named}", fields=fields)
        return JSONResponse(body.model_dump(mode="json"), status_code=422)

    @api.exception_handler(HTTPException)
    async def reject_body(_: Request, error: HTTPException) -> Response:
        body = ErrorResponse(error=str(error.detail))
        return JSONResponse(body.model_dump(mode="json"), status_code=error.status_code)

    @api.exception_handler(MalformedFileError)  # a damaged file
    @api.exception_handler(StorageError)
    @api.exception_handler(ServingError)
    async def unavailable(_: Request, error: Exception) -> Response:
        log.error("outcomes not counted: %s", error)
        body = ErrorResponse(error="the outcomes cannot be counted now; send them again")
        return JSONResponse(body.model_dump(mode="json"), status_code=503, headers={"Retry-After": "1"})


class _RootPathMiddleware:
    """Routes ``POST /v1/outcomes`` to ``"/"``. FastAPI would redirect it to the path with a slash."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] in ("", scope.get("root_path")):
            scope = {**scope, "path": f"{scope.get('root_path', '')}/"}
        await self._app(scope, receive, send)


class _BodyLimitMiddleware:
    """Rejects a body above ``MAX_BODY_BYTES`` before all of it is in memory."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        read = 0

        async def receive_some() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > MAX_BODY_BYTES:
                raise HTTPException(413, f"the body has over {MAX_BODY_BYTES} bytes; send fewer outcomes per request")
            return message

        await self._app(scope, receive_some, send)
