"""Delivers rows from the topics of a cluster's stream to the online store and to the changelog of video features.

Each topic is read by a consumer group that commits its offsets after the delivery, so rows may be delivered again. A
viewer's row replaces the one before it. A change of the changelog is a consistent cut: it holds the rows up to a time
that all partitions have passed, and its number is an offset of the topic, which has one partition and so one reader.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa

from reelway.pipelines.features.stream.log_records import UNREADABLE
from reelway.pipelines.features.stream.metrics import StreamMetrics
from reelway.pipelines.features.stream.row_records import ErasedRow, Progress, Row, check_fields, decode, to_table
from reelway.pipelines.features.stream.sinks import FeatureSinks
from reelway.pipelines.features.stream.time_buckets import LAYOUTS, STREAMED, view_values_at
from reelway.pipelines.features.views import ViewSettings
from reelway.platform.errors import DataError, FeatureError, StorageError

if TYPE_CHECKING:
    from confluent_kafka import Consumer, Message

log = logging.getLogger(__name__)

MAX_ROWS: Final = 2_000
POLL_S: Final = 0.1
RETRY_DELAY_S: Final = 2.0


class ViewerRowDelivery:
    """Writes rows of ``rows-viewer`` to the online store."""

    def __init__(self, sinks: FeatureSinks, schemas: Mapping[str, pa.Schema], metrics: StreamMetrics) -> None:
        self._sinks, self._schemas, self._metrics = sinks, schemas, metrics

    def deliver(self, messages: Sequence[Message]) -> int | None:
        """Delivers all rows. Returns None: no offset is held back."""
        latest: dict[str, dict[int, Row]] = {}
        erased: set[int] = set()
        for message in messages:
            row = _decoded(message, self._schemas, self._metrics)
            if isinstance(row, Row):
                latest.setdefault(row.view, {})[row.entity] = row
            elif isinstance(row, ErasedRow):  # an erasure deletes a viewer's rows of all views
                latest.get(row.view, {}).pop(row.entity, None)
                erased.add(row.entity)
        if erased:
            self._sinks.erase_viewers(sorted(erased))
        for view, rows in latest.items():
            self._sinks.write_viewer_rows(view, to_table(view, list(rows.values()), self._schemas[view]))
            self._metrics.count_rows({view: len(rows)})
        return None


class VideoRowDelivery:
    """Writes rows of ``rows-video`` to the changelog.

    Args:
        sources: number of (view, partition) pairs that report progress.
    """

    def __init__(
        self, sinks: FeatureSinks, schemas: Mapping[str, pa.Schema], metrics: StreamMetrics, sources: int
    ) -> None:
        self._sinks, self._schemas, self._metrics, self._sources = sinks, schemas, metrics, sources
        self._held: dict[int, Row] = {}  # by offset
        self._progress: dict[tuple[str, int], int] = {}

    def deliver(self, messages: Sequence[Message]) -> int | None:
        """Delivers the rows that all partitions have passed. Returns the offset of the first row that waits."""
        next_offset = 0
        for message in messages:
            offset = message.offset() or 0
            next_offset = offset + 1
            found = _decoded(message, self._schemas, self._metrics)
            if isinstance(found, Progress):
                self._progress[found.view, found.partition] = found.as_of_us
            elif isinstance(found, Row):
                self._held[offset] = found
        if len(self._progress) == self._sources:
            self._release(next_offset, min(self._progress.values()))
        return min(self._held, default=None)

    def _release(self, sequence: int, as_of_us: int) -> None:
        released = {offset: row for offset, row in self._held.items() if row.at_us <= as_of_us}
        if not released:
            return
        latest: dict[str, dict[int, Row]] = {}
        for offset in sorted(released):
            row = released[offset]
            latest.setdefault(row.view, {})[row.entity] = row
        tables = {view: to_table(view, list(rows.values()), self._schemas[view]) for view, rows in latest.items()}
        self._sinks.write_change(sequence, as_of_us, tables)
        self._held = {offset: row for offset, row in self._held.items() if offset not in released}
        self._metrics.count_rows({view: table.num_rows for view, table in tables.items()})


Delivery = ViewerRowDelivery | VideoRowDelivery


def _decoded(
    message: Message, schemas: Mapping[str, pa.Schema], metrics: StreamMetrics
) -> Row | ErasedRow | Progress | None:
    """Returns what a message holds; None, logged and counted, if this version cannot read it."""
    try:
        found = decode(message.key() or b"", message.value() or b"")
        if isinstance(found, Row):
            check_fields(found, schemas)
        return found
    except DataError as error:
        log.warning("row skipped: topic=%s offset=%s: %s", message.topic(), message.offset(), error)
        metrics.count_parked({UNREADABLE: 1})
        return None


def row_schemas(settings: ViewSettings) -> dict[str, pa.Schema]:
    """Returns the schema of each view's rows."""
    none = np.zeros(0, dtype=np.int64)
    return {
        view: view_values_at(
            view, none, np.zeros((0, len(LAYOUTS[view].columns)), np.int64), settings, (none, none)
        ).schema
        for view in STREAMED
    }


def deliver_rows(
    client: Mapping[str, Any],
    topic: str,
    open_delivery: Callable[[], Delivery],
    metrics: StreamMetrics,
    stop: threading.Event,
) -> None:
    """Delivers a topic's rows until ``stop`` is set.

    Args:
        client: settings of librdkafka, with ``bootstrap.servers``.
        open_delivery: called after each assignment of partitions, because another member may have delivered since.
    """
    from confluent_kafka import Consumer

    current: list[Delivery] = []

    def forget(*_: Any) -> None:
        current.clear()

    consumer = Consumer(
        {
            **client, "group.id": f"{topic}-delivery", "enable.auto.commit": False, "auto.offset.reset": "earliest",
            "isolation.level": "read_committed", "session.timeout.ms": 10_000,
        }
    )  # fmt: skip
    consumer.subscribe([topic], on_assign=forget, on_revoke=forget, on_lost=forget)
    try:
        while not stop.is_set():
            messages = without_errors(consumer.consume(MAX_ROWS, timeout=POLL_S), topic, metrics)
            if not messages:
                continue
            if not current:
                current.append(open_delivery())
            held = _deliver_until_done(current[0], messages, metrics, stop)
            if stop.is_set():
                return
            _commit(consumer, messages, held)
    finally:
        consumer.close()


def without_errors(messages: Sequence[Message], topic: str, metrics: StreamMetrics) -> list[Message]:
    """Returns the messages that are no errors, such as a refused authorisation. Errors are logged and counted."""
    errors = [error for message in messages if (error := message.error()) is not None]
    if errors:
        metrics.count_fault()
        log.error("%s: cannot read rows: %s", topic, errors[0])
    return [message for message in messages if message.error() is None]


def _deliver_until_done(
    delivery: Delivery, messages: Sequence[Message], metrics: StreamMetrics, stop: threading.Event
) -> int | None:
    while True:
        try:
            return delivery.deliver(messages)
        except (DataError, FeatureError, StorageError) as error:
            metrics.count_fault()
            log.error("delivery failed, retrying in %g s: %s", RETRY_DELAY_S, error)
            if stop.wait(RETRY_DELAY_S):
                return None


def _commit(consumer: Consumer, messages: Sequence[Message], held: int | None) -> None:
    """Commits what is delivered. Of a topic with held rows, that is what precedes the first of them."""
    from confluent_kafka import KafkaException, TopicPartition

    offsets: dict[int, int] = {}
    for message in messages:
        offsets[message.partition() or 0] = (message.offset() or 0) + 1
    topic = messages[0].topic() or ""
    positions = [
        TopicPartition(topic, partition, offset if held is None else min(held, offset))
        for partition, offset in offsets.items()
    ]
    try:
        consumer.commit(offsets=positions, asynchronous=False)
    except KafkaException as error:  # the partition has moved to another member, which delivers the rows again
        log.warning("%s: cannot commit delivered rows: %s", topic, error)
