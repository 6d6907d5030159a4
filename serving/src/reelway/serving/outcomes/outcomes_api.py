"""``GET /v1/outcomes/metrics``: the sums of exposures and outcomes, for Prometheus or a direct scrape.

Behind Ray Serve's ``route_prefix`` a request has the whole path as its ``root_path`` (ASGI), so every path is answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST

from reelway.serving.outcomes.collector import OutcomeCollector


def build_outcomes_api(collector: OutcomeCollector, on_close: Callable[[], None] = lambda: None) -> FastAPI:
    """Builds the ASGI application. The collector follows the log while the application runs.

    Args:
        on_close: called when the application ends, after the collector was closed.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        collector.start()
        yield
        await asyncio.to_thread(collector.close)
        await asyncio.to_thread(on_close)

    api = FastAPI(title="Reelway outcome sums", version="1", lifespan=lifespan, openapi_url=None)

    @api.get("/{path:path}", response_class=Response)
    async def metrics(path: str) -> Response:  # noqa: ARG001
        """The rollouts' sufficient statistics."""
        return Response(await asyncio.to_thread(collector.metrics_text), media_type=CONTENT_TYPE_LATEST)

    return api
