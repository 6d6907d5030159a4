"""Malformed and hostile HTTP requests that every endpoint for JSON answers alike, and a client that sends raw bytes."""

from __future__ import annotations

import gzip
import json
import logging
import socket
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import pytest

MALFORMED = -1
"""In place of a status: the endpoint's own status for a body that is not what it expects."""
NOT_ANSWERED = 0
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Endpoint:
    """An endpoint under test.

    Args:
        valid: a request body that the endpoint accepts, a JSON object.
        malformed: status for a body that is not what the endpoint expects.
        counted: number of rejected requests in the endpoint's metrics.
        check_body: raises if the body of an error has another shape than the documented one.
    """

    port: int
    path: str
    valid: bytes
    malformed: int
    counted: Callable[[], float]
    check_body: Callable[[bytes], object]
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class HostileRequest:
    """A request and the expected status.

    Args:
        body: the body, or what makes it of an endpoint's valid body.
        headers: headers in addition to, or instead of, those of a JSON request. None removes a header.
        path: another path than the endpoint's; ``{path}`` is replaced by it.
        raw: the whole request, for what is not HTTP.
        pause_s: time between the first and the second half of the body.
        by_server: the HTTP server rejects it before the application, as text and uncounted.
    """

    name: str
    status: int = MALFORMED
    body: bytes | Callable[[bytes], bytes] = b""
    headers: Mapping[str, str | None] = field(default_factory=dict)
    method: str = "POST"
    path: str = "{path}"
    raw: bytes | None = None
    half_closed: bool = False
    pause_s: float = 0.0
    by_server: bool = False


def inject(value: bytes) -> Callable[[bytes], bytes]:
    """Returns what adds a member with this value to a JSON object."""
    return lambda valid: valid[:-1] + b', "x": ' + value + b"}"


def chunked(data: bytes, size: int = 1 << 14) -> bytes:
    """Encodes a body with ``Transfer-Encoding: chunked``."""
    parts = (data[start : start + size] for start in range(0, len(data), size))
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


NOT_JSON = [
    HostileRequest("an empty body"),
    HostileRequest("blanks", body=b"   \n"),
    HostileRequest("one brace", body=b"{"),
    HostileRequest("text", body=b"nonsense"),
    HostileRequest("a list", body=b"[]"),
    HostileRequest("null", body=b"null"),
    HostileRequest("a string", body=b'"text"'),
    HostileRequest("a number", body=b"1"),
    HostileRequest("true", body=b"true"),
    HostileRequest("a body that is cut off", body=lambda valid: valid[:-2]),
    HostileRequest("invalid UTF-8", body=b"\xff\xfe"),
    HostileRequest("invalid UTF-8 in a string", body=inject(b'"\xc3\x28"')),
    HostileRequest("an encoded surrogate", body=inject(b'"\xed\xa0\x80"')),
    HostileRequest("an overlong character", body=inject(b'"\xc0\xaf"')),
    HostileRequest("UTF-16", body=lambda valid: valid.decode().encode("utf-16")),
    HostileRequest("a byte order mark", body=lambda valid: b"\xef\xbb\xbf" + valid),
    HostileRequest("a lone high surrogate", body=inject(b'"\\ud800"')),
    HostileRequest("a lone low surrogate", body=inject(b'"\\udfff"')),
    HostileRequest("a lone surrogate in a key", body=inject(b'{"\\ud800": 1}')),
    HostileRequest("an integer of 5,000 digits", body=inject(b"9" * 5_000)),
    HostileRequest("NaN", body=inject(b"NaN")),
    HostileRequest("Infinity", body=inject(b"Infinity")),
    HostileRequest("minus Infinity", body=inject(b"-Infinity")),
    HostileRequest("5,000 nested lists", body=inject(b"[" * 5_000 + b"]" * 5_000)),
    HostileRequest("2,000 nested objects", body=inject(b'{"a":' * 2_000 + b"1" + b"}" * 2_000)),
    HostileRequest("10,000 open lists", body=b"[" * 10_000),
    HostileRequest("a control character", body=inject(b'"\x01"')),
    HostileRequest("a raw zero byte", body=lambda valid: valid + b"\0"),
    HostileRequest("an unknown escape", body=inject(b'"\\x41"')),
    HostileRequest("text after the object", body=lambda valid: valid + b"x"),
    HostileRequest("two objects", body=lambda valid: valid + valid),
    HostileRequest("single quotes", body=lambda valid: valid.replace(b'"', b"'")),
    HostileRequest("a comment", body=lambda valid: b"/* a */" + valid),
    HostileRequest("a comma at the end", body=lambda valid: valid[:-1] + b",}"),
    HostileRequest("a hexadecimal number", body=inject(b"0x10")),
    HostileRequest("a leading zero", body=inject(b"01")),
    HostileRequest("a plus sign", body=inject(b"+1")),
    HostileRequest("a key without quotes", body=inject(b"{a: 1}")),
    HostileRequest("gzip without its header", body=gzip.compress),
]
BODIES = [
    HostileRequest("gzip", 415, gzip.compress, {"Content-Encoding": "gzip"}),
    HostileRequest("deflate", 415, zlib.compress, {"Content-Encoding": "deflate"}),
    HostileRequest("an unknown encoding", 415, b"{}", {"Content-Encoding": "\xe9" * 500}),
    HostileRequest("a gzip bomb", 415, gzip.compress(b" " * (1 << 22)), {"Content-Encoding": "GZIP, gzip"}),
    HostileRequest("a declared terabyte", 413, b"{", {"Content-Length": str(1 << 40)}),
    HostileRequest("a body that stalls", 408, b'{"a', {"Content-Length": "100"}),
    HostileRequest("a body that comes late", 408, lambda valid: valid, pause_s=3.0),
    HostileRequest("a body that ends early", NOT_ANSWERED, b'{"a', {"Content-Length": "100"}, half_closed=True),
    HostileRequest("a PUT", 405, b"{}", method="PUT"),
    HostileRequest("a DELETE", 405, b"", method="DELETE"),
    HostileRequest("an unknown method", 405, b"{}", method="PROPFIND"),
    HostileRequest("an unknown path", 404, b"{}", path="/v1/nothing"),
    HostileRequest("a slash at the end", 404, b"{}", path="{path}/"),
    HostileRequest("two slashes", 404, b"{}", path="/{path}"),
    HostileRequest("a path to another folder", 404, b"", path="/../../etc/passwd", method="GET"),
    HostileRequest("a zero byte in the path", 404, b"", path="{path}%00", method="GET"),
    HostileRequest("invalid UTF-8 in the path", 404, b"", path="/%ff%fe", method="GET"),
    HostileRequest("a path of 8,000 characters", 404, b"", path="/" + "a" * 8_000, method="GET"),
]
NOT_HTTP = [
    HostileRequest("not HTTP", 400, raw=b"\x16\x03\x01\x02\x00\x01\r\n\r\n", by_server=True),
    HostileRequest("a length that is no number", 400, b"{}", {"Content-Length": "ten"}, by_server=True),
    HostileRequest("a negative length", 400, b"{}", {"Content-Length": "-1"}, by_server=True),
    HostileRequest(
        "two lengths", 400, b"{}", {"content-length": "3", "Content-Length": "2"}, by_server=True
    ),
    HostileRequest(
        "a length and chunks", 400, b"{}", {"Content-Length": "2", "Transfer-Encoding": "chunked"}, by_server=True
    ),
    HostileRequest("a space in a header's name", 400, b"{}", {"Con tent": "1"}, by_server=True),
]  # fmt: skip
REQUESTS = [*NOT_JSON, *BODIES, *NOT_HTTP]


def too_long(max_bytes: int) -> list[HostileRequest]:
    """Returns requests with bodies above the limit."""
    blanks = b" " * (max_bytes + 1)
    return [
        HostileRequest("a body one byte too long", 413, blanks),
        HostileRequest("chunks that are too long", 413, chunked(blanks), {"Transfer-Encoding": "chunked"}),
    ]


def check_hostile(endpoint: Endpoint, request: HostileRequest, caplog: pytest.LogCaptureFixture) -> bytes:
    """Sends a request and checks the response, the metric and the log. Returns the body of the response."""
    before = endpoint.counted()
    status, body = send(endpoint, request)
    expected = endpoint.malformed if request.status == MALFORMED else request.status
    assert status == expected, (request.name, body[:300])
    if request.by_server:
        assert body == b"Invalid HTTP request received."
    else:
        if status != NOT_ANSWERED:
            endpoint.check_body(body)
            assert len(body) < 16_384
        wait_until(lambda: endpoint.counted() == before + 1)
    assert [
        record.getMessage() for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR
    ] == []
    return body


def assert_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    """Checks that no error and no traceback was logged."""
    failures = [one.getMessage() for one in caplog.records if one.exc_info or one.levelno >= logging.ERROR]
    assert failures == []


def send(endpoint: Endpoint, request: HostileRequest) -> tuple[int, bytes]:
    """Sends a request on a new connection. Returns the status, 0 without a response, and the body."""
    head, body = _encode(endpoint, request)
    with socket.create_connection(("127.0.0.1", endpoint.port), timeout=20) as connection:
        half = len(body) // 2 if request.pause_s else len(body)
        with suppress(BrokenPipeError, ConnectionResetError):  # the server has answered and closed the connection
            connection.sendall(head + body[:half])
            if request.half_closed:
                connection.shutdown(socket.SHUT_WR)
            if request.pause_s:
                time.sleep(request.pause_s)
                connection.sendall(body[half:])
        response = b"".join(_received(connection))
    head, _, body = response.partition(b"\r\n\r\n")
    return (int(head.split()[1]) if head else NOT_ANSWERED), body


def wait_until(condition: Callable[[], bool]) -> None:
    """Waits until a condition holds, for at most 5 seconds."""
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _encode(endpoint: Endpoint, request: HostileRequest) -> tuple[bytes, bytes]:
    if request.raw is not None:
        return request.raw, b""
    body = request.body if isinstance(request.body, bytes) else request.body(endpoint.valid)
    headers: dict[str, str | None] = {"Host": "a", "Connection": "close", **JSON, **endpoint.headers}
    if "Transfer-Encoding" not in request.headers:
        headers["Content-Length"] = str(len(body))
    lines = [f"{name}: {value}\r\n" for name, value in (headers | dict(request.headers)).items() if value is not None]
    path = request.path.format(path=endpoint.path)
    return f"{request.method} {path} HTTP/1.1\r\n{''.join(lines)}\r\n".encode("latin-1"), body


def _received(connection: socket.socket) -> Iterator[bytes]:
    try:
        while data := connection.recv(1 << 16):
            yield data
    except ConnectionResetError:  # the server closed the connection while unread data was on its way
        return


def error_only(body: bytes) -> None:
    """Checks the body ``{"error": "..."}``."""
    value = json.loads(body)
    assert list(value) == ["error"]
    assert isinstance(value["error"], str)
    assert value["error"]
