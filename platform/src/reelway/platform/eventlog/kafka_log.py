"""The event log as a Kafka topic, for clusters. The operator of the Kafka cluster creates the topic.

The topic must have ``message.timestamp.type=LogAppendTime``: a record's time is the broker's, in milliseconds.
An append returns once all in-sync replicas have the records (``acks=all``). The topic's ``min.insync.replicas`` sets
how many those are, and the topic's configuration sets the retention. Records of a transaction are in the log when the
transaction is committed. The client library is imported when a log is opened.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

from reelway.platform.errors import ConfigError, StorageError
from reelway.platform.eventlog.event_log import LogRecord, Offsets, ReadBatch, StoredRecord

if TYPE_CHECKING:
    from confluent_kafka import Consumer, Message, Producer, TopicPartition

log = logging.getLogger(__name__)

REQUEST_TIMEOUT_S: Final = 20.0
"""Timeout of one request to the brokers, and of one append."""
FETCH_TIMEOUT_S: Final = 5.0
"""How long a read waits for records that exist. The first fetch of a connection takes longer than a poll."""
POLL_INTERVAL_S: Final = 0.05
DEFAULT_MAX_MESSAGE_BYTES: Final = 1_048_588
"""Kafka's default of ``max.message.bytes``, used if the topic's own value may not be read."""
_RECORD_OVERHEAD_BYTES: Final = 512  # headers of a record batch and of its record, and id
_READER_GROUP: Final = "reelway-reader"  # of reads, which do not use committed offsets

_T = TypeVar("_T")


class KafkaLog:
    """An ``EventLog`` on a Kafka topic.

    Args:
        servers: ``host:port``, several separated by commas.
        topic: must exist.
        settings: librdkafka settings that override the ones here: ``security.protocol``, ``sasl.username``, ...

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
        self.name = topic
        self.servers = servers
        self._settings = {"bootstrap.servers": servers, **(settings or {})}
        self._lock = threading.RLock()
        self._producer: Producer | None = None
        self._max_message_bytes: int | None = None
        self._reader: Consumer | None = None
        self._read_to: dict[int, int] | None = None
        self._last_us: dict[int, int] = {}
        try:
            self._metadata_client = self._consumer(_READER_GROUP)
        except (confluent_kafka.KafkaException, ValueError, TypeError) as error:
            raise ConfigError(f"Kafka client for {servers}: {error}") from error
        self.partitions, self.replication = self._read_layout()

    @property
    def max_record_bytes(self) -> int:
        """See ``EventLog.max_record_bytes``. The topic's setting is read again after a failed append."""
        with self._lock:
            if self._max_message_bytes is None:
                self._max_message_bytes = self._read_max_message_bytes()
            return max(self._max_message_bytes - _RECORD_OVERHEAD_BYTES, 1)

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
            self._check_sizes(records)
            producer = self._get_producer()
            try:
                for index, record in enumerate(records):
                    producer.produce(
                        self.name, record.payload, key=(record.key or record.id).encode(), partition=record.partition,
                        on_delivery=on_delivery(index),
                    )  # fmt: skip
                unanswered = producer.flush(REQUEST_TIMEOUT_S)
            except (self._kafka.KafkaException, BufferError) as error:
                raise StorageError(f"{self._description}: cannot append: {error}; append it again") from error
            if unanswered or errors:
                producer.purge()
                self._producer, self._max_message_bytes = None, None
                problem = errors[0] if errors else f"no answer within {REQUEST_TIMEOUT_S:g} s"
                raise StorageError(
                    f"{self._description}: {len(records) - len(offsets)} records are not acknowledged: {problem}; "
                    "append them again"
                )
        return [offsets[index] for index in range(len(records))]

    def read(self, position: Offsets, *, limit: int, wait_s: float = 0.0) -> ReadBatch:
        """See ``EventLog.read``.

        A partition counts as read to its end also if its last offsets hold no record: retention may have deleted all
        records, and every transaction ends with a marker. The client reports such an end as the event "end of
        partition" with its offset.
        """
        with self._lock:
            reader, read_to = self._reader_at(position)
            now_us = time.time_ns() // 1000
            ends = self._skip_deleted_records(read_to, position)
            records: list[StoredRecord] = []
            began = time.monotonic()
            while True:
                try:
                    messages = reader.consume(limit - len(records), timeout=POLL_INTERVAL_S)
                except (self._kafka.KafkaException, RuntimeError) as error:
                    self._read_to = None
                    raise StorageError(f"{self._description}: cannot read: {error}") from error
                records += self._handle_messages(messages, read_to)
                unread = [partition for partition, end in ends.items() if read_to[partition] < end]
                if records or time.monotonic() - began >= max(wait_s, FETCH_TIMEOUT_S if unread else 0.0):
                    break
            unread_us = [self._last_us.get(partition, 0) for partition in unread]
            return ReadBatch(records, dict(read_to), min([now_us, *unread_us]))

    def offsets_at(self, time_us: int) -> Offsets:
        """See ``EventLog.offsets_at``."""
        asked = [self._kafka.TopicPartition(self.name, p, -(-time_us // 1000)) for p in range(self.partitions)]
        with self._lock:
            found = self._request(
                "offsets by time", lambda: self._metadata_client.offsets_for_times(asked, timeout=REQUEST_TIMEOUT_S)
            )
        ends = self.end_offsets()
        return {index.partition: index.offset if index.offset >= 0 else ends[index.partition] for index in found}

    def end_offsets(self) -> Offsets:
        """See ``EventLog.end_offsets``. An open transaction's records are behind the end."""
        return {partition: end for partition, (_, end) in self._bounds().items()}

    def close(self) -> None:
        """Closes the connections. Records without an acknowledgement may or may not be appended."""
        with self._lock:
            for consumer in (self._reader, self._metadata_client):
                if consumer is not None:
                    consumer.close()
            self._reader, self._producer = None, None

    @property
    def _description(self) -> str:
        return f"event log {self._settings['bootstrap.servers']}, topic {self.name}"

    def _bounds(self) -> dict[int, tuple[int, int]]:
        """The first and the next offset of each partition."""
        client = self._metadata_client
        with self._lock:
            return self._request(
                "offsets",
                lambda: {
                    index.partition: client.get_watermark_offsets(index, timeout=REQUEST_TIMEOUT_S)
                    for index in self._topic_partitions()
                },
            )

    def _skip_deleted_records(self, read_to: dict[int, int], position: Offsets) -> dict[int, int]:
        """Moves ``read_to`` to the first offset of each partition if it is before it. Returns the end offsets."""
        ends = {}
        for partition, (first, end) in self._bounds().items():
            ends[partition] = end
            if read_to.get(partition, 0) < first:
                if partition in position:
                    log.warning(
                        "%s: offsets %d to %d of partition %d were deleted before they were read",
                        self._description, read_to[partition], first - 1, partition,
                    )  # fmt: skip
                read_to[partition] = first
            read_to.setdefault(partition, first)
        return ends

    def _handle_messages(self, messages: Iterable[Message], read_to: dict[int, int]) -> list[StoredRecord]:
        """Returns the records among the messages, and advances ``read_to``.

        Raises:
            StorageError: if one of the messages is an error; the next read starts at its position again.
        """
        records = []
        for message in messages:
            error = message.error()
            partition, offset = message.partition() or 0, message.offset() or 0
            if error is None:
                record = _stored(message)
                records.append(record)
                self._last_us[partition] = record.time_us
                read_to[partition] = offset + 1
            elif error.code() == self._kafka.KafkaError._PARTITION_EOF:
                read_to[partition] = max(read_to.get(partition, 0), offset)
            else:
                self._read_to = None
                raise StorageError(f"{self._description}: cannot read: {error}")
        return records

    def _read_layout(self) -> tuple[int, int]:
        """Returns the number of partitions, and of replicas of each."""
        metadata = self._request(
            "topics", lambda: self._metadata_client.list_topics(self.name, timeout=REQUEST_TIMEOUT_S)
        )
        topic = metadata.topics[self.name]
        if topic.error is not None or not topic.partitions:
            raise StorageError(f"{self._description}: {topic.error or 'no partitions'}; create the topic first")
        return len(topic.partitions), len(topic.partitions[0].replicas)

    def _read_max_message_bytes(self) -> int:
        from confluent_kafka import admin

        resource = admin.ConfigResource(admin.RESOURCE_TOPIC, self.name)  # type: ignore[attr-defined]  # not in __all__
        try:
            client = admin.AdminClient(self._settings)
            (future,) = client.describe_configs([resource], request_timeout=REQUEST_TIMEOUT_S).values()
            return int(future.result(REQUEST_TIMEOUT_S)["max.message.bytes"].value)
        except (self._kafka.KafkaException, KeyError, TimeoutError) as error:
            log.warning(
                "%s: cannot read max.message.bytes, assuming %d: %s",
                self._description, DEFAULT_MAX_MESSAGE_BYTES, error,
            )  # fmt: skip
            return DEFAULT_MAX_MESSAGE_BYTES

    def _check_sizes(self, records: Sequence[LogRecord]) -> None:
        largest = max((len(record.payload) for record in records), default=0)
        if largest > self.max_record_bytes:
            raise StorageError(
                f"{self._description}: a record has {largest} bytes, at most {self.max_record_bytes} fit; "
                "split the record, or raise the topic's max.message.bytes"
            )

    def _request(self, purpose: str, call: Callable[[], _T]) -> _T:
        try:
            return call()
        except self._kafka.KafkaException as error:
            raise StorageError(f"{self._description}: {purpose}: {error}") from error

    def _topic_partitions(self) -> list[TopicPartition]:
        return [self._kafka.TopicPartition(self.name, partition) for partition in range(self.partitions)]

    def _get_producer(self) -> Producer:
        if self._producer is None:
            max_batch_bytes = self.max_record_bytes + _RECORD_OVERHEAD_BYTES
            defaults = {
                "acks": "all",
                "enable.idempotence": True,  # the client's own retries keep the order and append nothing twice
                "delivery.timeout.ms": int(REQUEST_TIMEOUT_S * 1000),
                "linger.ms": 0,
                "message.max.bytes": max(max_batch_bytes, 1_000),  # the client accepts no lower limit
                "batch.size": max_batch_bytes,
            }
            self._producer = self._kafka.Producer({**defaults, **self._settings})
        return self._producer

    def _reader_at(self, position: Offsets) -> tuple[Consumer, dict[int, int]]:
        """The consumer of reads, and per partition the offset of the next record that it returns."""
        if self._reader is None:
            self._reader = self._consumer(_READER_GROUP)
        if self._read_to is None or self._read_to != dict(position):
            beginning = self._kafka.OFFSET_BEGINNING
            self._reader.assign(
                [
                    self._kafka.TopicPartition(self.name, partition, position.get(partition, beginning))
                    for partition in range(self.partitions)
                ]
            )
            self._read_to, self._last_us = dict(position), {}
        return self._reader, self._read_to

    def _consumer(self, group: str) -> Consumer:
        required = {"group.id": group, "enable.auto.commit": False, "enable.partition.eof": True}
        return self._kafka.Consumer({"auto.offset.reset": "earliest", **self._settings, **required})


def _stored(message: Message) -> StoredRecord:
    """A tombstone's payload is empty."""
    return StoredRecord(
        message.partition() or 0, message.offset() or 0, message.timestamp()[1] * 1000, message.value() or b""
    )
