"""``GET /v1/outcomes/metrics``: the sums of exposures and outcomes, for Prometheus or a direct scrape.

Only ``internal_api`` receives them. For everybody else the path does not exist.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from reelway.platform.contracts.api import ErrorResponse
from reelway.serving.access import InternalCredential
from reelway.serving.access.middleware import InternalOnlyMiddleware
from reelway.serving.http_api import error_response, not_found
from reelway.serving.outcomes.collector import OutcomeCollector

_PATH: Final = "/metrics"


def build_outcomes_api(
    collector: OutcomeCollector, credential: InternalCredential, on_close: Callable[[], None] = lambda: None
) -> FastAPI:
    """Builds the ASGI application. The collector follows the log while the application runs.

    Args:
        credential: how the application recognises requests of the service itself.
        on_close: called when the application ends, after the collector was closed.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        collector.start()
        yield
        await asyncio.to_thread(collector.close)
        await asyncio.to_thread(on_close)

    api = FastAPI(title="Reelway outcome sums", version="1", lifespan=lifespan, openapi_url=None)
    api.add_middleware(_OnePath)
    api.add_middleware(InternalOnlyMiddleware, credential=credential, hide=not_found)

    @api.get(_PATH, response_class=Response)
    async def metrics() -> Response:
        """The rollouts' sufficient statistics."""
        return Response(await asyncio.to_thread(collector.metrics_text), media_type=CONTENT_TYPE_LATEST)

    @api.exception_handler(HTTPException)
    async def reject(_: Request, error: HTTPException) -> Response:
        return error_response(error.status_code, ErrorResponse(error=str(error.detail)), error.headers)

    return api


class _OnePath:
    """Routes every request to ``_PATH``.

    Behind Ray Serve's ``route_prefix`` a request has its whole path as ``root_path`` (ASGI). Nothing remains to route
    by, and Starlette would redirect to a path with a slash, which a scrape does not follow.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "path": _PATH, "raw_path": _PATH.encode(), "root_path": ""}
        await self._app(scope, receive, send)
