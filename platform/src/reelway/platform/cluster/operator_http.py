"""The operator's HTTP endpoints: alert webhook, /metrics, /healthz and /readyz.

``/healthz`` answers 503 if only a restart can help. ``/readyz`` answers 200 on a standby replica as well; otherwise a
rolling update would never finish. A standby answers alerts with 503, so that Alertmanager sends them again, to the
active replica.
"""

from __future__ import annotations

from typing import Protocol

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from reelway.platform.rollout.control.controller_metrics import ControllerMetrics
from reelway.platform.rollout.control.webhook import AlertReceiver, webhook_application


class OperatorHandle(AlertReceiver, Protocol):
    """What the HTTP application needs of the operator."""

    @property
    def active(self) -> bool:
        """Whether this process holds the Lease."""
        ...

    def unhealthy_reason(self) -> str:
        """Returns why only a restart can help; empty if the operator is healthy."""
        ...

    def wake(self) -> None:
        """Starts a reconcile now."""
        ...


def operator_application(operator: OperatorHandle, token: str, metrics: ControllerMetrics) -> Starlette:
    """Serves ``POST /api/v1/alerts`` (bearer ``token``), ``GET /healthz``, ``/readyz`` and ``/metrics``."""

    async def healthz(_: Request) -> Response:
        problem = operator.unhealthy_reason()
        return JSONResponse({"status": problem or "ok"}, 503 if problem else 200)

    async def readyz(_: Request) -> Response:
        return JSONResponse({"status": "active" if operator.active else "waiting for the lease"})

    alerts = webhook_application(operator, operator.wake, token, metrics)
    return Starlette(routes=[Route("/healthz", healthz), Route("/readyz", readyz), Mount("/", alerts)])
