"""The topics of an event log on Kafka: their settings, and creation on a real broker."""

from __future__ import annotations

from dataclasses import replace
from uuid import uuid4

import pytest
from confluent_kafka.admin import NewTopic
from tests.support.eventlog.kafka_broker import Broker
from typer.testing import CliRunner

from reelway.platform.cli.main import build_app
from reelway.platform.errors import ConfigError
from reelway.platform.eventlog.kafka_topics import (
    CLEANUP_POLICY,
    TIMESTAMP_TYPE,
    TopicSizes,
    create_missing_topics,
    find_faults,
    required_topics,
)
from reelway.platform.eventlog.topics import COMPACTED, Topic, open_topic

SIZES = TopicSizes(viewer_partitions=4, video_partitions=2, replication=1, min_in_sync=1, retention_hours=48)


def test_required_topics_cover_every_topic_of_the_log() -> None:
    required = required_topics("kafka://a:9092,b:9093/live-", SIZES)
    assert {topic: one.name for topic, one in required.items()} == {topic: f"live-{topic}" for topic in Topic}
    assert {one.settings[TIMESTAMP_TYPE] for one in required.values()} == {"LogAppendTime"}
    assert {topic for topic, one in required.items() if one.settings[CLEANUP_POLICY] == "compact"} == COMPACTED
    assert required[Topic.EXPOSURES].partitions == required[Topic.OUTCOMES].partitions == 4
    assert required[Topic.TAKEDOWNS].partitions == 2


def test_compacted_topics_have_no_retention() -> None:
    for topic, one in required_topics("kafka://a:9092", SIZES).items():
        assert ("retention.ms" in one.settings) is (topic not in COMPACTED)
    assert required_topics("kafka://a:9092", SIZES)[Topic.OUTCOMES].settings["retention.ms"] == "172800000"


def test_folder_has_no_topics_to_create() -> None:
    with pytest.raises(ConfigError, match=r"runs/events.*kafka://host:port"):
        required_topics("runs/events", SIZES)


def test_required_topics_have_no_fault() -> None:
    assert find_faults(required_topics("kafka://a:9092", SIZES)) == []


@pytest.mark.parametrize(
    ("topic", "setting", "value"),
    [
        (Topic.OUTCOMES, TIMESTAMP_TYPE, "CreateTime"),
        (Topic.TAKEDOWNS, CLEANUP_POLICY, "delete"),
        (Topic.EXPOSURES, CLEANUP_POLICY, "compact"),
    ],
)
def test_fault_names_topic_setting_with_remedy(topic: Topic, setting: str, value: str) -> None:
    found = required_topics("kafka://a:9092", SIZES)
    found[topic] = replace(found[topic], settings={**found[topic].settings, setting: value})
    (fault,) = find_faults(found)
    assert all(word in fault for word in (topic, setting, repr(value), "kafka-configs.sh --alter"))


def test_unequal_partitions_of_viewers_are_a_fault() -> None:
    found = required_topics("kafka://a:9092", SIZES)
    found[Topic.OUTCOMES] = replace(found[Topic.OUTCOMES], partitions=5)
    (fault,) = find_faults(found)
    assert "exposures has 4, outcomes has 5" in fault


@pytest.mark.long
@pytest.mark.kafka
def test_missing_topics_are_created_once(broker: Broker) -> None:
    events = f"kafka://{broker.servers}/{uuid4().hex[:8]}-"
    names = sorted(one.name for one in required_topics(events, SIZES).values())
    created, existing = create_missing_topics(events, SIZES)
    assert (sorted(created), list(existing)) == (names, [])
    for topic in Topic:
        log = open_topic(events, topic)
        assert log.partitions == (4 if topic in (Topic.EXPOSURES, Topic.OUTCOMES) else 2)
        log.close()
    again = replace(SIZES, viewer_partitions=9)
    created, existing = create_missing_topics(events, again)
    assert (list(created), sorted(existing)) == ([], names)


@pytest.mark.long
@pytest.mark.kafka
def test_command_fails_on_a_topic_with_client_timestamps(broker: Broker) -> None:
    prefix = f"{uuid4().hex[:8]}-"
    outcomes = NewTopic(f"{prefix}outcomes", 12, 1, config={TIMESTAMP_TYPE: "CreateTime", CLEANUP_POLICY: "delete"})
    for future in broker.admin.create_topics([outcomes]).values():
        future.result(30)
    arguments = ["topics", "create", "--events", f"kafka://{broker.servers}/{prefix}", "--replication", "1"]
    done = CliRunner().invoke(build_app(), [*arguments, "--min-in-sync", "1"])
    assert isinstance(done.exception, ConfigError)
    assert f"topic {prefix}outcomes: {TIMESTAMP_TYPE} is 'CreateTime'" in str(done.exception)
