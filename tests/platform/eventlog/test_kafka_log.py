"""The event log on a real Kafka broker: order, offsets, retention, transactions, record sizes and a killed broker."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
from confluent_kafka import Producer
from tests.support.eventlog.kafka_broker import Broker

from reelway.platform.errors import ConfigError, StorageError
from reelway.platform.eventlog import EventLog, LogRecord, Offsets, StoredRecord, open_event_log
from reelway.platform.eventlog import kafka_log as module
from reelway.platform.eventlog.outcome_events import OUTCOME_EVENT_SCHEMA, decode_outcomes, encode_outcomes

pytestmark = [pytest.mark.long, pytest.mark.kafka]


@pytest.fixture
def log(broker: Broker) -> Iterator[EventLog]:
    log = open_log(broker, broker.topic(3))
    yield log
    log.close()


def open_log(broker: Broker, topic: str) -> EventLog:
    return open_event_log(f"kafka://{broker.servers}/{topic}")


def records(count: int, start: int = 0) -> list[LogRecord]:
    return [LogRecord(str(i), i % 3, b"%d" % i) for i in range(start, start + count)]


def read_all(log: EventLog, position: Offsets, count: int) -> tuple[list[StoredRecord], Offsets]:
    found: list[StoredRecord] = []
    for _ in range(100):
        batch = log.read(position, limit=7, wait_s=0.2)
        found += batch.records
        position = batch.next_offsets
        if len(found) >= count:
            break
    return found, position


def assert_watermark_reaches_clock(log: EventLog, position: Offsets) -> Offsets:
    """Reads until the watermark is the clock's time; returns the next offsets."""
    began_us, deadline = time.time_ns() // 1000, time.monotonic() + 10
    while True:
        batch = log.read(position, limit=500, wait_s=0.1)
        position = batch.next_offsets
        if batch.watermark_us >= began_us:
            return position
        assert time.monotonic() < deadline, f"the watermark stays at {batch.watermark_us}, offsets {position}"


def outcome_batch(rows: int, viewers: int = 1) -> pa.RecordBatch:
    rng = np.random.default_rng(0)
    arrays = []
    for field in OUTCOME_EVENT_SCHEMA:
        if pa.types.is_dictionary(field.type):
            column = pa.array(["watch"] * rows).cast(field.type)
        elif pa.types.is_int32(field.type) or pa.types.is_int8(field.type):
            column = pa.array(rng.integers(0, 100, rows)).cast(field.type)
        elif field.name in ("viewer_id", "position"):
            column = pa.array(rng.integers(0, viewers, rows)).cast(field.type)
        elif pa.types.is_floating(field.type):
            column = pa.array(rng.random(rows)).cast(field.type)
        else:
            column = pa.array(rng.integers(0, 2**53, rows)).cast(field.type)
        arrays.append(column)
    return pa.RecordBatch.from_arrays(arrays, schema=OUTCOME_EVENT_SCHEMA)


def test_records_keep_their_partitions_order(log: EventLog) -> None:
    assert log.partitions == 3
    assert log.append(records(30)) == [i // 3 for i in range(30)]
    found, _ = read_all(log, {}, 30)
    assert sorted(int(one.payload) for one in found) == list(range(30))
    for partition in range(3):
        mine = [one for one in found if one.partition == partition]
        assert [one.offset for one in mine] == list(range(10))
        assert [int(one.payload) for one in mine] == list(range(partition, 30, 3))


def test_records_have_the_time_of_their_append(broker: Broker, log: EventLog) -> None:
    """The producer's own timestamp is ignored."""
    producer = Producer({"bootstrap.servers": broker.servers})
    before_us = time.time_ns() // 1_000_000 * 1_000
    producer.produce(log.name, b"text", partition=0, timestamp=1_700_000_000_000)
    assert producer.flush(10) == 0
    log.append(records(6))
    found, _ = read_all(log, {}, 7)
    assert all(before_us <= one.time_us <= time.time_ns() // 1000 for one in found)


def test_offsets_at_a_time_are_those_of_the_first_later_records(log: EventLog) -> None:
    log.append(records(3))
    time.sleep(0.01)  # the broker's times are milliseconds
    log.append(records(3, start=3))
    found, _ = read_all(log, {}, 6)
    second_us = min(one.time_us for one in found if int(one.payload) >= 3)
    assert log.offsets_at(0) == {0: 0, 1: 0, 2: 0}
    assert log.offsets_at(second_us - 999) == {0: 1, 1: 1, 2: 1}
    assert log.offsets_at(time.time_ns() // 1000 + 60_000_000) == {0: 2, 1: 2, 2: 2}


def test_read_starts_at_any_offset(log: EventLog) -> None:
    log.append(records(18))
    again, _ = read_all(log, {0: 2}, 16)
    assert len(again) == 16


def test_watermark_of_a_partial_read_is_its_last_record(log: EventLog) -> None:
    log.append(records(30))
    behind = log.read({}, limit=3, wait_s=5.0)
    assert behind.watermark_us <= max(one.time_us for one in behind.records)
    _, position = read_all(log, {}, 30)
    assert log.read(position, limit=3).watermark_us > 1_750_000_000_000_000, "the clock's time"


def test_read_without_waiting_returns_the_records_that_exist(broker: Broker, log: EventLog) -> None:
    """A new consumer needs longer than one poll for its first fetch."""
    log.append(records(30))
    reader = open_log(broker, log.name)
    assert len(reader.read({}, limit=100, wait_s=0).records) > 0
    reader.close()


def test_partition_emptied_by_retention_does_not_hold_the_watermark(broker: Broker, log: EventLog) -> None:
    """The first and last offsets of partition 1 are both 10."""
    log.append(records(30))
    _, read_before = read_all(log, {}, 30)
    broker.delete_records(log.name, 1, 10)
    for position in ({}, {0: 3, 1: 4, 2: 0}, read_before):
        reader = open_log(broker, log.name)
        assert assert_watermark_reaches_clock(reader, position) == {0: 10, 1: 10, 2: 10}
        reader.close()


def test_log_warns_of_records_that_retention_deleted_unread(
    broker: Broker, log: EventLog, caplog: pytest.LogCaptureFixture
) -> None:
    log.append(records(30))
    broker.delete_records(log.name, 1, 6)
    found, _ = read_all(log, {0: 0, 1: 4, 2: 0}, 24)
    assert sorted(one.offset for one in found if one.partition == 1) == [6, 7, 8, 9]
    assert "offsets 4 to 5 of partition 1 were deleted before they were read" in caplog.text


def test_transaction_markers_do_not_hold_the_watermark(broker: Broker, log: EventLog) -> None:
    """Each transaction ends with a marker that has an offset and that no consumer receives."""
    producer = Producer({"bootstrap.servers": broker.servers, "transactional.id": log.name})
    producer.init_transactions(10)
    producer.begin_transaction()
    producer.produce(log.name, b"committed", partition=0)
    producer.commit_transaction(10)
    producer.begin_transaction()
    producer.produce(log.name, b"aborted", partition=1)
    producer.flush(10)
    producer.abort_transaction(10)
    found, position = read_all(log, {}, 1)
    assert [one.payload for one in found] == [b"committed"]
    position = assert_watermark_reaches_clock(log, position)
    assert position == {0: 2, 1: 2, 2: 0}, "offsets behind the markers"
    reader = open_log(broker, log.name)
    assert_watermark_reaches_clock(reader, {0: 1, 1: 1, 2: 0})
    reader.close()


def test_tombstone_has_an_empty_payload(broker: Broker, log: EventLog) -> None:
    producer = Producer({"bootstrap.servers": broker.servers})
    producer.produce(log.name, None, partition=0)
    assert producer.flush(10) == 0
    found, _ = read_all(log, {}, 1)
    assert [one.payload for one in found] == [b""]


@pytest.mark.parametrize("limit", [None, 20_000])
def test_large_append_stays_below_the_topics_record_limit(broker: Broker, limit: int | None) -> None:
    """20 requests of 1,000 outcomes, which are appended together, exceed Kafka's default of 1 MiB."""
    topic = broker.topic(1, {"max.message.bytes": str(limit)} if limit else {})
    log = open_log(broker, topic)
    batch = outcome_batch(20_000)
    encoded = list(encode_outcomes(batch, 1, log.max_record_bytes))
    assert len(encoded) > 1
    log.append(encoded)
    found, _ = read_all(log, {}, len(encoded))
    assert pa.concat_tables(decode_outcomes(one.payload) for one in found).equals(pa.Table.from_batches([batch]))
    log.close()


def test_many_small_records_stay_below_the_topics_batch_limit(broker: Broker) -> None:
    """The broker's limit is one of record batches, into which the client combines records."""
    log = open_log(broker, broker.topic(1, {"max.message.bytes": "5000"}))
    offsets = log.append([LogRecord(str(i), 0, b"x" * 100) for i in range(2_000)])
    assert offsets == list(range(2_000))
    log.close()


def test_append_rejects_a_record_above_the_topics_limit(log: EventLog) -> None:
    """None of the append's records is written."""
    too_large = LogRecord("b", 0, b"x" * (log.max_record_bytes + 1))
    with pytest.raises(StorageError, match=rf"has {len(too_large.payload)} bytes, at most {log.max_record_bytes}"):
        log.append([*records(3), too_large])
    assert log.end_offsets() == {0: 0, 1: 0, 2: 0}


def test_acknowledged_records_survive_a_killed_broker(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    """An append to the killed broker raises; after its restart the same log object works."""
    if not broker.can_be_killed:
        pytest.skip("the broker in REELWAY_KAFKA is not ours to kill")
    log = open_log(broker, broker.topic(1))
    log.append([LogRecord("a", 0, b"a")])
    broker.kill()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(module, "REQUEST_TIMEOUT_S", 2.0)
            with pytest.raises(StorageError, match="not acknowledged"):
                log.append([LogRecord("b", 0, b"b")])
    finally:
        broker.start()
    log.append([LogRecord("c", 0, b"c")])
    found, _ = read_all(log, {}, 2)
    assert [one.payload for one in found] == [b"a", b"c"]
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
