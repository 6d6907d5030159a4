"""Members of a cluster's stream over a real Kafka broker: killed at any time, they write the rows of one process."""

from __future__ import annotations

import random
import signal
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer
from tests.support.dimensions import DIMENSIONS
from tests.support.eventlog.kafka_broker import Broker
from tests.support.pipelines.stream_fixtures import LoggedEvent, record_of
from tests.support.pipelines.stream_members import (
    FINE_VIEWS,
    Members,
    RowKey,
    create_log,
    expected_rows,
    load,
    prefix_of,
    read_rows,
    write_stream_inputs,
)
from tests.support.process_life import SIGNALS, marked_command, printed

from reelway.pipelines.features.materialisation import materialise
from reelway.pipelines.features.registry import register_features
from reelway.pipelines.features.stream.quix_service import stream_clock
from reelway.pipelines.features.stream.rules import VIDEO_VIEWS
from reelway.pipelines.features.stream.service import TOPICS
from reelway.platform.cli.processes import reelway_command
from reelway.platform.contracts.events import OutcomeType
from reelway.platform.eventlog.erasures import encode_erasures
from reelway.platform.eventlog.feature_changelog import FeatureChangelog
from reelway.platform.eventlog.topics import Topic, open_topic
from reelway.platform.features.feast_store import open_feature_store
from reelway.platform.features.viewer_rows import ViewerRowReader
from reelway.platform.run_directory import RunDirectory

pytestmark = [pytest.mark.long, pytest.mark.kafka, pytest.mark.timeout(400)]

PARTITIONS = 3


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    until_us = write_stream_inputs(run, FINE_VIEWS)
    register_features(run.features, DIMENSIONS, "sqlite")
    materialise(run.features, until_us / 1e6)
    return run


@pytest.fixture
def events(broker: Broker) -> str:
    """An event log: partition 0 of exposures was emptied by retention, 1 and 2 begin with transactions' markers."""
    events = create_log(broker, PARTITIONS)
    name = prefix_of(events) + Topic.EXPOSURES
    producer = Producer({"bootstrap.servers": broker.servers, "transactional.id": name})
    producer.init_transactions(10)
    producer.begin_transaction()
    producer.produce(name, None, partition=1)
    producer.produce(name, None, partition=2)
    producer.commit_transaction(10)
    plain = Producer({"bootstrap.servers": broker.servers})
    plain.produce(name, b"old", partition=0)
    assert plain.flush(10) == 0
    broker.delete_records(name, 0, 1)
    return events


def test_rows_of_killed_members_equal_those_of_one_process(
    run: RunDirectory, events: str, broker: Broker, tmp_path: Path
) -> None:
    """Two members are killed in turn under load; one of them loses its state."""
    rng = random.Random(7)
    members = Members(run, events, tmp_path / "members")
    try:
        for name in "ab":
            members.start(name)
        with load(events, rng) as appended:
            time.sleep(15)
            for number in range(4):
                name = rng.choice("ab")
                members.kill(name, lose_state=number == 2)
                time.sleep(rng.uniform(0, 3))
                members.start(name)
                time.sleep(rng.uniform(4, 10))
        assert appended[0] > 200
        with ExitStack() as stack:
            logs = {topic: stack.enter_context(closing(open_topic(events, topic))) for topic in TOPICS}
            clock = stream_clock(run, logs)
        until_us = time.time_ns() // 1000 - clock.behind_us + 2_000_000
        rows, values = read_rows(broker, prefix_of(events), PARTITIONS, until_us, members.output)
        expected = expected_rows(run, events, tmp_path, until_us)
        after = {key: count for key, count in rows.items() if clock.began_us < key[2] <= until_us}
        wanted = {key for key in expected if clock.began_us < key[2] <= until_us}
        assert {key for key, count in after.items() if count > 1} == set(), "doubled"
        assert wanted - set(after) == set(), "lost"
        assert set(after) - wanted == set()
        assert {view for view, _, _ in wanted} == {
            *VIDEO_VIEWS,
            "viewer_activity",
            "viewer_topic_affinity",
            "viewer_history",
        }
        for key in wanted:
            assert values[key] == expected[key], key
        assert_delivered(run, expected, until_us)
        assert [members.stop(name) for name in "ab"] == [0, 0], members.output()
    finally:
        members.close()


def assert_delivered(run: RunDirectory, expected: dict[RowKey, Any], until_us: int) -> None:
    """The online store and the changelog have each entity's newest row."""
    histories = {entity: at for view, entity, at in sorted(expected) if view == "viewer_history" and at <= until_us}
    rows = ViewerRowReader(open_feature_store(run.features))
    for viewer, at_us in histories.items():
        stored = rows.read(viewer)
        assert list(stored["history_videos"]) == expected["viewer_history", viewer, at_us]["history_videos"]
    changes = FeatureChangelog(run.overlay).changes_after(0)
    assert [change.sequence for change in changes] == sorted({change.sequence for change in changes})
    newest = {
        (row["view"], row["entity_id"]): int(row["event_timestamp"].timestamp() * 1e6)
        for change in changes
        for row in change.rows.to_pylist()
    }
    wanted = {
        (view, entity): at for view, entity, at in sorted(expected, key=lambda key: key[2])
        if view in VIDEO_VIEWS and at <= until_us
    }  # fmt: skip
    assert {key: at for key, at in newest.items() if key in wanted and at <= until_us}.items() <= wanted.items()
    assert set(wanted) <= set(newest)


def test_member_stores_megabytes_of_one_viewer(run: RunDirectory, broker: Broker, tmp_path: Path) -> None:
    """30,000 likes at once: 2 MB of pending events, and 1.4 MB of impressions that may still be revised."""
    events, viewer, impressions = create_log(broker, 1), 500, range(10**9, 10**9 + 30_000)
    members = Members(run, events, tmp_path / "members")
    try:
        with ExitStack() as stack:
            logs = {topic: stack.enter_context(closing(open_topic(events, topic))) for topic in TOPICS}
            now_us = time.time_ns() // 1000
            likes = [
                LoggedEvent(impression, viewer, 1000 + impression % 60, OutcomeType.LIKE, 1.0, now_us, now_us)
                for impression in impressions
            ]
            starts = range(0, len(likes), 1_000)
            records = [record_of(likes[start : start + 1_000], start, stamped=False) for start in starts]
            members.start("a")
            logs[Topic.OUTCOMES].append(records)
            until_us = time.time_ns() // 1000 - stream_clock(run, logs).behind_us + 2_000_000
        _, values = read_rows(broker, prefix_of(events), 1, until_us, members.output)
        histories = {
            at_us: fields["history_videos"]
            for (view, entity, at_us), fields in values.items()
            if view == "viewer_history" and entity == viewer and at_us <= until_us
        }
        newest = [like.video for like in likes[-DIMENSIONS.history_length :]]
        assert histories[max(histories)] == newest, members.output()
        assert members.stop("a") == 0, members.output()
    finally:
        members.close()


@pytest.mark.parametrize(("number", "group"), SIGNALS)
def test_member_ends_cleanly_at_a_stop_signal(
    run: RunDirectory, events: str, tmp_path: Path, number: signal.Signals, group: bool
) -> None:
    command = reelway_command("stream", "--run", str(run.path), "--events", events, "--state", str(tmp_path / "state"))
    with marked_command(command, tmp_path / "log", printed("updating the features")) as member:
        with load(events, random.Random(7)):
            time.sleep(15)
            ending = member.stop(number, group=group)
        assert ending.clean, (ending, member.log.read_text())
        assert ending.code == 0, member.log.read_text()


def test_erased_viewer_leaves_state_and_online_store(run: RunDirectory, broker: Broker, tmp_path: Path) -> None:
    """The member reads the erasure in the log; what the viewer does afterwards counts again."""
    events, erased, other = create_log(broker, 1), 507, 508
    members = Members(run, events, tmp_path / "members")
    rows = ViewerRowReader(open_feature_store(run.features))

    def history_of(viewer: int) -> list[int]:
        return list(rows.read(viewer)["history_videos"] or [])

    def wait_for(viewer: int, newest: int | None) -> None:
        deadline = time.monotonic() + 90
        while (history_of(viewer) or [None])[-1] != newest:
            assert time.monotonic() < deadline, members.output()
            time.sleep(0.2)

    try:
        with ExitStack() as stack:
            logs = {topic: stack.enter_context(closing(open_topic(events, topic))) for topic in TOPICS}

            def like(number: int, viewer: int, video: int) -> None:
                now_us = time.time_ns() // 1000
                event = LoggedEvent(10**9 + number, viewer, video, OutcomeType.LIKE, 1.0, now_us, now_us)
                logs[Topic.OUTCOMES].append([record_of([event], number, stamped=False)])

            members.start("a")
            like(1, erased, 1001)
            like(2, other, 1002)
            wait_for(erased, 1001)
            wait_for(other, 1002)
            for topic, log in logs.items():
                log.append(list(encode_erasures([erased], topic, 1)))
            wait_for(erased, None)
            assert set(rows.read(erased).values()) == {None}
            like(3, other, 1003)
            wait_for(other, 1003)
            assert history_of(erased) == []
            like(4, erased, 1004)
            wait_for(erased, 1004)
            assert history_of(erased) == [1004]
            assert len(history_of(other)) > 2
        assert members.stop("a") == 0, members.output()
    finally:
        members.close()
