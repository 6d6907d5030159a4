"""Reading of request bodies: whole bodies within the limit, in whatever pieces they arrive."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import PlainTextResponse, Response
from starlette.types import Message, Receive, Scope, Send

from reelway.platform.request_body import (
    MAX_ARRIVING,
    BodyLimit,
    BodyLimitMiddleware,
    BodyTooLongError,
    RequestBodyError,
    parse_json,
    read_body,
)

LIMIT = BodyLimit(64, "send less")


class Connection:
    """Delivers pieces of a body, and counts those that were read."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces
        self.read = 0

    async def receive(self) -> Message:
        self.read += 1
        return {
            "type": "http.request", "body": self._pieces[self.read - 1], "more_body": self.read < len(self._pieces)
        }  # fmt: skip


@given(st.binary(max_size=100), st.lists(st.integers(0, 100), max_size=8), st.booleans())
def test_body_is_read_whole_or_up_to_the_limit(body: bytes, cuts: list[int], declared: bool) -> None:
    bounds = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    pieces = [body[start:end] for start, end in pairwise(bounds)]
    connection = Connection(pieces)
    scope = {"headers": [(b"content-length", b"%d" % len(body))] if declared else []}
    if len(body) <= LIMIT.max_bytes:
        assert asyncio.run(read_body(scope, connection.receive, LIMIT)) == body
        assert connection.read == len(pieces)
        return
    with pytest.raises(BodyTooLongError, match="more than 64 bytes; send less"):
        asyncio.run(read_body(scope, connection.receive, LIMIT))
    assert sum(len(piece) for piece in pieces[: max(connection.read - 1, 0)]) <= LIMIT.max_bytes
    assert not (declared and connection.read)


@pytest.mark.parametrize("encoding", ["gzip", "identity, gzip", "GZIP"])
def test_encoded_body_is_not_read(encoding: str) -> None:
    connection = Connection([b"{}"])
    with pytest.raises(RequestBodyError, match="send it uncompressed"):
        asyncio.run(read_body({"headers": [(b"content-encoding", encoding.encode())]}, connection.receive, LIMIT))
    assert connection.read == 0


def test_long_bodies_take_a_bounded_number_of_places() -> None:
    """Slow clients whose bodies no proxy holds. Each place is free again when its body is late."""

    def reject(error: RequestBodyError) -> Response:
        return PlainTextResponse(error.kind, error.status, error.headers)

    async def echo(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse((await receive())["body"])(scope, receive, send)

    app = BodyLimitMiddleware(echo, limits={"/a": BodyLimit(1 << 20, "send less", timeout_s=0.5)}, reject=reject)

    async def status_of(declared: int, body: bytes | None) -> tuple[int, dict[bytes, bytes]]:
        sent: list[Message] = []
        scope = {"type": "http", "method": "POST", "path": "/a", "headers": [(b"content-length", b"%d" % declared)]}

        async def receive() -> Message:
            if body is None:
                await asyncio.Event().wait()
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Message) -> None:
            sent.append(message)

        await app(scope, receive, send)
        return sent[0]["status"], dict(sent[0]["headers"])

    async def scenario() -> None:
        slow = [asyncio.create_task(status_of(900_000, None)) for _ in range(MAX_ARRIVING)]
        await asyncio.sleep(0)
        status, headers = await status_of(900_000, None)
        assert (status, headers[b"retry-after"]) == (503, b"1")
        assert (await status_of(2, b"{}"))[0] == 200
        assert {(await one)[0] for one in slow} == {408}
        assert (await status_of(900_000, b"x" * 900_000))[0] == 200

    asyncio.run(scenario())


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
)  # fmt: skip


@given(JSON_VALUES)
def test_parser_agrees_with_the_standard_library_on_valid_json(value: object) -> None:
    assert parse_json(json.dumps(value)) == json.loads(json.dumps(value))


@given(st.binary() | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_parsed_bytes_can_be_written_as_utf8(data: bytes) -> None:
    try:
        value = parse_json(data)
    except ValueError:
        return
    json.dumps(value, ensure_ascii=False).encode()
