"""Addresses of topics, and exposures as records."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from reelway.platform.errors import ConfigError
from reelway.platform.eventlog import LogRecord
from reelway.platform.eventlog.exposure_events import EXPOSURE_EVENT_SCHEMA, decode_exposures, encode_exposures
from reelway.platform.eventlog.topics import Topic, open_topic, topic_address


@pytest.mark.parametrize(
    ("events", "address"),
    [
        ("runs/demo/events", "runs/demo/events/outcomes.db"),
        ("kafka://a:9092,b:9092", "kafka://a:9092,b:9092/outcomes"),
        ("kafka://a:9092/reelway.", "kafka://a:9092/reelway.outcomes"),
    ],
)
def test_topic_address_names_a_file_or_a_kafka_topic(events: str, address: str) -> None:
    assert topic_address(events, Topic.OUTCOMES) == address


@pytest.mark.parametrize("events", ["kafka://", "kafka:///outcomes", "kafka://a:9092/x/y", "s3://bucket/events"])
def test_topic_address_rejects_other_addresses(events: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        topic_address(events, Topic.OUTCOMES)


def test_exposures_round_trip_through_a_local_topic(tmp_path: Path) -> None:
    rows = [
        {
            "request_id": request, "impression_id": 10 * request + position, "viewer_id": request % 2,
            "video_id": 100 + position, "position": position, "shown_at": 5, "request_time": 6, "release": "r",
            "arm": "stable", "rollout": "", "weight": 0.0, "slices": 0, "source": "ann", "score": 0.5,
            "propensity": 1.0, "creator_id": 9, "topic": None, "duration_ms": 8_000, "device": "phone",
            "region": "emea", "language": None, "authenticated": position == 0,
        }
        for request in (1, 2)
        for position in (0, 1)
    ]  # fmt: skip
    columns = [pa.array([row[field.name] for row in rows]) for field in EXPOSURE_EVENT_SCHEMA]
    arrays = [
        column.cast(pa.int64()).cast(field.type) if pa.types.is_timestamp(field.type) else column.cast(field.type)
        for column, field in zip(columns, EXPOSURE_EVENT_SCHEMA, strict=True)
    ]
    batch = pa.RecordBatch.from_arrays(arrays, schema=EXPOSURE_EVENT_SCHEMA)
    log = open_topic(tmp_path / "events", Topic.EXPOSURES)
    log.append(list(encode_exposures(batch, log.partitions, log.max_record_bytes)))
    (record,) = log.read({}, limit=10).records
    assert decode_exposures(record.payload).to_pylist() == batch.to_pylist()
    log.close()


@pytest.mark.parametrize("topic", [Topic.EXPOSURES, Topic.CATALOGUE])
def test_local_topic_takes_times_from_the_clock(tmp_path: Path, topic: Topic) -> None:
    log = open_topic(tmp_path / "events", topic, lambda: 1_000.5)
    log.append([LogRecord("a", 0, b"x")])
    assert log.read({}, limit=10).records[0].time_us == 1_000_500_000
    log.close()
