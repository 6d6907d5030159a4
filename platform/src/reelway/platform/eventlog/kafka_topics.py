"""The topics that an event log on Kafka requires: their settings, creation of missing ones, faults of existing ones.

Time in the event log is the brokers' append time, and exposures and outcomes of a viewer are in partitions of the same
number. A topic that lacks either is a fault: features and sums computed from it would be wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from reelway.platform.errors import ConfigError, StorageError
from reelway.platform.eventlog.addresses import KAFKA, client_settings
from reelway.platform.eventlog.topics import COMPACTED, Topic, topic_address

REQUEST_TIMEOUT_S: Final = 30.0
TIMESTAMP_TYPE: Final = "message.timestamp.type"
CLEANUP_POLICY: Final = "cleanup.policy"
_KEYED_BY_VIEWER: Final = frozenset({Topic.EXPOSURES, Topic.OUTCOMES})
_HOUR_MS: Final = 3_600_000


@dataclass(frozen=True)
class TopicSizes:
    """Sizes of new topics."""

    viewer_partitions: int = 12
    video_partitions: int = 3
    replication: int = 3
    min_in_sync: int = 2
    retention_hours: int = 168  # of exposures and outcomes; a compacted topic keeps the newest record of each key


@dataclass(frozen=True)
class KafkaTopic:
    """A topic: as it must be created, or as the brokers describe it."""

    name: str
    partitions: int
    settings: Mapping[str, str]


def required_topics(events: str, sizes: TopicSizes) -> dict[Topic, KafkaTopic]:
    """Returns the topics of the event log at an address.

    Raises:
        ConfigError: if the address is not one of Kafka.
    """
    if not events.startswith(KAFKA):
        raise ConfigError(f"event log {events!r}: expected kafka://host:port[/prefix]; only Kafka has topics to create")
    return {topic: _required_topic(topic, topic_address(events, topic).rpartition("/")[2], sizes) for topic in Topic}


def _required_topic(topic: Topic, name: str, sizes: TopicSizes) -> KafkaTopic:
    settings = {TIMESTAMP_TYPE: "LogAppendTime", "min.insync.replicas": str(sizes.min_in_sync)}
    if topic in COMPACTED:
        settings[CLEANUP_POLICY] = "compact"
    else:
        settings |= {CLEANUP_POLICY: "delete", "retention.ms": str(sizes.retention_hours * _HOUR_MS)}
    partitions = sizes.viewer_partitions if topic in _KEYED_BY_VIEWER else sizes.video_partitions
    return KafkaTopic(name, partitions, settings)


def find_faults(found: Mapping[Topic, KafkaTopic]) -> list[str]:
    """Returns what makes existing topics lose or misread data, each with its remedy."""
    faults = []
    for topic, seen in found.items():
        wanted = {TIMESTAMP_TYPE: "LogAppendTime", CLEANUP_POLICY: "compact" if topic in COMPACTED else "delete"}
        for setting, value in wanted.items():
            if seen.settings.get(setting) != value:
                faults.append(
                    f"topic {seen.name}: {setting} is {seen.settings.get(setting)!r}, expected {value!r}; "
                    f"change it with `kafka-configs.sh --alter --entity-type topics --entity-name {seen.name} "
                    f"--add-config {setting}={value}`"
                )
    keyed = [found[topic] for topic in sorted(_KEYED_BY_VIEWER) if topic in found]
    if len({topic.partitions for topic in keyed}) > 1:
        counts = ", ".join(f"{topic.name} has {topic.partitions}" for topic in keyed)
        faults.append(f"partitions: {counts}; expected equal numbers, because both are keyed by viewer")
    return faults


def create_missing_topics(events: str, sizes: TopicSizes) -> tuple[Sequence[str], Sequence[str]]:
    """Creates the topics that are missing. Returns the names of created and of existing topics.

    A topic that another process creates meanwhile counts as existing.

    Raises:
        ConfigError: if the address or a setting is invalid, or an existing topic has a fault.
        StorageError: if no broker answers, or a topic cannot be created.
    """
    required = required_topics(events, sizes)
    servers = events.removeprefix(KAFKA).partition("/")[0]
    client = _admin_client(servers)
    names = _topic_names(client, servers)
    created = _create(client, [one for one in required.values() if one.name not in names], sizes.replication, servers)
    # A broker may not know a new topic for a moment, so only existing ones are described.
    existing = {topic: one for topic, one in required.items() if one.name not in created}
    if faults := find_faults(required | _describe(client, existing, servers)):
        raise ConfigError("\n".join(faults))
    return created, [one.name for one in existing.values()]


def _admin_client(servers: str) -> Any:
    try:
        import confluent_kafka
        from confluent_kafka import admin
    except ImportError as error:
        raise ConfigError("topics of Kafka require confluent-kafka; install reelway-platform[kafka]") from error
    try:
        return admin.AdminClient({"bootstrap.servers": servers, **client_settings()})
    except (confluent_kafka.KafkaException, ValueError, TypeError) as error:
        raise ConfigError(f"Kafka client for {servers}: {error}") from error


def _topic_names(client: Any, servers: str) -> set[str]:
    from confluent_kafka import KafkaException

    try:
        return set(client.list_topics(timeout=REQUEST_TIMEOUT_S).topics)
    except KafkaException as error:
        raise StorageError(f"Kafka {servers}: cannot list topics: {error}") from error


def _create(client: Any, missing: Iterable[KafkaTopic], replication: int, servers: str) -> list[str]:
    from confluent_kafka import KafkaError, KafkaException, admin

    make: Any = admin.NewTopic  # type: ignore[attr-defined]  # not in __all__
    new = [make(topic.name, topic.partitions, replication, config=dict(topic.settings)) for topic in missing]
    if not new:
        return []
    created = []
    for name, future in client.create_topics(new, operation_timeout=REQUEST_TIMEOUT_S).items():
        try:
            future.result(REQUEST_TIMEOUT_S)
            created.append(str(name))
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise StorageError(f"Kafka {servers}: cannot create topic {name}: {error}") from error
    return created


def _describe(client: Any, topics: Mapping[Topic, KafkaTopic], servers: str) -> dict[Topic, KafkaTopic]:
    from confluent_kafka import KafkaException, TopicCollection, admin

    names = [topic.name for topic in topics.values()]
    if not names:
        return {}
    try:
        partitions = client.describe_topics(TopicCollection(names), request_timeout=REQUEST_TIMEOUT_S)
        resources = [admin.ConfigResource(admin.RESOURCE_TOPIC, name) for name in names]  # type: ignore[attr-defined]
        settings = client.describe_configs(resources, request_timeout=REQUEST_TIMEOUT_S)
        counts = {name: len(future.result(REQUEST_TIMEOUT_S).partitions) for name, future in partitions.items()}
        configs = {
            resource.name: {entry.name: entry.value for entry in future.result(REQUEST_TIMEOUT_S).values()}
            for resource, future in settings.items()
        }
    except KafkaException as error:
        raise StorageError(f"Kafka {servers}: cannot describe topics: {error}") from error
    return {key: KafkaTopic(one.name, counts[one.name], configs[one.name]) for key, one in topics.items()}
