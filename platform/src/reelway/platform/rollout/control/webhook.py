"""Why: Alertmanager tells us rather than being asked, since a second counts; this is the door it knocks at.

Takes Alertmanager's webhook (version 4) from whoever has the token, answers 200 only when the alerts are stored, and
wakes the controller. It never acts by itself, and reads no more of a request than it has to: who has no token, or sends
too much, is turned away before the body is read.
"""

from __future__ import annotations

import hmac
import logging
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from reelway.platform.errors import ConfigError, DataError, ReelwayError
from reelway.platform.rollout.alerts import KnownAlert, known_alerts, parse_webhook
from reelway.platform.rollout.control.controller_metrics import ControllerMetrics

log = logging.getLogger(__name__)

ALERTS_PATH: Final = "/api/v1/alerts"
BODY_LIMIT_BYTES: Final = 1 << 20
_STARTED_S: Final = 10.0


class _RefusedError(Exception):
    """An answer other than 200. ``outcome`` is the metric's label."""

    def __init__(self, status: int, outcome: str, text: str) -> None:
        super().__init__(text)
        self.status, self.outcome, self.text = status, outcome, text


class TakesAlerts(Protocol):
    """Who is told: an ``AlertBook``, or several behind one door."""

    def deliver(self, news: Iterable[KnownAlert], /) -> bool:
        """Whether it changed anything; stored when this returns. Raises ReelwayError: it is not."""
        ...


def webhook_application(
    book: TakesAlerts, wake: Callable[[], object], token: str, metrics: ControllerMetrics
) -> Starlette:
    """``POST /api/v1/alerts`` (bearer ``token``), ``GET /healthz`` and ``GET /metrics``.

    Args:
        wake: called after every delivery that changed the book.
    """

    async def alerts(request: Request) -> Response:
        try:
            _check_token(request, token)
            payload = parse_webhook(await _body(request))
            news = known_alerts(payload)
            changed = await run_in_threadpool(book.deliver, news)
        except _RefusedError as refused:
            return _answer(refused.status, refused.outcome, refused.text)
        except DataError as error:
            return _answer(400, "malformed", str(error))
        except ReelwayError as error:  # the sender tries again after a 5xx
            log.error("alerts could not be stored: %s", error)
            return _answer(503, "not_stored", f"the alerts could not be stored: {error}")
        if changed:
            wake()
            log.info("alerts delivered: %d, %d name a release", len(payload.alerts), len(news))
        metrics.webhooks.labels("stored" if changed else "known").inc()
        return JSONResponse({"alerts": len(payload.alerts), "with_release": len(news), "changed": changed})

    def _answer(status: int, outcome: str, text: str) -> Response:
        metrics.webhooks.labels(outcome).inc()
        headers = {"Connection": "close"}  # what is left of the body is not waited for
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse({"error": text}, status, headers)

    async def healthz(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics_text(_: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return Starlette(
        routes=[
            Route(ALERTS_PATH, alerts, methods=["POST"]),
            Route("/healthz", healthz, methods=["GET"]),
            Route("/metrics", metrics_text, methods=["GET"]),
        ]
    )


@contextmanager
def serving(application: Starlette, host: str, port: int) -> Iterator[str]:
    """Serve an application in a thread of this process. Yields its URL; ``port`` 0 chooses a free one.

    Raises:
        ConfigError: the address cannot be listened at.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen at {host} port {port}: {error.strerror or error}; give another"
            ) from error
        config = uvicorn.Config(
            application, log_config=None, log_level="warning", access_log=False, lifespan="off", timeout_keep_alive=30,
            timeout_graceful_shutdown=2,
        )  # fmt: skip
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="webhook", daemon=True)
        listening.listen(128)
        thread.start()
        try:
            shown = f"[{host}]" if family is socket.AF_INET6 else host
            yield f"http://{shown}:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(_STARTED_S)


def _check_token(request: Request, token: str) -> None:
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(given.strip().encode(), token.encode())
    if kind.lower() != "bearer" or not right:
        raise _RefusedError(401, "unauthorized", "no or a wrong bearer token; it is in keys/webhook.token of the run")


async def _body(request: Request) -> bytes:
    """The body, as far as it is within the limit: one that says that it is longer is not read at all."""
    too_long = _RefusedError(413, "too_long", f"the body is longer than {BODY_LIMIT_BYTES} bytes; group alerts in less")
    said = request.headers.get("content-length", "")
    if said.isdigit() and int(said) > BODY_LIMIT_BYTES:
        raise too_long
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > BODY_LIMIT_BYTES:
                raise too_long
    except ClientDisconnect:
        raise _RefusedError(400, "malformed", "the body ended early") from None
    return bytes(body)
