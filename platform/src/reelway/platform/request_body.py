"""Bodies of HTTP requests: reads them within a size and a time, and parses them as strict JSON.

All HTTP servers of Reelway share this module. A body is rejected by the first of these rules that it breaks:

================================  ======  ============================================================
rule                              status  error
================================  ======  ============================================================
no ``Content-Encoding``           415     ``BodyEncodedError``
at most ``max_bytes``             413     ``BodyTooLongError``, before the body is read if it is declared
all of it within ``timeout_s``    408     ``BodyLateError``
all of it before the client ends  400     ``BodyCutOffError``; the client does not receive the response
================================  ======  ============================================================
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from pydantic_core import from_json
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reelway.platform.errors import DataError

BODY_TIMEOUT_S: Final = 2.0
BUFFERED_BYTES: Final = 8 << 10
"""Bodies up to this size are whole when they reach the application: a proxy before it holds them until then."""
MAX_ARRIVING: Final = 50
"""Longer bodies that may arrive at once. Each holds one of the replica's places until it is whole or late."""
_SHOWN_CHARACTERS: Final = 40


@dataclass(frozen=True)
class BodyLimit:
    """Limits of a body.

    Args:
        max_bytes: largest size.
        advice: what a client does about a longer body.
        timeout_s: time in which the whole body must arrive.
    """

    max_bytes: int
    advice: str
    timeout_s: float = BODY_TIMEOUT_S


class RequestBodyError(DataError):
    """The body was not read. ``kind`` is the value of a metric's label."""

    status: ClassVar[int]
    kind: ClassVar[str]

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response. Unread bytes must not be taken for the connection's next request."""
        return {"Connection": "close"}


class BodyTooLongError(RequestBodyError):
    status = 413
    kind = "too_long"


class BodyLateError(RequestBodyError):
    status = 408
    kind = "late"


class BodyEncodedError(RequestBodyError):
    status = 415
    kind = "encoded"


class BodiesWaitingError(RequestBodyError):
    status = 503
    kind = "waiting"

    @property
    def headers(self) -> dict[str, str]:
        return {**super().headers, "Retry-After": "1"}


class BodyCutOffError(RequestBodyError):
    status = 400
    kind = "cut_off"


async def read_body(scope: Scope, receive: Receive, limit: BodyLimit) -> bytes:
    """Returns the whole body.

    Raises:
        RequestBodyError: see the module.
    """
    _check_headers(scope, limit)
    chunks, size, more = list[bytes](), 0, True
    try:
        async with asyncio.timeout(limit.timeout_s):
            while more:
                chunk, more = _piece(await receive(), size, limit)
                chunks.append(chunk)
                size += len(chunk)
    except TimeoutError as error:
        raise _late(size, limit.timeout_s) from error
    return b"".join(chunks)


async def stream_body(scope: Scope, receive: Receive, limit: BodyLimit) -> AsyncIterator[bytes]:
    """Yields the body piece by piece.

    Each piece must arrive within ``BODY_TIMEOUT_S``, and all of them, with the time that the caller spends on them,
    within ``limit.timeout_s``.

    Raises:
        RequestBodyError: see the module.
    """
    _check_headers(scope, limit)
    deadline = asyncio.get_running_loop().time() + limit.timeout_s
    size, more = 0, True
    while more:
        wait_s = min(BODY_TIMEOUT_S, deadline - asyncio.get_running_loop().time())
        try:
            message = await asyncio.wait_for(receive(), wait_s)
        except TimeoutError as error:
            raise _late(size, BODY_TIMEOUT_S if wait_s == BODY_TIMEOUT_S else limit.timeout_s) from error
        chunk, more = _piece(message, size, limit)
        size += len(chunk)
        yield chunk


def _piece(message: Message, size: int, limit: BodyLimit) -> tuple[bytes, bool]:
    """Returns the next piece of a body of which ``size`` bytes were received, and whether more follow."""
    if message["type"] != "http.request":
        raise BodyCutOffError(f"the connection ended after {size} bytes of the body, expected all of it")
    chunk = message.get("body", b"")
    if size + len(chunk) > limit.max_bytes:
        raise _too_long(limit)
    return chunk, message.get("more_body", False)


def _late(size: int, timeout_s: float) -> BodyLateError:
    return BodyLateError(f"{size} bytes of the body arrived in {timeout_s:g} s, expected all of it")


def replay_body(body: bytes, receive: Receive) -> Receive:
    """Returns a ``receive`` that delivers a body that was read, and then what the connection receives."""
    unread = True

    async def receive_body() -> Message:
        nonlocal unread
        if not unread:
            return await receive()
        unread = False
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_body


class BodyLimitMiddleware:
    """ASGI middleware that reads the body of every POST request before the application is called.

    Args:
        limits: limit of each path. The bodies of other paths are left to the application.
        reject: counts a rejected body and returns the response.
    """

    def __init__(
        self, app: ASGIApp, limits: Mapping[str, BodyLimit], reject: Callable[[RequestBodyError], Response]
    ) -> None:
        self._app = app
        self._limits = limits
        self._reject = reject
        self._arriving = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit = self._limits.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if limit is None:
            await self._app(scope, receive, send)
            return
        long = _may_be_longer(scope, BUFFERED_BYTES)
        if long and self._arriving >= MAX_ARRIVING:
            error: RequestBodyError = BodiesWaitingError(f"{self._arriving} long bodies are arriving; try again")
            await self._reject(error)(scope, receive, send)
            return
        self._arriving += long
        try:
            body = await read_body(scope, receive, limit)
        except RequestBodyError as error:
            await self._reject(error)(scope, receive, send)
            return
        finally:
            self._arriving -= long
        await self._app(scope, replay_body(body, receive), send)


def parse_json(text: bytes | str) -> Any:
    """Parses JSON (RFC 8259) of at most 200 levels and of numbers with at most 4,300 digits.

    Raises:
        ValueError: if the text is something else, which includes invalid UTF-8, a lone surrogate, NaN and infinity.
            The message has line and column. A number beyond a float's range is parsed as infinity.
    """
    return from_json(text, allow_inf_nan=False)


def _check_headers(scope: Scope, limit: BodyLimit) -> None:
    for name, value in scope["headers"]:
        if name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            shown = value[:_SHOWN_CHARACTERS].decode("latin-1")
            raise BodyEncodedError(f"the body is encoded as {shown!r}, expected no encoding; send it uncompressed")
        if name == b"content-length" and value.isdigit() and int(value) > limit.max_bytes:
            raise _too_long(limit)


def _may_be_longer(scope: Scope, size: int) -> bool:
    """Returns whether a body has more bytes, or does not declare its size."""
    declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
    return not declared.isdigit() or int(declared) > size


def _too_long(limit: BodyLimit) -> BodyTooLongError:
    return BodyTooLongError(f"the body has more than {limit.max_bytes} bytes; {limit.advice}")
