"""The event log on a real Kafka broker: order, committed offsets, and a broker that fails."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.eventlog.kafka_broker import Broker, kafka_broker

from reelway.platform.errors import ConfigError, StorageError
from reelway.platform.eventlog import EventLog, LogRecord, Offsets, StoredRecord, open_event_log
from reelway.platform.eventlog import kafka_log as module

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with kafka_broker(tmp_path_factory.mktemp("kafka")) as running:
        yield running


@pytest.fixture
def log(broker: Broker) -> Iterator[EventLog]:
    log = open_event_log(f"kafka://{broker.servers}/{broker.topic(3)}")
    yield log
    log.close()


def records(count: int, start: int = 0) -> list[LogRecord]:
    return [LogRecord(str(i), i % 3, 1_700_000_000_000_123 + i, b"%d" % i) for i in range(start, start + count)]


def read_all(log: EventLog, position: Offsets, count: int) -> tuple[list[StoredRecord], Offsets]:
    found: list[StoredRecord] = []
    for _ in range(100):
        batch = log.read(position, limit=7, wait_s=0.2)
        found += batch.records
        position = batch.next_offsets
        if len(found) >= count:
            break
    return found, position


def test_records_keep_their_time_and_their_partitions_order(log: EventLog) -> None:
    assert log.partitions == 3
    assert log.append(records(30)) == [i // 3 for i in range(30)]
    found, _ = read_all(log, {}, 30)
    assert sorted(int(one.payload) for one in found) == list(range(30))
    for partition in range(3):
        mine = [one for one in found if one.partition == partition]
        assert [one.offset for one in mine] == list(range(10))
        assert [int(one.payload) for one in mine] == list(range(partition, 30, 3))
    assert {one.time_us - int(one.payload) for one in found} == {1_700_000_000_000_123}


def test_consumer_resumes_at_its_committed_offsets(log: EventLog) -> None:
    log.append(records(12))
    assert log.committed("mine") == {}
    first, position = read_all(log, log.committed("mine"), 12)
    log.commit("mine", position)
    log.append(records(6, start=12))
    assert log.committed("other") == {}
    found, _ = read_all(log, log.committed("mine"), 6)
    assert sorted(int(one.payload) for one in found) == list(range(12, 18))
    again, _ = read_all(log, {0: 2}, 16)
    assert len(first) == 12
    assert len(again) == 16


def test_watermark_of_a_partial_read_is_its_last_record(log: EventLog) -> None:
    log.append(records(30))
    behind = log.read({}, limit=3, wait_s=5.0)
    assert behind.watermark_us <= max(one.time_us for one in behind.records)
    _, position = read_all(log, {}, 30)
    assert log.read(position, limit=3).watermark_us > 1_750_000_000_000_000, "the clock's time"


def test_append_raises_when_the_broker_is_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REQUEST_TIMEOUT_S", 2.0)
    with kafka_broker(tmp_path) as broker:
        if broker.process is None:
            pytest.skip("the broker in REELWAY_KAFKA is not ours to kill")
        log = open_event_log(f"kafka://{broker.servers}/{broker.topic(1)}")
        log.append([LogRecord("a", 0, 1, b"a")])
        broker.process.send_signal(signal.SIGKILL)
        broker.process.wait()
        with pytest.raises(StorageError, match="not acknowledged"):
            log.append([LogRecord("b", 0, 1, b"b")])
        log.close()


def test_error_names_a_missing_topic_or_unknown_setting(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="no-such-topic"):
        open_event_log(f"kafka://{broker.servers}/no-such-topic")
    monkeypatch.setenv("REELWAY_KAFKA_SETTINGS", "no.such.setting=1")
    with pytest.raises(ConfigError, match=r"no\.such\.setting"):
        open_event_log(f"kafka://{broker.servers}/topic")
    monkeypatch.setenv("REELWAY_KAFKA_SETTINGS", "nonsense")
    with pytest.raises(ConfigError, match="name=value"):
        open_event_log(f"kafka://{broker.servers}/topic")
