"""Accepted outcomes are in the event log before the client gets its answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient
from tests.support.eventlog.kafka_broker import Broker
from tests.support.serving.raw_events import NOW, SIGNER, RawOutcome, ShownImpression, columns_of

from reelway.platform.contracts.events import Arm, OutcomeType
from reelway.platform.errors import ServingError, StorageError
from reelway.platform.eventlog import LogRecord, open_event_log
from reelway.platform.eventlog.outcome_events import decode_outcomes
from reelway.platform.eventlog.sqlite_log import SqliteLog
from reelway.serving.outcomes import EventLogWriter, OutcomeCollector, build_outcomes_api
from reelway.serving.outcomes.reported import OutcomeColumns

RECEIVED_S = NOW + 7.25
SHOWN = [ShownImpression(i, i % 5, Arm.CANARY if i % 2 else Arm.STABLE, 0.5, 0) for i in range(20)]


class FailingLog(SqliteLog):
    """A log whose disk can be full."""

    full = False

    def append(self, records: Sequence[LogRecord]) -> list[int]:
        if self.full:
            raise StorageError("no space left on device")
        return super().append(records)


def logged(path: Path) -> list[dict[str, Any]]:
    log = SqliteLog(path)
    tables = [decode_outcomes(record.payload) for record in log.read({}, limit=1_000).records]
    log.close()
    return pa.concat_tables(table.unify_dictionaries() for table in tables).to_pylist() if tables else []


@pytest.fixture
def log(tmp_path: Path) -> FailingLog:
    return FailingLog(tmp_path / "log.db")


@pytest.fixture
def client(tmp_path: Path, log: FailingLog) -> Iterator[TestClient]:
    collector = OutcomeCollector(tmp_path / "outcomes.db", clock=lambda: NOW)
    with TestClient(build_outcomes_api(collector, SIGNER, EventLogWriter(log, clock=lambda: RECEIVED_S))) as client:
        yield client


def body_of(done: RawOutcome) -> dict[str, Any]:
    return done.reported.model_dump(mode="json", exclude_none=True)


def test_answered_outcomes_are_in_the_log_with_their_tokens_data(client: TestClient, tmp_path: Path) -> None:
    outcomes = [
        body_of(RawOutcome(SHOWN[1], OutcomeType.WATCH, 1234.0)) | {"event_time": "2027-01-15T08:00:00+00:00"},
        body_of(RawOutcome(SHOWN[2], OutcomeType.LIKE)),
        {"token": "forged", "type": "like"},
    ]
    answer = client.post("/", json={"outcomes": outcomes})
    assert answer.status_code == 200
    watch, like = logged(tmp_path / "log.db")
    token = SIGNER.read(SHOWN[1].token)
    assert {name: watch[name] for name in ("impression_id", "request_id", "viewer_id", "video_id", "position")} == {
        "impression_id": 1, "request_id": 1, "viewer_id": 1, "video_id": 5, "position": 0,
    }  # fmt: skip
    assert (watch["release"], watch["arm"], watch["source"]) == (token.release, "canary", "ann")
    assert (watch["type"], watch["value"], watch["propensity"]) == ("watch", 1234.0, 0.5)
    assert watch["shown_at"].timestamp() == NOW
    assert watch["event_time"].timestamp() == RECEIVED_S, "the service's clock"
    assert watch["done_at"].isoformat() == "2027-01-15T08:00:00+00:00"
    assert (like["type"], like["arm"], like["done_at"]) == ("like", "stable", None)


def test_repeated_outcome_is_logged_with_the_same_id(client: TestClient, tmp_path: Path) -> None:
    for _ in range(2):
        client.post("/", json={"outcomes": [body_of(RawOutcome(SHOWN[1], OutcomeType.LIKE))]})
    first, second = logged(tmp_path / "log.db")
    assert first["outcome_id"] == second["outcome_id"]


def test_failed_append_is_answered_with_503(client: TestClient, log: FailingLog, tmp_path: Path) -> None:
    body = {"outcomes": [body_of(RawOutcome(SHOWN[1], OutcomeType.LIKE))]}
    log.full = True
    assert client.post("/", json=body).status_code == 503
    log.full = False
    answer = client.post("/", json=body)
    assert answer.status_code == 200
    assert answer.json()["duplicate"] == 1, "counted the first time, and once"
    assert len(logged(tmp_path / "log.db")) == 1


def test_close_appends_accepted_outcomes(tmp_path: Path) -> None:
    appender = EventLogWriter(SqliteLog(tmp_path / "log.db"), append_every_s=0.5)
    futures = [appender.append(columns_of([RawOutcome(shown, OutcomeType.LIKE)])) for shown in SHOWN]
    appender.close()
    assert all(future.done() for future in futures)
    assert len(logged(tmp_path / "log.db")) == len(SHOWN)
    with pytest.raises(ServingError, match="closed"):
        appender.append(columns_of([RawOutcome(SHOWN[0], OutcomeType.LIKE)]))


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
    appender = EventLogWriter(open_event_log(address), append_every_s=0.5)
    shown = [ShownImpression(i, i % 50, Arm.STABLE, 0.5, 0) for i in range(1_000)]
    request = columns_of([RawOutcome(one, OutcomeType.LIKE) for one in shown])
    first = appender.append(columns_of([RawOutcome(shown[0], OutcomeType.LIKE)]))
    first.result(30)  # the appends of the next half second are combined
    rng = np.random.default_rng(0)
    for future in [appender.append(with_random_ids(request, rng)) for _ in range(20)]:
        future.result(30)
    appender.close()
    log = open_event_log(address)
    (end,) = log.end_offsets().values()
    records = [log.read({0: offset}, limit=1).records[0] for offset in range(end)]
    log.close()
    assert max(len(record.payload) for record in records) <= 1 << 20
    assert len(records) > 2
    assert sum(decode_outcomes(record.payload).num_rows for record in records) == 20_001
