"""The HTTP endpoint for Alertmanager's webhook (version 4), which delivers a firing alert faster than a poll.

A request needs the bearer token. It gets 200 only once its alerts are stored. The controller is woken as soon as they
are known: a rollback does not wait for the store. A request without the token or with too long a body is rejected
before its body is read. A body is parsed while it arrives, and alerts that no rollout is concerned with are dropped one
by one, so that a delivery with any number of other alerts is no reason to miss one.
"""

from __future__ import annotations

import hmac
import logging
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
from reelway.platform.listen_address import create_listener, resolve_host, url_host
from reelway.platform.request_body import BodyLimit, RequestBodyError, stream_body
from reelway.platform.rollout.alert_stream import WebhookStream
from reelway.platform.rollout.alerts import KnownAlert, Relevance
from reelway.platform.rollout.control.controller_metrics import ControllerMetrics
from reelway.platform.supervised_thread import SupervisedThread
from reelway.platform.tls import ServerCertificate

log = logging.getLogger(__name__)

ALERTS_PATH: Final = "/api/v1/alerts"
BODY_LIMIT_BYTES: Final = 64 << 20
BODY_TIMEOUT_S: Final = 30.0
_BODY_LIMIT: Final = BodyLimit(BODY_LIMIT_BYTES, "send fewer alerts per group", BODY_TIMEOUT_S)
_STARTUP_TIMEOUT_S: Final = 10.0
_NO_TOKEN: Final = "missing or wrong bearer token; send the one in keys/webhook.token of the run"


class AlertReceiver(Protocol):
    """Receives alerts: an ``AlertRegistry``, or several behind one webhook."""

    def relevance(self) -> Relevance:
        """Returns what selects the alerts to deliver. Raises ReelwayError if it is unknown."""
        ...

    def deliver(self, news: Iterable[KnownAlert], /) -> bool:
        """Stores alerts and returns whether any of them changed.

        Raises ReelwayError if they cannot be stored; they may be acted upon all the same.
        """
        ...


def webhook_application(
    receiver: AlertReceiver, on_change: Callable[[], object], token: str, metrics: ControllerMetrics
) -> Starlette:
    """Serves ``POST /api/v1/alerts`` (bearer ``token``), ``GET /healthz`` and ``GET /metrics``.

    Args:
        on_change: called after every delivery that changed the known alerts or could not be stored.
    """

    async def alerts(request: Request) -> Response:
        if not _has_token(request, token):
            return _answer(401, "unauthorized", _NO_TOKEN)
        try:
            stream = WebhookStream(await run_in_threadpool(receiver.relevance))
            async for piece in stream_body(request.scope, request.receive, _BODY_LIMIT):
                await run_in_threadpool(stream.feed, piece)
            news = stream.close()
            changed = await run_in_threadpool(receiver.deliver, news)
        except RequestBodyError as error:
            return _answer(error.status, error.kind, str(error))
        except DataError as error:
            return _answer(400, "malformed", str(error))
        except ReelwayError as error:  # Alertmanager retries after a 5xx
            on_change()
            log.error("alerts not stored: %s", error)
            return _answer(503, "not_stored", f"cannot store the alerts: {error}")
        relevant = sum(not alert.is_omission for alert in news)
        if changed:
            on_change()
            log.info("alerts delivered: %d, relevant: %d", stream.alerts, relevant)
        metrics.webhooks.labels("stored" if changed else "known").inc()
        return JSONResponse({"alerts": stream.alerts, "relevant": relevant, "changed": changed})

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
def serve_in_thread(
    application: Starlette, host: str, port: int, certificate: ServerCertificate | None = None
) -> Iterator[str]:
    """Serves an application in a thread of this process. Yields its URL; ``port`` 0 chooses a free one.

    Args:
        host: address to listen at; ``*`` for all interfaces, IPv4 and IPv6.
        certificate: serves HTTPS alone; by default HTTP.

    Raises:
        ConfigError: if the process cannot listen at the address, or the certificate cannot be read.
    """
    tls = certificate.context("webhook", _report_certificate) if certificate else None
    try:
        listening = create_listener(host, port)
    except OSError as error:
        raise ConfigError(f"cannot listen at {host} port {port}: {error.strerror or error}; choose another") from error
    with listening:
        config = uvicorn.Config(
            application, log_config=None, log_level="warning", access_log=False, lifespan="off", timeout_keep_alive=30,
            timeout_graceful_shutdown=2,
        )  # fmt: skip
        config.load()
        config.ssl = tls
        server = uvicorn.Server(config)
        thread = SupervisedThread(server.run, kwargs={"sockets": [listening]}, name="webhook", daemon=True)
        thread.start()
        try:
            scheme = "https" if tls else "http"
            yield f"{scheme}://{url_host(resolve_host(host))}:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(_STARTUP_TIMEOUT_S)


def _report_certificate(error: ConfigError) -> None:
    log.error("certificate not renewed: %s", error)


def _has_token(request: Request, token: str) -> bool:
    kind, _, credentials = request.headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(credentials.strip().encode(), token.encode())
    return right and kind.lower() == "bearer"
