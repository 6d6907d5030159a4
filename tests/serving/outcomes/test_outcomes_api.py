"""``/v1/outcomes`` over a socket, under its prefix, with slow and full disks."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from tests.support.serving.raw_events import (
    NOW,
    SIGNER,
    RawOutcome,
    ShownImpression,
    assert_same,
    exposures_of,
    recomputed,
)

from reelway.platform.contracts.api import ErrorResponse, OutcomesResponse
from reelway.platform.contracts.events import Arm, OutcomeType
from reelway.platform.errors import StorageError
from reelway.platform.tokens import TokenSigner
from reelway.serving.outcomes import OutcomeCollector, build_outcomes_api
from reelway.serving.outcomes.outcomes_api import MAX_BODY_BYTES

SHOWN = [ShownImpression(i, i % 5, Arm.CANARY if i % 2 else Arm.STABLE, 0.5, i % 8) for i in range(200)]


class Running:
    """The API behind a real server that passes a prefix as the root path, like Ray Serve."""

    def __init__(self, collector: OutcomeCollector) -> None:
        self.collector = collector
        listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1/outcomes"
        api = build_outcomes_api(collector, SIGNER)

        async def behind_a_prefix(scope: Any, receive: Any, send: Any) -> None:
            await api({**scope, "root_path": "/v1/outcomes"} if scope["type"] == "http" else scope, receive, send)

        self._server = uvicorn.Server(uvicorn.Config(behind_a_prefix, log_level="warning", lifespan="on"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listening]})
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    def post(self, *outcomes: Any, path: str = "") -> httpx.Response:
        return httpx.post(self.url + path, json={"outcomes": list(outcomes)})


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    running = Running(OutcomeCollector(tmp_path / "outcomes.db", clock=lambda: NOW))
    yield running
    running.stop()


def body_of(done: RawOutcome) -> dict[str, Any]:
    return done.reported.model_dump(mode="json", exclude_none=True)


@pytest.mark.parametrize("path", ["", "/"])
def test_answer_counts_outcomes_by_status(running: Running, path: str) -> None:
    running.collector.record_exposures(exposures_of(SHOWN, 1)).result(10)
    like = body_of(RawOutcome(SHOWN[1], OutcomeType.LIKE))
    forged = TokenSigner(b"the secret of another service, long").sign(SIGNER.read(SHOWN[2].token))
    answer = running.post(
        like,
        {**like, "token": "?"},
        {"token": SHOWN[3].token, "type": "skip"},
        {**like, "token": forged},
        {"token": SHOWN[4].token, "type": "watch"},
        {"token": SHOWN[4].token, "type": "share", "value": 3},
        like,
        body_of(RawOutcome(replace(SHOWN[5], rollout=""), OutcomeType.SAVE)),
        {**like, "token": SHOWN[6].token, "event_time": "2027-01-30T00:00:00+00:00"},
        path=path,
    )
    assert answer.status_code == 200, answer.text
    response = OutcomesResponse.model_validate(answer.json())
    assert (response.accepted, response.counted, response.duplicate, response.late, response.outside) == (5, 2, 1, 1, 1)
    assert {refused.index: refused.message.split(";")[0] for refused in response.refused} == {
        1: "impression token '?'... is not URL-safe base64: Only base64 data is allowed",
        3: f"impression token {forged[:12]!r}... is signed by none of the 1 accepted secrets",
        4: "watch: it has no value",
        5: "share: value 3, expected 1",
    }
    text = httpx.get(f"{running.url}/metrics").text
    assert "reelway_outcomes_refused_total 4.0" in text


def test_concurrent_requests_give_the_sums_of_all_events(running: Running) -> None:
    done = [RawOutcome(one, OutcomeType.WATCH, 1_000.0 * one.id) for one in SHOWN]

    async def all_at_once() -> list[httpx.Response]:
        async with httpx.AsyncClient() as client:
            bodies = [{"outcomes": [body_of(one) for one in done[i : i + 10]]} for i in range(0, len(done), 5)]
            return list(await asyncio.gather(*(client.post(running.url, json=body) for body in bodies)))

    running.collector.record_exposures(exposures_of(SHOWN, 1))
    answers = [OutcomesResponse.model_validate(one.json()) for one in asyncio.run(all_at_once())]
    assert sum(one.counted for one in answers) == len(done)
    assert sum(one.duplicate for one in answers) == len(done) - 5
    assert_same(running.collector.statistics("r-1"), recomputed(SHOWN, done))


@pytest.mark.parametrize(
    ("content", "field", "message"),
    [
        (b'{"outcomes": []}', "outcomes", "at least 1 item"),
        (b'{"outcomes": [{"token": "a", "type": "purr"}]}', "outcomes.0.type", "'watch', 'like'"),
        (b'{"outcomes": [{"token": "a", "type": "watch", "value": -1}]}', "outcomes.0.value", "greater than or equal"),
        (b'{"outcomes": [{"token": "a", "type": "watch", "value": 1e300}]}', "outcomes.0.value", "less than or equal"),
        (b'{"outcomes": [{"token": "a", "type": "like", "at": 1}]}', "outcomes.0.at", "Extra inputs"),
        (b'{"outcomes": [' + b'{"token": "a", "type": "like"},' * 1000 + b'{"token": "a", "type": "like"}]}',
         "outcomes", "at most 1000 items"),
        (b'{"outcomes": [', "body", "not JSON"),
    ],
)  # fmt: skip
def test_invalid_request_is_answered_with_every_invalid_field(
    running: Running, content: bytes, field: str, message: str
) -> None:
    answer = httpx.post(running.url, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    response = ErrorResponse.model_validate(answer.json())
    assert [invalid.field for invalid in response.fields] == [field]
    assert message in response.fields[0].message
    assert field in response.error


def test_too_long_body_is_rejected_before_it_is_read(running: Running) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(2 * MAX_BODY_BYTES // 65_536):
            yield b" " * 65_536

    answer = httpx.post(running.url, content=endless(), headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert "1048576 bytes" in ErrorResponse.model_validate(answer.json()).error


def test_every_error_has_the_same_shape(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    like = body_of(RawOutcome(SHOWN[1], OutcomeType.LIKE))

    def full(*_: object) -> None:
        raise StorageError("no space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(running.collector._store, "write_sums", full)
        answer = running.post(like)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "send them again" in ErrorResponse.model_validate(answer.json()).error
    assert running.post(like).json()["counted"] == 1
    missing = httpx.get(f"{running.url}/nothing")
    assert (missing.status_code, ErrorResponse.model_validate(missing.json()).error) == (404, "Not Found")


def test_slow_disk_does_not_block_the_event_loop(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    writing, go_on = threading.Event(), threading.Event()
    write = running.collector._store.write_sums

    def slow(*arguments: Any) -> None:
        writing.set()
        assert go_on.wait(30)
        write(*arguments)

    monkeypatch.setattr(running.collector._store, "write_sums", slow)
    answers: list[httpx.Response] = []
    posting = threading.Thread(
        target=lambda: answers.append(running.post(body_of(RawOutcome(SHOWN[1], OutcomeType.LIKE))))
    )
    posting.start()
    assert writing.wait(10)
    scrape = httpx.get(f"{running.url}/metrics")  # answered during the transaction, with committed counts
    assert scrape.status_code == 200
    assert "like" not in scrape.text
    assert not answers
    go_on.set()
    posting.join()
    assert answers[0].json()["counted"] == 1


def test_server_shutdown_counts_all_accepted_outcomes(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.db"
    running = Running(OutcomeCollector(path, clock=lambda: NOW))
    assert running.post(body_of(RawOutcome(SHOWN[1], OutcomeType.LIKE))).json()["counted"] == 1
    running.stop()
    again = OutcomeCollector(path, clock=lambda: NOW, wait_s=0.1)
    assert_same(again.statistics("r-1"), recomputed([], [RawOutcome(SHOWN[1], OutcomeType.LIKE)]))
    again.close()


def test_openapi_schema_describes_requests_and_answers(running: Running) -> None:
    schema = httpx.get(f"{running.url}/openapi.json").json()
    post = schema["paths"]["/"]["post"]
    assert post["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("OutcomesRequest")
    assert {status: body["content"]["application/json"]["schema"]["$ref"].split("/")[-1]
            for status, body in post["responses"].items()} == {
        "200": "OutcomesResponse", "413": "ErrorResponse", "422": "ErrorResponse", "503": "ErrorResponse",
    }  # fmt: skip
