"""The event log as a Kafka topic, for clusters. The operator of the Kafka cluster creates the topic.

An append returns once all in-sync replicas have the records (``acks=all``). The topic's ``min.insync.replicas`` sets
how many those are, and the topic's configuration sets the retention. The client library is imported when a log is
opened.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from reelway.platform.errors import ConfigError, StorageError
from reelway.platform.eventlog.event_log import LogRecord, Offsets, ReadBatch, StoredRecord

if TYPE_CHECKING:
    from confluent_kafka import Consumer, Message, Producer, TopicPartition

REQUEST_TIMEOUT_S: Final = 20.0
"""Timeout of one request to the brokers, and of one append."""
_READER_GROUP: Final = "reelway-reader"  # consumer group of reads, which ignore committed offsets


class KafkaLog:
    """An ``EventLog`` on a Kafka topic.

    Args:
        servers: ``host:port``, several separated by commas.
        topic: must exist.
        settings: librdkafka settings that override the defaults: ``security.protocol``, ``sasl.username``, ...

    Raises:
        ConfigError: if librdkafka rejects a setting, or the client library is not installed.
        StorageError: if no broker answers, or the topic does not exist.
    """

    def __init__(self, servers: str, topic: str, settings: Mapping[str, Any] | None = None) -> None:
        try:
            import confluent_kafka
        except ImportError as error:
            raise ConfigError(
                "an event log on Kafka requires confluent-kafka; install reelway-platform[kafka]"
            ) from error
        self._kafka = confluent_kafka
        self._topic = topic
        self._settings = {"bootstrap.servers": servers, **(settings or {})}
        self._lock = threading.RLock()
        self._producer: Producer | None = None
        self._reader: Consumer | None = None
        self._read_to: dict[int, int] | None = None
        self._last_us: dict[int, int] = {}
        try:
            self._offset_consumer = confluent_kafka.Consumer(
                {**self._settings, "group.id": _READER_GROUP, "enable.auto.commit": False}
            )
        except (confluent_kafka.KafkaException, ValueError, TypeError) as error:
            raise ConfigError(f"Kafka client for {servers}: {error}") from error
        self.partitions = self._count_partitions()

    def append(self, records: Sequence[LogRecord]) -> list[int]:
        """See ``EventLog.append``."""
        offsets: dict[int, int] = {}
        errors: list[str] = []

        def on_delivery(index: int) -> Callable[[Any, Message], None]:
            def delivered(error: Any, message: Message) -> None:
                if error is not None:
                    errors.append(str(error))
                else:
                    offsets[index] = int(message.offset() or 0)

            return delivered

        with self._lock:
            producer = self._get_producer()
            try:
                for index, record in enumerate(records):
                    producer.produce(
                        self._topic, record.payload, key=record.id.encode(), partition=record.partition,
                        timestamp=record.time_us // 1000, headers={"time_us": str(record.time_us).encode()},
                        on_delivery=on_delivery(index),
                    )  # fmt: skip
                left = producer.flush(REQUEST_TIMEOUT_S)
            except (self._kafka.KafkaException, BufferError) as error:
                raise StorageError(f"{self._where}: cannot append: {error}; append it again") from error
            if left or errors:
                producer.purge()
                self._producer = None
                reason = errors[0] if errors else f"no answer within {REQUEST_TIMEOUT_S:g} s"
                raise StorageError(
                    f"{self._where}: {len(records) - len(offsets)} records are not acknowledged: {reason}; "
                    "append them again"
                )
        return [offsets[index] for index in range(len(records))]

    def read(self, position: Offsets, *, limit: int, wait_s: float = 0.0) -> ReadBatch:
        """See ``EventLog.read``."""
        with self._lock:
            reader = self._consumer_at(position)
            asked_us = time.time_ns() // 1000
            ends = self.end_offsets()
            try:
                messages = reader.consume(limit, timeout=max(wait_s, 0.05))
            except (self._kafka.KafkaException, RuntimeError) as error:
                raise StorageError(f"{self._where}: cannot read: {error}") from error
            records = [_stored(message) for message in messages if not self._is_error(message)]
            assert self._read_to is not None
            for record in records:
                self._read_to[record.partition] = record.offset + 1
                self._last_us[record.partition] = record.time_us
            unread_us = [
                self._last_us.get(partition, 0)
                for partition, end in ends.items()
                if self._read_to.get(partition, 0) < end
            ]
            return ReadBatch(records, dict(self._read_to), min([asked_us, *unread_us]))

    def committed(self, consumer: str) -> Offsets:
        """See ``EventLog.committed``."""
        with self._group_consumer(consumer) as group:
            committed = self._wait_for_futures(
                "committed offsets", lambda: group.committed(self._topic_partitions(), timeout=REQUEST_TIMEOUT_S)
            )
        return {index.partition: index.offset for index in committed if index.offset >= 0}

    def commit(self, consumer: str, position: Offsets) -> None:
        """See ``EventLog.commit``."""
        offsets = [self._kafka.TopicPartition(self._topic, *index) for index in position.items()]
        with self._group_consumer(consumer) as group:
            done = self._wait_for_futures("commit", lambda: group.commit(offsets=offsets, asynchronous=False))
        if failed := [index for index in done if index.error is not None]:
            raise StorageError(f"{self._where}: cannot commit for {consumer}: {failed[0].error}")

    def end_offsets(self) -> Offsets:
        """See ``EventLog.end_offsets``."""
        with self._lock:
            return {
                index.partition: self._wait_for_futures(
                    "end of the log",
                    lambda index=index: self._offset_consumer.get_watermark_offsets(index, timeout=REQUEST_TIMEOUT_S),
                )[1]
                for index in self._topic_partitions()
            }

    def close(self) -> None:
        """Closes the connections. Records without an acknowledgement may or may not be appended."""
        with self._lock:
            for consumer in (self._reader, self._offset_consumer):
                if consumer is not None:
                    consumer.close()
            self._reader, self._producer = None, None

    @property
    def _where(self) -> str:
        return f"event log {self._settings['bootstrap.servers']}, topic {self._topic}"

    def _count_partitions(self) -> int:
        metadata = self._wait_for_futures(
            "topics", lambda: self._offset_consumer.list_topics(self._topic, timeout=REQUEST_TIMEOUT_S)
        )
        topic = metadata.topics[self._topic]
        if topic.error is not None or not topic.partitions:
            raise StorageError(f"{self._where}: {topic.error or 'no partitions'}; create the topic first")
        return len(topic.partitions)

    def _wait_for_futures(self, what: str, question: Any) -> Any:
        try:
            return question()
        except self._kafka.KafkaException as error:
            raise StorageError(f"{self._where}: {what}: {error}") from error

    def _topic_partitions(self) -> list[TopicPartition]:
        return [self._kafka.TopicPartition(self._topic, partition) for partition in range(self.partitions)]

    def _get_producer(self) -> Producer:
        if self._producer is None:
            defaults = {
                "acks": "all",
                "enable.idempotence": True,  # the client's own retries keep the order and append nothing twice
                "delivery.timeout.ms": int(REQUEST_TIMEOUT_S * 1000),
                "linger.ms": 0,
                "message.max.bytes": 16 << 20,
            }
            self._producer = self._kafka.Producer({**defaults, **self._settings})
        return self._producer

    def _consumer_at(self, position: Offsets) -> Consumer:
        if self._reader is None:
            self._reader = self._kafka.Consumer(
                {
                    **self._settings,
                    "group.id": _READER_GROUP,
                    "enable.auto.commit": False,
                    "auto.offset.reset": "earliest",
                }
            )
        if self._read_to is None or self._read_to != dict(position):
            beginning = self._kafka.OFFSET_BEGINNING
            self._reader.assign(
                [
                    self._kafka.TopicPartition(self._topic, partition, position.get(partition, beginning))
                    for partition in range(self.partitions)
                ]
            )
            self._read_to, self._last_us = dict(position), {}
        return self._reader

    def _is_error(self, message: Message) -> bool:
        """Returns whether the message is no record but the end of a partition.

        Raises:
            StorageError: if it is any other error.
        """
        error = message.error()
        if error is None:
            return False
        if error.code() == self._kafka.KafkaError._PARTITION_EOF:
            return True
        self._read_to = None
        raise StorageError(f"{self._where}: cannot read: {error}")

    def _group_consumer(self, consumer: str) -> _ClosingConsumer:
        return _ClosingConsumer(
            self._kafka.Consumer({**self._settings, "group.id": consumer, "enable.auto.commit": False})
        )


class _ClosingConsumer:
    """A consumer that is closed at the end of the block."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer

    def __enter__(self) -> Consumer:
        return self._consumer

    def __exit__(self, *_: object) -> None:
        self._consumer.close()


def _stored(message: Message) -> StoredRecord:
    headers = dict(message.headers() or [])
    time_header = headers.get("time_us")
    time_us = int(time_header) if time_header is not None else message.timestamp()[1] * 1000
    return StoredRecord(message.partition() or 0, message.offset() or 0, time_us, message.value() or b"")
