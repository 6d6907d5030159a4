"""Why: a kubelet asks whether the operator lives, Prometheus for its numbers, Alertmanager delivers: one door for all.

``/healthz`` answers 503 when only a restart can help. ``/readyz`` answers 200 also while another process is the active
one: a rolling update would wait for ever otherwise. Alerts that come to one that is not active are answered 503, so
that they are delivered again, to the other.
"""

from __future__ import annotations

from typing import Protocol

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from reelway.platform.rollout.control.controller_metrics import ControllerMetrics
from reelway.platform.rollout.control.webhook import TakesAlerts, webhook_application


class Watched(TakesAlerts, Protocol):
    """What stands behind the door."""

    @property
    def active(self) -> bool:
        """Whether this process holds the lease."""
        ...

    def problem(self) -> str:
        """Why only a restart can help; empty while nothing is wrong."""
        ...

    def wake(self) -> None:
        """Look again now."""
        ...


def operator_application(operator: Watched, token: str, metrics: ControllerMetrics) -> Starlette:
    """``POST /api/v1/alerts`` (bearer ``token``), ``GET /healthz``, ``/readyz`` and ``/metrics``."""

    async def healthz(_: Request) -> Response:
        problem = operator.problem()
        return JSONResponse({"status": problem or "ok"}, 503 if problem else 200)

    async def readyz(_: Request) -> Response:
        return JSONResponse({"status": "active" if operator.active else "waiting for the lease"})

    alerts = webhook_application(operator, operator.wake, token, metrics)
    return Starlette(routes=[Route("/healthz", healthz), Route("/readyz", readyz), Mount("/", alerts)])
