"""``POST /v1/outcomes`` of a router: what is refused, what is in the log, and what viewers' memories learn."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry
from tests.support.eventlog.kafka_broker import Broker
from tests.support.serving.caller_access import CREDENTIAL, INTERNAL, open_access
from tests.support.serving.raw_events import NOW, SIGNER, RawOutcome, ShownImpression, reported_columns

from reelway.platform.contracts.api import ErrorResponse, OutcomesResponse
from reelway.platform.contracts.events import OUTCOME_HORIZON_S, Arm, OutcomeType
from reelway.platform.errors import ServingError, StorageError
from reelway.platform.eventlog import LogRecord, open_event_log
from reelway.platform.eventlog.outcome_events import decode_outcomes
from reelway.platform.eventlog.sqlite_log import SqliteLog
from reelway.platform.rollout.traffic.access_options import AccessOptions, GatewayOptions
from reelway.platform.tokens import TokenSigner
from reelway.platform.viewer_assertions import GATEWAY_HEADER, gateway_header
from reelway.serving.access import build_viewer_access
from reelway.serving.http_api import MAX_OUTCOMES_BYTES, build_http_api
from reelway.serving.metrics import IntakeMetrics
from reelway.serving.outcomes import EventLogWriter, OutcomeIntake
from reelway.serving.outcomes.memory_writer import OutcomeMemoryWriter, memory_update
from reelway.serving.outcomes.outcome_intake import READ_INLINE
from reelway.serving.outcomes.reported import OutcomeColumns
from reelway.serving.release_pool import OpenRelease
from reelway.serving.router import Router, RouterDependencies

RECEIVED_S = NOW + 7.25
SHOWN = [ShownImpression(i, i % 5, Arm.CANARY if i % 2 else Arm.STABLE, 0.5, i % 8) for i in range(200)]
URL = "/v1/outcomes"
SIGNED_BY_THE_GATEWAY = b"a secret of the gateway"


class FailingLog(SqliteLog):
    """A log whose disk can be full, and slow."""

    full = False
    resume: threading.Event | None = None

    def append(self, records: Sequence[LogRecord]) -> list[int]:
        if self.resume:
            assert self.resume.wait(10)
        if self.full:
            raise StorageError("no space left on device")
        return super().append(records)


@dataclass
class FakeMemory:
    """Records what it learns; fails if ``broken``."""

    watched: list[tuple[int, int, float]] = field(default_factory=list)
    blocks: list[tuple[int, list[int], list[int]]] = field(default_factory=list)
    broken: bool = False

    def remember_watched(self, viewer_ids: Any, video_ids: Any, watched_at_s: Any) -> None:
        if self.broken:
            raise StorageError("no online store")
        self.watched += zip(viewer_ids.tolist(), video_ids.tolist(), watched_at_s.tolist(), strict=True)

    def block(self, viewer_id: int, *, creators: list[int], topics: list[int]) -> None:
        self.blocks.append((viewer_id, creators, topics))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def logged(path: Path) -> list[dict[str, Any]]:
    log = SqliteLog(path)
    tables = [decode_outcomes(record.payload) for record in log.read({}, limit=1_000).records]
    log.close()
    return pa.concat_tables(table.unify_dictionaries() for table in tables).to_pylist() if tables else []


def body_of(done: RawOutcome) -> dict[str, Any]:
    return done.reported.model_dump(mode="json", exclude_none=True)


class Intake:
    """A router's HTTP API, its log and its memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log = FailingLog(path)
        self.memory = FakeMemory()
        registry = CollectorRegistry()
        writer = EventLogWriter(lambda: self.log, clock=lambda: RECEIVED_S)
        intake = OutcomeIntake(SIGNER, writer, IntakeMetrics(registry), self.memory, clock=lambda: RECEIVED_S)
        self.registry = registry
        self.client = TestClient(build_http_api(router(registry, intake), open_access()))

    def post(self, *outcomes: dict[str, Any]) -> Any:
        return self.client.post(URL, json={"outcomes": list(outcomes)})

    def logged(self) -> list[dict[str, Any]]:
        return logged(self.path)


def router(registry: CollectorRegistry, intake: OutcomeIntake | None) -> Router:
    async def open_release(release: str) -> OpenRelease:
        raise AssertionError(f"{release} is not needed")

    return Router(open_release, RouterDependencies(SIGNER, registry, outcomes=intake))


@pytest.fixture
def intake(tmp_path: Path) -> Iterator[Intake]:
    intake = Intake(tmp_path / "outcomes.db")
    with intake.client:
        yield intake


def test_logged_outcomes_have_the_data_of_their_tokens(intake: Intake) -> None:
    answer = intake.post(
        body_of(RawOutcome(SHOWN[1], OutcomeType.WATCH, 1234.0)) | {"event_time": "2027-01-15T08:00:00+00:00"},
        body_of(RawOutcome(replace(SHOWN[2], rollout="", duration_ms=0), OutcomeType.LIKE)),
        {"token": "forged", "type": "like"},
    )
    assert answer.status_code == 200
    watch, like = intake.logged()
    token = SIGNER.read(SHOWN[1].token)
    assert {name: watch[name] for name in ("impression_id", "request_id", "viewer_id", "video_id", "position")} == {
        "impression_id": 1, "request_id": 1, "viewer_id": 1, "video_id": 5, "position": 0,
    }  # fmt: skip
    assert (watch["release"], watch["arm"], watch["source"]) == (token.release, "canary", "ann")
    assert (watch["type"], watch["value"], watch["propensity"]) == ("watch", 1234.0, 0.5)
    assert (watch["creator_id"], watch["topic"], watch["duration_ms"]) == (7, 3, 20_000)
    assert (watch["rollout"], watch["weight"], watch["slices"]) == ("r-1", 0.5, 1)
    assert watch["shown_at"].timestamp() == NOW
    assert watch["done_at"].isoformat() == "2027-01-15T08:00:00+00:00"
    assert (like["type"], like["arm"], like["done_at"], like["rollout"]) == ("like", "stable", None, "")
    assert like["duration_ms"] is None, "the token's code of an unknown duration"
    assert (watch["authenticated"], like["authenticated"]) == (False, False)


def test_answer_names_the_refused_outcomes(intake: Intake) -> None:
    forged = TokenSigner(b"the secret of another service, long").sign(SIGNER.read(SHOWN[2].token))
    answer = intake.post(
        body_of(RawOutcome(SHOWN[1], OutcomeType.LIKE)),
        {"token": "?", "type": "like"},
        {"token": forged, "type": "like"},
        {"token": SHOWN[4].token, "type": "watch"},
        {"token": SHOWN[4].token, "type": "share", "value": 3},
    )
    response = OutcomesResponse.model_validate(answer.json())
    assert set(answer.json()) == {"accepted", "refused"}
    assert response.accepted == len(intake.logged()) == 1
    assert {refused.index: refused.message.split(";")[0] for refused in response.refused} == {
        1: "impression token '?'... is not URL-safe base64: Only base64 data is allowed",
        2: f"impression token {forged[:12]!r}... is signed by none of the 1 accepted secrets",
        3: "watch: it has no value",
        4: "share: value 3, expected 1",
    }
    assert intake.registry.get_sample_value("reelway_outcomes_refused_total") == 4


@pytest.mark.parametrize("count", [1, READ_INLINE + 1])
def test_viewer_reports_its_own_outcomes_alone(tmp_path: Path, count: int) -> None:
    """Few outcomes are read in the event loop, many on a thread."""
    keys = tmp_path / "gateway.keys"
    keys.write_bytes(SIGNED_BY_THE_GATEWAY)
    options = AccessOptions(mode="gateway", gateway=GatewayOptions(keys_file=keys))
    access = build_viewer_access(options, CREDENTIAL, lambda: None, behind_haproxy=False)
    registry, log = CollectorRegistry(), FailingLog(tmp_path / "outcomes.db")
    intake = OutcomeIntake(SIGNER, EventLogWriter(lambda: log), IntakeMetrics(registry))
    own = replace(SHOWN[1], viewer=7)
    body = {"outcomes": [body_of(RawOutcome(one, OutcomeType.LIKE)) for one in (own, SHOWN[2]) for _ in range(count)]}
    with TestClient(build_http_api(router(registry, intake), access)) as client:
        proof = {GATEWAY_HEADER: gateway_header(SIGNED_BY_THE_GATEWAY, 7, time.time())}
        answer = client.post(URL, json=body, headers=proof)
        assert client.post(URL, json=body).status_code == 401
    response = OutcomesResponse.model_validate(answer.json())
    assert response.accepted == count
    assert [one.index for one in response.refused] == list(range(count, 2 * count))
    assert {one.message.split(":")[1] for one in response.refused} == {
        " issued to another viewer; report outcomes as the viewer that the slate was for"
    }
    assert {(row["viewer_id"], row["authenticated"]) for row in logged(tmp_path / "outcomes.db")} == {(7, True)}
    assert registry.get_sample_value("reelway_outcomes_refused_total") == count
    assert registry.get_sample_value("reelway_ingress_denied_total", {"kind": "missing"}) == 1


def test_outcome_repeated_at_another_router_has_the_same_id(intake: Intake) -> None:
    other = Intake(intake.path)
    with other.client:
        for router_of_the_service in (intake, other):
            router_of_the_service.post(body_of(RawOutcome(SHOWN[1], OutcomeType.LIKE)))
    first, second = intake.logged()
    assert first["outcome_id"] == second["outcome_id"]


def test_large_request_is_accepted(intake: Intake) -> None:
    answer = intake.post(*(body_of(RawOutcome(one, OutcomeType.SKIP)) for one in SHOWN))
    assert answer.json()["accepted"] == len(intake.logged()) == len(SHOWN)


def test_failed_append_is_answered_with_503(intake: Intake) -> None:
    like = body_of(RawOutcome(SHOWN[1], OutcomeType.LIKE))
    intake.log.full = True
    answer = intake.post(like)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "send them again" in ErrorResponse.model_validate(answer.json()).error
    intake.log.full = False
    assert intake.post(like).json() == {"accepted": 1, "refused": []}


def test_answer_waits_for_the_log_alone(intake: Intake) -> None:
    """Other requests are answered during a slow append."""
    intake.log.resume = threading.Event()
    answers: list[Any] = []
    posting = threading.Thread(
        target=lambda: answers.append(intake.post(body_of(RawOutcome(SHOWN[1], OutcomeType.LIKE))))
    )
    posting.start()
    assert intake.client.get("/healthz").status_code == 200
    assert not answers
    intake.log.resume.set()
    posting.join(10)
    assert answers[0].json()["accepted"] == 1


def test_router_without_an_event_log_rejects_outcomes() -> None:
    client = TestClient(build_http_api(router(CollectorRegistry(), None), open_access()))
    answer = client.post(URL, json={"outcomes": [body_of(RawOutcome(SHOWN[1], OutcomeType.LIKE))]})
    assert answer.status_code == 503


def test_memory_learns_complete_watches_and_blocks(intake: Intake) -> None:
    intake.post(
        body_of(RawOutcome(SHOWN[1], OutcomeType.WATCH, 20_000.0)),
        body_of(RawOutcome(SHOWN[2], OutcomeType.WATCH, 19_999.0)),
        body_of(RawOutcome(replace(SHOWN[3], duration_ms=0), OutcomeType.WATCH, 60_000.0)),
        body_of(RawOutcome(SHOWN[4], OutcomeType.BLOCK_CREATOR)),
        body_of(RawOutcome(SHOWN[4], OutcomeType.BLOCK_TOPIC)),
        body_of(RawOutcome(SHOWN[6], OutcomeType.NOT_INTERESTED)),
    )
    assert intake.memory.watched == [(1, 5, RECEIVED_S)]
    assert intake.memory.blocks == [(4, [7], [3])]


def test_failed_memory_is_counted_and_written_later(intake: Intake) -> None:
    intake.memory.broken = True
    answer = intake.post(
        body_of(RawOutcome(SHOWN[1], OutcomeType.WATCH, 20_000.0)),
        body_of(RawOutcome(SHOWN[4], OutcomeType.BLOCK_CREATOR)),
    )
    assert answer.json()["accepted"] == len(intake.logged()) == 2
    assert intake.registry.get_sample_value("reelway_outcomes_memory_failures_total") == 1
    intake.memory.broken = False
    wait_until(lambda: intake.memory.blocks == [(4, [7], [])])
    assert intake.memory.watched == [(1, 5, RECEIVED_S)]
    assert intake.registry.get_sample_value("reelway_outcomes_memory_lost_total") == 0


def test_memory_writer_loses_what_exceeds_its_limit() -> None:
    memory, registry = FakeMemory(broken=True), CollectorRegistry()
    writer = OutcomeMemoryWriter(memory, IntakeMetrics(registry), max_waiting=2)  # type: ignore[arg-type]
    updates = [memory_update(reported_columns([RawOutcome(one, OutcomeType.WATCH, 20_000.0)]), NOW) for one in SHOWN]
    written = [writer.write(update) for update in updates[1:4]]
    assert [one.result(10) for one in (written[0], written[2])] == [False, False]
    assert registry.get_sample_value("reelway_outcomes_memory_lost_total") == 1
    memory.broken = False
    assert written[1].result(10)
    assert [viewer for viewer, _, _ in memory.watched] == [1, 2]
    writer.close()
    assert not writer.write(updates[4]).result(0)
    assert registry.get_sample_value("reelway_outcomes_memory_lost_total") == 2


def test_unwritable_update_does_not_hold_up_the_others() -> None:
    memory, registry = FakeMemory(), CollectorRegistry()
    writer = OutcomeMemoryWriter(memory, IntakeMetrics(registry))  # type: ignore[arg-type]
    good = memory_update(reported_columns([RawOutcome(SHOWN[1], OutcomeType.WATCH, 20_000.0)]), NOW)
    bad = replace(good, watched_videos=None)
    assert [writer.write(update).result(10) for update in (bad, good)] == [False, True]
    assert registry.get_sample_value("reelway_outcomes_memory_lost_total") == 1
    writer.close()


def test_closed_memory_writer_counts_what_it_cannot_write() -> None:
    memory, registry = FakeMemory(broken=True), CollectorRegistry()
    writer = OutcomeMemoryWriter(memory, IntakeMetrics(registry))  # type: ignore[arg-type]
    updates = [memory_update(reported_columns([RawOutcome(one, OutcomeType.WATCH, 20_000.0)]), NOW) for one in SHOWN]
    written = [writer.write(update) for update in updates[:5]]
    writer.close()
    assert not any(one.result(10) for one in written)
    assert registry.get_sample_value("reelway_outcomes_memory_lost_total") == 5


@pytest.mark.parametrize(
    ("content", "field_name", "message"),
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
    intake: Intake, content: bytes, field_name: str, message: str
) -> None:
    answer = intake.client.post(URL, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    response = ErrorResponse.model_validate(answer.json())
    assert [invalid.field for invalid in response.fields] == [field_name]
    assert message in response.fields[0].message
    assert field_name in response.error


def test_too_long_body_is_rejected(intake: Intake) -> None:
    answer = intake.client.post(
        URL, content=b" " * (MAX_OUTCOMES_BYTES + 1), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 413
    assert f"{MAX_OUTCOMES_BYTES} bytes" in ErrorResponse.model_validate(answer.json()).error


def test_openapi_schema_describes_requests_and_answers(intake: Intake) -> None:
    post = intake.client.get("/openapi.json", headers=INTERNAL).json()["paths"][URL]["post"]
    assert post["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("OutcomesRequest")
    assert {status: body["content"]["application/json"]["schema"]["$ref"].split("/")[-1]
            for status, body in post["responses"].items()} == {
        "200": "OutcomesResponse", "401": "ErrorResponse", "403": "ErrorResponse", "408": "ErrorResponse",
            "413": "ErrorResponse", "415": "ErrorResponse", "429": "ErrorResponse",
            "422": "ErrorResponse", "503": "ErrorResponse",
    }  # fmt: skip


def test_shutdown_appends_accepted_outcomes(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    writer = EventLogWriter(lambda: SqliteLog(path), append_every_s=0.5)
    futures = [writer.append(reported_columns([RawOutcome(shown, OutcomeType.LIKE)])) for shown in SHOWN]
    metrics = IntakeMetrics(CollectorRegistry())
    with TestClient(build_http_api(router(CollectorRegistry(), OutcomeIntake(SIGNER, writer, metrics)), open_access())):
        pass
    assert all(future.done() for future in futures)
    assert len(logged(path)) == len(SHOWN)
    with pytest.raises(ServingError, match="closed"):
        writer.append(reported_columns([RawOutcome(SHOWN[0], OutcomeType.LIKE)]))


def with_random_ids(columns: OutcomeColumns, rng: np.random.Generator) -> OutcomeColumns:
    """Ids, times and values as different viewers send them, which compress less than repeated ones."""
    ids = {
        name: rng.integers(0, 2**53, len(columns)) for name in ("impression_id", "request_id", "viewer_id", "video_id")
    }
    times = {name: NOW + rng.random(len(columns)) * 3_600 for name in ("issued_at", "done_at")}
    return replace(columns, **ids, **times, value=rng.random(len(columns)) * 60_000)


@pytest.mark.long
@pytest.mark.kafka
def test_twenty_full_requests_are_appended_to_kafka(broker: Broker) -> None:
    """Their outcomes share one append. As one record they would exceed Kafka's default limit of 1 MiB."""
    address = f"kafka://{broker.servers}/{broker.topic(1)}"
    writer = EventLogWriter(lambda: open_event_log(address), append_every_s=0.5)
    shown = [ShownImpression(i, i % 50, Arm.STABLE, 0.5, 0) for i in range(1_000)]
    request = reported_columns([RawOutcome(one, OutcomeType.LIKE) for one in shown])
    first = writer.append(reported_columns([RawOutcome(shown[0], OutcomeType.LIKE)]))
    first.result(30)  # the appends of the next half second are combined
    rng = np.random.default_rng(0)
    for future in [writer.append(with_random_ids(request, rng)) for _ in range(20)]:
        future.result(30)
    writer.close()
    log = open_event_log(address)
    (end,) = log.end_offsets().values()
    records = [log.read({0: offset}, limit=1).records[0] for offset in range(end)]
    log.close()
    assert max(len(record.payload) for record in records) <= 1 << 20
    assert len(records) > 2
    assert sum(decode_outcomes(record.payload).num_rows for record in records) == 20_001


def test_repeated_outcome_is_accepted_and_logged_once(intake: Intake) -> None:
    one, other = body_of(RawOutcome(SHOWN[1], OutcomeType.LIKE)), body_of(RawOutcome(SHOWN[2], OutcomeType.LIKE))
    assert [intake.post(*outcomes).json()["accepted"] for outcomes in ((one, one), (one, other), (other,))] == [2, 2, 1]
    assert [row["impression_id"] for row in intake.logged()] == [1, 2]


def test_outcome_whose_append_failed_is_logged_when_it_is_sent_again(intake: Intake) -> None:
    one = body_of(RawOutcome(SHOWN[1], OutcomeType.LIKE))
    intake.log.full = True
    assert intake.post(one).status_code == 503
    intake.log.full = False
    assert intake.post(one).json()["accepted"] == 1
    assert len(intake.logged()) == 1


def test_late_outcome_is_refused_and_not_logged(intake: Intake) -> None:
    late = replace(SHOWN[1], at=RECEIVED_S - OUTCOME_HORIZON_S - 1)
    in_time = replace(SHOWN[2], at=RECEIVED_S - OUTCOME_HORIZON_S + 1)
    answer = intake.post(*(body_of(RawOutcome(shown, OutcomeType.LIKE)) for shown in (late, in_time))).json()
    assert answer["accepted"] == 1
    assert answer["refused"] == [
        {"index": 0, "message": "late: more than 24 hours after the impression; do not send it again"}
    ]
    assert [row["impression_id"] for row in intake.logged()] == [2]
