"""The internal API: what operators, rollouts and Prometheus read, at a port that is not published.

Ray Serve's proxy has one port for all paths of all applications. The applications therefore answer these paths only to
the service itself, and this server forwards them::

    operator, controller, Prometheus ─► internal port ─ internal credential ─► Ray Serve's proxy ─► router, outcomes

The paths are those of ``http_api`` and ``outcomes.outcomes_api``. Nothing else is forwarded, and only GET requests are.
"""

from __future__ import annotations

from typing import Final

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from reelway.platform.contracts.api import ErrorResponse
from reelway.serving.access import InternalCredential
from reelway.serving.http_api import CURRENT_RELEASES, HEALTH, METRICS, error_response

OUTCOME_SUMS: Final = "/v1/outcomes/metrics"
FORWARDED: Final = (CURRENT_RELEASES, METRICS, OUTCOME_SUMS, HEALTH, "/docs", "/openapi.json")
TIMEOUT_S: Final = 10.0


def build_internal_api(service_url: str, credential: InternalCredential) -> Starlette:
    """Returns the ASGI application.

    Args:
        service_url: address of Ray Serve's proxy.
    """
    client = httpx.AsyncClient(
        base_url=service_url,
        headers=credential.headers,
        timeout=TIMEOUT_S,
        limits=httpx.Limits(max_keepalive_connections=0),  # none stays open when the server ends
        trust_env=False,
    )

    async def forward(request: Request) -> Response:
        try:
            answer = await client.get(request.url.path)
        except httpx.HTTPError as error:
            problem = (
                f"{service_url}: no answer: {str(error) or type(error).__name__}; check that the service is running"
            )
            return error_response(502, ErrorResponse(error=problem))
        return Response(answer.content, answer.status_code, media_type=answer.headers.get("content-type"))

    api = Starlette(routes=[Route(path, forward, methods=["GET"]) for path in FORWARDED])
    api.router.redirect_slashes = False
    return api
