"""Catalogue changes: the codec, the order of versions, and the guard of compacted topics."""

from __future__ import annotations

import itertools
import json
import time
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.support.dimensions import DIMENSIONS
from tests.support.eventlog.kafka_broker import Broker

from reelway.platform.errors import StorageError
from reelway.platform.eventlog.catalogue_events import (
    Restore,
    Takedown,
    TakedownState,
    VideoUpsert,
    as_record,
    decode_status_changes,
    decode_upserts,
    explain_first_problem,
    parse_change,
)
from reelway.platform.eventlog.catalogue_log import CataloguePublisher, VersionGuard, is_at
from reelway.platform.eventlog.event_log import LogRecord, Offsets, ReadBatch, StoredRecord
from reelway.platform.eventlog.kafka_log import KafkaLog
from reelway.platform.eventlog.sqlite_log import SqliteLog
from reelway.platform.eventlog.topics import Topic, open_topic

UPLOAD = {
    "video_id": 7, "creator_id": 3, "uploaded_at": "2024-06-10T06:13:20Z", "duration_ms": 15_000, "topic": 2,
    "language": "de", "title": "Öl", "visual": [0.5] * 32, "version": 10,
}  # fmt: skip

status_changes = st.builds(
    lambda down, creator, entity, version, reason: (Takedown if down else Restore)(
        **{"creator_id" if creator else "video_id": entity}, version=version, reason=reason
    ),
    st.booleans(), st.booleans(), st.integers(0, 3), st.integers(0, 4), st.sampled_from(["spam", "law"]),
)  # fmt: skip


def stored(payloads: list[bytes]) -> list[StoredRecord]:
    return [StoredRecord(0, offset, 0, payload) for offset, payload in enumerate(payloads)]


def test_upsert_round_trips_through_its_record() -> None:
    upsert = VideoUpsert.model_validate(UPLOAD)
    record = as_record(upsert, partitions=4)
    assert (record.key, record.partition) == ("video:7", as_record(upsert, 4).partition)
    assert decode_upserts(stored([record.payload])) == ([upsert], 0)


def test_reader_ignores_unknown_fields_and_counts_bad_records() -> None:
    newer = json.dumps({**UPLOAD, "op": "upsert", "codec": "av1"}).encode()
    takedown = Takedown(video_id=7, reason="spam", version=1).payload()
    upserts, bad = decode_upserts(stored([newer, b"not json", b"", takedown]))
    assert [upsert and upsert.video_id for upsert in upserts] == [7, None, None, None]
    assert bad == 2  # the tombstone is no mistake
    changes, bad = decode_status_changes(stored([takedown, b'{"op":"takedown"}, {"op":"takedown"}']))
    assert (changes[0] is not None, changes[1], bad) == (True, None, 1)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({**UPLOAD, "op": "upsert", "topic": "cats"}, "topic: saw 'cats', expected a valid integer"),
        ({**UPLOAD, "op": "upsert", "visual": [float("nan")]}, "visual.0: saw 'nan', expected a finite number"),
        ({"op": "takedown", "video_id": 1}, "reason: missing"),
        ({"op": "restore", "video_id": 1, "creator_id": 2}, "expected either video_id or creator_id"),
        ({"op": "takedown", "video_id": -1, "reason": "x"}, "video_id: saw '-1', expected greater than"),
    ],
)
def test_invalid_change_is_explained_with_field_and_value(change: dict[str, object], problem: str) -> None:
    with pytest.raises(ValidationError) as caught:
        parse_change(change)
    assert explain_first_problem(caught.value).startswith(problem)


def test_upsert_of_other_dimensions_has_a_problem() -> None:
    upsert = VideoUpsert.model_validate({**UPLOAD, "visual": [0.5]})
    assert upsert.problem(DIMENSIONS) == "visual: saw 1 values, expected 32 or none"
    assert VideoUpsert.model_validate({**UPLOAD, "topic": 32}).problem(DIMENSIONS) == "topic: saw 32, expected -1..31"
    assert VideoUpsert.model_validate(UPLOAD).problem(DIMENSIONS) is None


@given(st.lists(status_changes, max_size=8), st.randoms(use_true_random=False))
@settings(max_examples=200)
def test_takedown_state_is_the_same_for_every_order(changes: list[Takedown | Restore], random: object) -> None:
    in_order, shuffled = TakedownState(), TakedownState()
    in_order.apply(changes)
    others = [*changes, *changes[:3]]  # repeated records have no effect
    random.shuffle(others)  # type: ignore[attr-defined]
    for change in others:
        shuffled.apply([change])
    assert shuffled.takedowns() == in_order.takedowns()
    down = in_order.taken_down()
    by_key = itertools.groupby(sorted(changes, key=lambda change: change.key), key=lambda change: change.key)
    newest = {key: max(of_key, key=lambda change: change.precedence) for key, of_key in by_key}
    expected = sorted(key for key, change in newest.items() if isinstance(change, Takedown))
    assert expected == sorted([f"video:{v}" for v in down.videos] + [f"creator:{c}" for c in down.creators])


@given(st.lists(st.lists(status_changes, max_size=4), max_size=4))
def test_changed_status_names_exactly_the_differences(batches: list[list[Takedown | Restore]]) -> None:
    state = TakedownState()
    for batch in batches:
        before = state.taken_down()
        changed, after = state.apply(batch), state.taken_down()
        assert set(changed.videos) == set(before.videos) ^ set(after.videos)
        assert set(changed.creators) == set(before.creators) ^ set(after.creators)


def test_guard_appends_the_newest_version_after_an_older_one(tmp_path: Path) -> None:
    new, old = (Takedown(video_id=7, reason="spam", version=version) for version in (2, 1))
    with closing(open_topic(tmp_path, Topic.TAKEDOWNS)) as takedowns:
        guard = VersionGuard(takedowns, decode_status_changes)
        takedowns.append([as_record(new, 1)])
        assert guard.step() == (1, 0, 0)
        takedowns.append([as_record(old, 1), LogRecord("x", 0, b"not json"), as_record(old, 1)])
        assert guard.step() == (3, 1, 0)
        assert guard.step() == (1, 0, 0)
        last = takedowns.read({0: 5}, limit=10).records
    assert [change for change, _ in [decode_status_changes(last)]] == [[new]]


def test_publisher_reads_back_the_takedowns_in_effect(tmp_path: Path) -> None:
    with closing(CataloguePublisher(tmp_path)) as publisher:
        publisher.publish(
            [
                Takedown(creator_id=3, reason="law", version=5),
                VideoUpsert.model_validate(UPLOAD),
                Restore(creator_id=3, version=4),
                Takedown(video_id=1, reason="spam", version=1),
                Restore(video_id=1, version=2),
            ]
        )
        state = publisher.read_takedowns()
        assert [change.key for change in state.takedowns()] == ["creator:3"]
        assert publisher.end_offsets() == {Topic.CATALOGUE: {0: 2}, Topic.TAKEDOWNS: {0: 5}}


class HesitantLog(SqliteLog):
    """A log whose next reads find nothing, as Kafka's do while a partition has no leader."""

    empty_reads = 0

    def read(self, position: Offsets, *, limit: int, wait_s: float = 0.0) -> ReadBatch:
        if not self.empty_reads:
            return super().read(position, limit=limit, wait_s=wait_s)
        self.empty_reads -= 1
        return ReadBatch([], position, 0)


def test_takedowns_are_read_to_the_end_or_not_at_all(tmp_path: Path) -> None:
    with closing(CataloguePublisher(tmp_path)) as publisher:
        publisher.publish([Takedown(video_id=1, reason="spam", version=1)])
        with closing(HesitantLog(tmp_path / "takedowns.db")) as hesitant:
            publisher._logs[Topic.TAKEDOWNS].close()
            publisher._logs[Topic.TAKEDOWNS] = hesitant
            hesitant.empty_reads = 3
            assert [change.key for change in publisher.read_takedowns().takedowns()] == ["video:1"]
            hesitant.empty_reads = 1_000
            with pytest.raises(StorageError, match="nothing can be read after"):
                publisher.read_takedowns()


def test_takedowns_are_read_without_deleted_last_records(tmp_path: Path) -> None:
    with closing(SqliteLog(tmp_path / "takedowns.db", retain_s=-60.0)) as takedowns:
        takedowns.append([LogRecord("x", 0, b"")])
        assert takedowns.apply_retention() == 1
    with closing(CataloguePublisher(tmp_path)) as publisher:
        assert publisher.read_takedowns().takedowns() == []


class TwoPartitions(SqliteLog):
    """The file's records are of partition 1. Partition 0 gets some after its end was asked for; they are read first."""

    partitions = 2
    busy_reads = 0

    def end_offsets(self) -> Offsets:
        self.busy_reads = 3
        return {0: 0, 1: super().end_offsets()[0]}

    def read(self, position: Offsets, *, limit: int, wait_s: float = 0.0) -> ReadBatch:
        if self.busy_reads:
            self.busy_reads -= 1
            others = [Takedown(video_id=9, reason="law", version=9).payload()]
            return ReadBatch(stored(others), {**position, 0: position.get(0, 0) + 1}, 0)
        read = super().read({0: position.get(1, 1)}, limit=limit, wait_s=wait_s)
        moved = [record._replace(partition=1) for record in read.records]
        return ReadBatch(moved, {0: position.get(0, 0), 1: read.next_offsets[0]}, read.watermark_us)


def test_guard_repairs_a_key_while_other_partitions_grow(tmp_path: Path) -> None:
    new, old = (Takedown(video_id=7, reason="spam", version=version) for version in (2, 1))
    with closing(TwoPartitions(tmp_path / "takedowns.db")) as takedowns:
        guard = VersionGuard(takedowns, decode_status_changes)
        takedowns.append([as_record(new, 1)])
        while not guard.is_at_end:
            guard.step()
        takedowns.append([as_record(old, 1)])
        assert guard.step() == (1, 1, 0)
        last = takedowns.read({1: 3}, limit=10).records
    assert decode_status_changes(last)[0] == [new]


def test_guard_counts_a_record_that_is_gone(tmp_path: Path) -> None:
    new, old = (Takedown(video_id=7, reason="spam", version=version) for version in (2, 1))
    with closing(SqliteLog(tmp_path / "takedowns.db", retain_s=-60.0)) as takedowns:
        guard = VersionGuard(takedowns, decode_status_changes)
        takedowns.append([as_record(new, 1)])
        guard.step()
        takedowns.append([as_record(old, 1)])
        assert takedowns.apply_retention() == 1
        assert guard.step() == (1, 0, 1)


@pytest.mark.kafka
def test_guard_repairs_the_order_of_versions_on_kafka(broker: Broker) -> None:
    """The record that compaction keeps, the last of its key, is the newest version."""
    with closing(KafkaLog(broker.servers, broker.topic(3, {"cleanup.policy": "compact"}))) as takedowns:
        guard = VersionGuard(takedowns, decode_status_changes)
        changes = [Takedown(video_id=video, reason="spam", version=version) for version in (2, 1) for video in range(9)]
        takedowns.append([as_record(change, 3) for change in changes])
        appended, deadline = 0, time.monotonic() + 30
        while appended < 9 or not guard.is_at_end:
            assert time.monotonic() < deadline
            appended += guard.step().appended
        last: dict[str, int] = {}
        position: Offsets = {}
        while not is_at(position, takedowns.end_offsets()):
            read = takedowns.read(position, limit=100)
            position = read.next_offsets
            last |= {change.key: change.version for change in decode_status_changes(read.records)[0] if change}
    assert last == {f"video:{video}": 2 for video in range(9)}
