"""KServe's REST server with limits on a request's body, the release as model version, and errors as JSON.

``kserve.protocol.rest.server.RESTServer`` is extended in its own hooks, where it is unfit:

- It reads bodies of any length for any time. ``RequestFilter`` limits both.
- It answers 501 to every path with a version. ``RequestFilter`` checks the version and removes it from the path.
- It answers invalid JSON with 422 and a list. The protocol's answer is 400 and ``{"error": ...}``.
- Uvicorn stops at SIGTERM. Here ``RankServer`` decides when it stops, because draining comes first.
- It creates the socket itself, so that neither the address nor a free port can be chosen.
"""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Final

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from kserve.protocol.rest.server import RESTServer
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reelway.platform import request_body
from reelway.platform.errors import ServingError
from reelway.platform.listen_address import create_listener
from reelway.serving.open_inference.data_plane import LENGTH_HEADER, RankerDataPlane, ReadOnlyRepository
from reelway.serving.open_inference.errors import (
    InferenceRequestError,
    RequestTimeoutError,
    RequestTooLargeError,
    UnsupportedEncodingError,
)
from reelway.serving.open_inference.ranker_service import RankerService

_LAST_REQUESTS_S: Final = 1.5
"""Longest wait for requests on open connections after the server stopped listening."""
_LAST_REQUESTS_POLL_S: Final = 0.05
_MODEL_PATH: Final = re.compile(r"(/v2/models/([^/]+))(?:/versions/([^/]+))?(/ready|/infer|)")


_BODY_ERRORS: Final[Mapping[type[request_body.RequestBodyError], type[InferenceRequestError]]] = {
    request_body.BodyTooLongError: RequestTooLargeError,
    request_body.BodyLateError: RequestTimeoutError,
    request_body.BodyEncodedError: UnsupportedEncodingError,
}
"""The error of the protocol for a body that was not read."""


class RequestFilter:
    """ASGI middleware that rejects a request before KServe reads it, and closes connections while draining.

    A response while draining is the last of its connection and has the header ``Connection: close``. Otherwise a client
    could send its next request on an idle connection at the moment in which the server closes it.

    Args:
        max_bytes: largest body.
        body_timeout_s: time in which the whole body must arrive.
    """

    def __init__(self, app: ASGIApp, service: RankerService, max_bytes: int, body_timeout_s: float) -> None:
        self._app = app
        self._service = service
        self._limit = request_body.BodyLimit(max_bytes, "send fewer candidates per request", body_timeout_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start" and not self._service.ready:
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        try:
            if matched := _MODEL_PATH.fullmatch(scope["path"]):
                self._service.check_model(matched[2], matched[3] or "")
                scope = {**scope, "path": matched[1] + matched[4]}
            if scope["method"] == "POST":
                scope, receive = await self._with_body(scope, receive)
        except InferenceRequestError as error:
            self._service.record_refused(error)
            await _error_response(error)(scope, receive, send_last)
            return
        except request_body.BodyCutOffError:
            return
        await self._app(scope, receive, send_last)

    async def _with_body(self, scope: Scope, receive: Receive) -> tuple[Scope, Receive]:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        try:
            body = await request_body.read_body(scope, receive, self._limit)
        except tuple(_BODY_ERRORS) as error:
            raise _BODY_ERRORS[type(error)](str(error)) from error
        # KServe tells JSON from binary by the content type, the protocol by the header with the JSON's length.
        binary = LENGTH_HEADER.encode() in headers
        headers[b"content-type"] = b"application/octet-stream" if binary else b"application/json"
        return {**scope, "headers": list(headers.items())}, request_body.replay_body(body, receive)


class RankerRestServer(RESTServer):
    """See the module. It serves one process's only FastAPI application, ``kserve.model_server.app``."""

    def __init__(
        self,
        listener: socket.socket,
        data_plane: RankerDataPlane,
        repository: ReadOnlyRepository,
        service: RankerService,
        *,
        max_bytes: int,
        body_timeout_s: float,
        grace_period_s: float,
    ) -> None:
        super().__init__(
            "kserve.model_server:app", data_plane, repository, listener.getsockname()[1],
            grace_period=int(grace_period_s), event_loop="asyncio",
        )  # fmt: skip
        self.config.access_log = False
        self._server = _UvicornWithoutSignals(self.config)
        self._listener = listener
        self._service = service
        self._limits = {"max_bytes": max_bytes, "body_timeout_s": body_timeout_s}

    async def start(self) -> None:
        self.create_application()
        await self._server.serve(sockets=[self._listener])

    def stop(self) -> None:
        """Makes ``start`` return after the requests in flight."""
        self._server.should_exit = True

    def _add_middlewares(self, app: FastAPI) -> None:
        super()._add_middlewares(app)
        app.add_middleware(RequestFilter, service=self._service, **self._limits)  # type: ignore[arg-type]

    def _add_exception_handlers(self, app: FastAPI) -> None:
        super()._add_exception_handlers(app)

        @app.exception_handler(InferenceRequestError)
        async def reject(_: Request, error: InferenceRequestError) -> JSONResponse:
            return _error_response(error)

        @app.exception_handler(RequestValidationError)
        async def reject_invalid(_: Request, invalid: RequestValidationError) -> JSONResponse:
            first = invalid.errors()[0]
            field = ".".join(str(part) for part in first["loc"] if part not in ("InferenceRequest", "bytes"))
            error = InferenceRequestError(f"the request is malformed: {field}: {first['msg']}")
            self._service.record_refused(error)
            return _error_response(error)

        @app.exception_handler(HTTPException)
        async def reject_otherwise(_: Request, error: HTTPException) -> JSONResponse:
            return JSONResponse({"error": error.detail}, status_code=error.status_code, headers=error.headers)


class _UvicornWithoutSignals(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops listening first, and answers requests that are on their way on open connections.

        Each response is the last of its connection now, so that open connections become fewer by themselves.
        """
        await self._close_listeners(sockets or [])
        deadline = time.monotonic() + _LAST_REQUESTS_S
        await asyncio.sleep(_LAST_REQUESTS_POLL_S)
        while self.server_state.connections and time.monotonic() < deadline:
            await asyncio.sleep(_LAST_REQUESTS_POLL_S)
        await super().shutdown(sockets)  # closes idle connections at once

    async def _close_listeners(self, listeners: list[socket.socket]) -> None:
        """Closes the listeners, and serves the connections that the kernel has accepted for them before.

        The kernel resets connections that wait in the queue of a listener that is closed. Their clients have sent a
        request by then. So the queue is emptied right before, without a pass of the loop in between.
        """
        loop = asyncio.get_running_loop()
        for listener in listeners:
            loop.remove_reader(listener)
        for _ in range(2):  # connections that the loop has accepted get their protocol, which fails after `close`
            await asyncio.sleep(0)
        accepted = list[socket.socket]()
        for listener in listeners:
            with suppress(BlockingIOError):
                while True:
                    accepted.append(listener.accept()[0])
        for server in self.servers:
            server.close()  # closes the listeners, too
        for connection in accepted:
            await loop.connect_accepted_socket(self._create_protocol, connection)

    def _create_protocol(self) -> asyncio.Protocol:
        protocol: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg, assignment]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol


def create_rest_listener(host: str, port: int) -> socket.socket:
    """Returns a listening socket; host ``*`` stands for all interfaces.

    Raises:
        ServingError: if the address is in use or does not exist.
    """
    try:
        listener = create_listener(host, port)
    except OSError as error:
        raise ServingError(f"cannot listen at {host}:{port}: {error}; choose a free port") from error
    # A response is two writes. Without this option the second one waits 40 ms for the acknowledgement of the first.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _error_response(error: InferenceRequestError) -> JSONResponse:
    # The rest of a body that did not arrive could arrive later and be read as the next request.
    incomplete = isinstance(error, RequestTimeoutError | RequestTooLargeError)
    return JSONResponse(
        {"error": str(error)}, status_code=error.http, headers={"connection": "close"} if incomplete else None
    )
