"""The HTTP endpoint for Alertmanager's webhook (version 4), which delivers a firing alert faster than a poll.

A request needs the bearer token. It gets 200 only once its alerts are stored, and then wakes the controller. A request
without the token or with too long a body is rejected before its body is read.
"""

from __future__ import annotations

import hmac
import logging
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from reelway.platform.errors import ConfigError, DataError, ReelwayError
from reelway.platform.request_body import BodyLimit, RequestBodyError, read_body
from reelway.platform.rollout.alerts import KnownAlert, parse_alerts, parse_webhook
from reelway.platform.rollout.control.controller_metrics import ControllerMetrics
from reelway.platform.supervised_thread import SupervisedThread

log = logging.getLogger(__name__)

ALERTS_PATH: Final = "/api/v1/alerts"
BODY_LIMIT_BYTES: Final = 1 << 20
_BODY_LIMIT: Final = BodyLimit(BODY_LIMIT_BYTES, "send fewer alerts per group")
_STARTUP_TIMEOUT_S: Final = 10.0
_NO_TOKEN: Final = "missing or wrong bearer token; send the one in keys/webhook.token of the run"


class AlertReceiver(Protocol):
    """Receives alerts: an ``AlertRegistry``, or several behind one webhook."""

    def deliver(self, news: Iterable[KnownAlert], /) -> bool:
        """Stores alerts and returns whether any of them changed. Raises ReelwayError if they cannot be stored."""
        ...


def webhook_application(
    receiver: AlertReceiver, on_change: Callable[[], object], token: str, metrics: ControllerMetrics
) -> Starlette:
    """Serves ``POST /api/v1/alerts`` (bearer ``token``), ``GET /healthz`` and ``GET /metrics``.

    Args:
        on_change: called after every delivery that changed the known alerts.
    """

    async def alerts(request: Request) -> Response:
        if not _has_token(request, token):
            return _answer(401, "unauthorized", _NO_TOKEN)
        try:
            payload = parse_webhook(await read_body(request.scope, request.receive, _BODY_LIMIT))
            news = parse_alerts(payload)
            changed = await run_in_threadpool(receiver.deliver, news)
        except RequestBodyError as error:
            return _answer(error.status, error.kind, str(error))
        except DataError as error:
            return _answer(400, "malformed", str(error))
        except ReelwayError as error:  # Alertmanager retries after a 5xx
            log.error("alerts not stored: %s", error)
            return _answer(503, "not_stored", f"cannot store the alerts: {error}")
        if changed:
            on_change()
            log.info("alerts delivered: %d, with a release label: %d", len(payload.alerts), len(news))
        metrics.webhooks.labels("stored" if changed else "known").inc()
        return JSONResponse({"alerts": len(payload.alerts), "with_release": len(news), "changed": changed})

    def _answer(status: int, outcome: str, text: str) -> Response:
        metrics.webhooks.labels(outcome).inc()
        headers = {"Connection": "close"}  # the rest of the body is not read
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse({"error": text}, status, headers)

    async def no_such_route(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _answer(error.status_code, "not_found", error.detail)

    async def healthz(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics_text(_: Request) -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    application = Starlette(
        routes=[
            Route(ALERTS_PATH, alerts, methods=["POST"]),
            Route("/healthz", healthz, methods=["GET"]),
            Route("/metrics", metrics_text, methods=["GET"]),
        ],
        exception_handlers={HTTPException: no_such_route},
    )
    application.router.redirect_slashes = False  # a redirect would repeat the Host header of the request
    return application


@contextmanager
def serve_in_thread(application: Starlette, host: str, port: int) -> Iterator[str]:
    """Serves an application in a thread of this process. Yields its URL; ``port`` 0 chooses a free one.

    Raises:
        ConfigError: if the process cannot listen at the address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen at {host} port {port}: {error.strerror or error}; choose another"
            ) from error
        config = uvicorn.Config(
            application, log_config=None, log_level="warning", access_log=False, lifespan="off", timeout_keep_alive=30,
            timeout_graceful_shutdown=2,
        )  # fmt: skip
        server = uvicorn.Server(config)
        thread = SupervisedThread(server.run, kwargs={"sockets": [listening]}, name="webhook", daemon=True)
        listening.listen(128)
        thread.start()
        try:
            shown = f"[{host}]" if family is socket.AF_INET6 else host
            yield f"http://{shown}:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(_STARTUP_TIMEOUT_S)


def _has_token(request: Request, token: str) -> bool:
    kind, _, credentials = request.headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(credentials.strip().encode(), token.encode())
    return right and kind.lower() == "bearer"
