"""Erasure from the event log: SQLite files lose the rows, Kafka gets a record after which readers leave them out."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pytest
from confluent_kafka.admin import NewTopic
from tests.support.eventlog.kafka_broker import Broker
from tests.support.pipelines.stream_fixtures import LoggedEvent, record_of

from reelway.platform.contracts.events import OutcomeType
from reelway.platform.erasure.event_topics import erase_from_topics
from reelway.platform.erasure.request import ErasedStore, ErasureRequest, ErasureState
from reelway.platform.errors import DataError
from reelway.platform.eventlog import LogRecord
from reelway.platform.eventlog.arrow_records import encode_rows, viewer_partitions
from reelway.platform.eventlog.erasures import (
    VIEWER_TOPICS,
    anonymised_record,
    encode_erasures,
    erased_viewers,
    viewer_rows,
)
from reelway.platform.eventlog.exposure_events import decode_exposures
from reelway.platform.eventlog.outcome_events import decode_outcomes
from reelway.platform.eventlog.retained_records import records_of_partition
from reelway.platform.eventlog.topics import Topic, open_topic
from reelway.platform.run_directory import RunDirectory

ERASED, KEPT = 7_777_777_777_777_777, 3


def exposure(number: int, *viewers: int) -> LogRecord:
    return record_of([LoggedEvent(number * 10 + i, one, 1, None, 1.0, 5, 6) for i, one in enumerate(viewers)], number)


def outcome(number: int, *viewers: int) -> LogRecord:
    events = [LoggedEvent(number * 10 + i, one, 1, OutcomeType.LIKE, 1.0, 5, 6) for i, one in enumerate(viewers)]
    return record_of(events, number)


def erase(run: RunDirectory, *viewers: int, events: str = "", dry_run: bool = False) -> dict[str, ErasedStore]:
    return {one.store: one for one in erase_from_topics(ErasureRequest(run, viewers, dry_run, events))}


def viewers_of(payload: bytes) -> list[int]:
    return decode_exposures(payload)["viewer_id"].to_pylist() if payload else []


def test_sqlite_log_keeps_other_rows_at_their_offsets(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with closing(open_topic(run.events, Topic.EXPOSURES)) as log:
        offsets = log.append(
            [exposure(1, KEPT, ERASED, KEPT), exposure(2, ERASED), exposure(3, KEPT), LogRecord("damaged", 0, b"?")]
        )
        before = {one.offset: one.time_us for one in log.read({}, limit=9).records}
        assert erase(run, ERASED, dry_run=True)[Topic.EXPOSURES].found == 2
        done = erase(run, ERASED)[Topic.EXPOSURES]
        assert (done.found, done.removed, done.state) == (2, 2, ErasureState.ERASED)
        assert "1 unreadable" in done.note
        *records, damaged, named = log.read({}, limit=9).records
        assert [one.offset for one in records] == offsets[:3]
        first, second, third = (viewers_of(one.payload) for one in records)
        assert (first[0], first[2], third) == (KEPT, KEPT, [KEPT])
        assert first[1] < -1
        assert second[0] < -1
        assert first[1] != second[0], "the same viewer"
        assert damaged.payload == b"?"
        assert [before[one.offset] for one in records] == [one.time_us for one in records]
        assert erased_viewers(named.payload).tolist() == [ERASED]
        assert decode_exposures(named.payload).num_rows == 0
        assert erase(run, ERASED)[Topic.EXPOSURES].found == 0
        assert log.end_offsets() == {0: named.offset + 1}


def test_sqlite_files_hold_no_byte_of_the_viewer(tmp_path: Path) -> None:
    run, viewer = RunDirectory(tmp_path), ERASED.to_bytes(8, "little")

    def held() -> bytes:
        return b"".join(path.read_bytes() for path in run.events.iterdir())

    with closing(open_topic(run.events, Topic.OUTCOMES)) as log:
        log.append([outcome(number, ERASED) for number in range(50)])
        assert viewer in held()
        assert erase(run, ERASED)[Topic.OUTCOMES].removed == 50
        assert viewer not in held()


def test_viewer_who_returns_is_erased_again(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with closing(open_topic(run.events, Topic.OUTCOMES)) as log:
        log.append([outcome(1, ERASED)])
        erase(run, ERASED)
        log.append([outcome(2, ERASED)])
        assert erase(run, ERASED)[Topic.OUTCOMES].removed == 1
        assert sum(len(erased_viewers(one.payload)) for one in log.read({}, limit=9).records) == 2


def test_record_without_erasure_erases_nobody() -> None:
    marked = encode_rows(pa.record_batch({"viewer_id": [1], "text": ["reelway.erased_viewers"]}))
    assert erased_viewers(marked).tolist() == []
    assert erased_viewers(b"reelway.erased_viewers").tolist() == []
    assert erased_viewers(b"").tolist() == []


def test_record_keeps_columns_of_newer_versions() -> None:
    rows = pa.record_batch({"viewer_id": [1, 2], "impression_id": [7, 8], "newer": ["a", "b"]})
    payload = encode_rows(rows)
    after = pa.ipc.open_stream(anonymised_record(payload, np.array([1]))).read_all()
    assert after["newer"].to_pylist() == ["a", "b"]
    assert after["viewer_id"].to_pylist()[1] == 2
    assert anonymised_record(payload, np.array([3])) is payload
    with pytest.raises(DataError):
        viewer_rows(b"?", np.array([1]))


def test_erasures_are_in_the_partitions_of_their_viewers() -> None:
    viewers = list(range(40))
    records = list(encode_erasures(viewers, Topic.OUTCOMES, 4))
    assert sorted(viewer for one in records for viewer in erased_viewers(one.payload).tolist()) == viewers
    for one in records:
        assert (viewer_partitions(erased_viewers(one.payload), 4) == one.partition).all()
        assert decode_outcomes(one.payload).num_rows == 0


@pytest.mark.long
@pytest.mark.kafka
def test_kafka_rows_are_hidden_until_retention(broker: Broker, tmp_path: Path) -> None:
    prefix, partitions = f"e{uuid4().hex[:8]}-", 3
    broker.create_topics([NewTopic(prefix + one, partitions, 1) for one in VIEWER_TOPICS])
    events, run = f"kafka://{broker.servers}/{prefix}", RunDirectory(tmp_path)
    partition = int(viewer_partitions(np.array([ERASED]), partitions)[0])
    with closing(open_topic(events, Topic.EXPOSURES)) as log:
        log.append([exposure(n, ERASED, ERASED)._replace(partition=partition) for n in range(3)])
        looked = erase(run, ERASED, events=events, dry_run=True)[Topic.EXPOSURES]
        assert (looked.found, looked.removed, looked.state) == (6, 0, ErasureState.FOUND)
        done = erase(run, ERASED, events=events)[Topic.EXPOSURES]
        assert (done.found, done.removed, done.state) == (6, 6, ErasureState.HIDDEN)
        assert "retention deletes 6 rows" in done.note
        again = erase(run, ERASED, events=events)[Topic.EXPOSURES]
        assert (again.found, again.removed, again.state) == (0, 0, ErasureState.HIDDEN)
        records = list(records_of_partition(log, partition, None, log.end_offsets()))
        assert [erased_viewers(one.payload).tolist() for one in records] == [[], [], [], [ERASED]]
