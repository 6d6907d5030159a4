"""The stream's host on a cluster: both halves on Quix Streams, any number of members of one consumer group.

::

    exposures, outcomes ─► viewer half ─► rows-viewer
                                └─► video-cells, creator-cells ─► video half ─► rows-video

State, cells, rows and positions of a member change in one Kafka transaction. The state is stored in RocksDB, with
changelog topics from which another member restores it. Time advances with the records of each partition, so members
append heartbeats (records without events) to quiet partitions.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import numpy as np
from quixstreams import Application, MessageContext, State, message_context
from quixstreams.models import Deserializer, Serializer, TopicConfig
from quixstreams.models import Topic as QuixTopic

from reelway.pipelines.features.stream.bootstrap import DatasetState, bootstrap_view
from reelway.pipelines.features.stream.cell_records import (
    PARTITIONER,
    decode_cells,
    encode_cells,
    partition_key,
    split_cells,
)
from reelway.pipelines.features.stream.heartbeats import LastRead
from reelway.pipelines.features.stream.keyed_store import get_integers, put_integers
from reelway.pipelines.features.stream.log_records import read_records
from reelway.pipelines.features.stream.metrics import StreamMetrics
from reelway.pipelines.features.stream.row_records import Progress, encode_progress, encode_rows, row_key
from reelway.pipelines.features.stream.rules import VIDEO_VIEWS, StreamRules
from reelway.pipelines.features.stream.time_buckets import CREATORS, ENGAGEMENT
from reelway.pipelines.features.stream.video_facts import VideoFacts
from reelway.pipelines.features.stream.video_task import VideoTask
from reelway.pipelines.features.stream.viewer_task import ViewerTask
from reelway.pipelines.features.views import SECOND_US
from reelway.pipelines.features.windows import I64
from reelway.platform.errors import DataError
from reelway.platform.eventlog import StoredRecord
from reelway.platform.eventlog.arrow_records import viewer_partitions
from reelway.platform.eventlog.erasures import erased_viewers
from reelway.platform.eventlog.parked_records import ParkedRecords
from reelway.platform.eventlog.topics import Topic

log = logging.getLogger(__name__)

COMMIT_INTERVAL_S: Final = 0.5
"""Time between two transactions. Rows are readable after the commit."""
SESSION_TIMEOUT_MS: Final = 10_000
"""How long the group waits for a member that disappeared; also the timeout of its open transaction."""
MAX_COMPACTION_LAG_MS: Final = 7 * 24 * 3_600_000
"""Time after which the brokers delete a row that a newer row or a tombstone has replaced."""
VIEWER_ROWS: Final = "rows-viewer"
VIDEO_ROWS: Final = "rows-video"
CELL_TOPICS: Final = {ENGAGEMENT: "video-cells", CREATORS: "creator-cells"}
_TIMES: Final = "topic_times"
_REPORTED: Final = "reported"
_VERSION_BYTE: Final = b"\x01"
"""First byte of each stored value. Quix takes 8 bytes of a plausible time for a TTL stamp; such bytes begin with 0."""


@dataclass(frozen=True)
class QuixSettings:
    """Where a member works.

    Args:
        prefix: of the names of all topics and of the consumer group.
        partitions: of exposures and outcomes, and of the topics that the stream creates.
        replication: of the topics that the stream creates.
        state: folder of the member's own state.
        client: further settings of librdkafka.
    """

    servers: str
    prefix: str
    partitions: int
    replication: int
    state: Path
    client: Mapping[str, Any]


@dataclass(frozen=True)
class Output:
    """A record to produce."""

    topic: str
    key: bytes
    payload: bytes | None  # None: a tombstone


class QuixStore:
    """A ``KeyedStore`` over the state of one partition."""

    def __init__(self, state: State) -> None:
        self._state = state

    def get_many(self, table: str, keys: I64) -> list[bytes | None]:
        """See ``KeyedStore.get_many``."""
        get, prefix = self._state.get_bytes, table.encode() + b"/"
        found = [get(prefix + key) for key in _key_bytes(keys)]
        return [value[1:] if value is not None else None for value in found]

    def put_many(self, table: str, keys: I64, values: Sequence[bytes]) -> None:
        """See ``KeyedStore.put_many``."""
        put, prefix = self._state.set_bytes, table.encode() + b"/"
        for key, value in zip(_key_bytes(keys), values, strict=True):
            put(prefix + key, _VERSION_BYTE + value)

    def delete_many(self, table: str, keys: I64) -> None:
        """See ``KeyedStore.delete_many``."""
        prefix = table.encode() + b"/"
        for key in _key_bytes(keys):
            self._state.delete(prefix + key)


def _key_bytes(keys: I64) -> Iterator[bytes]:
    raw = keys.astype(">i8").tobytes()
    return (raw[start : start + 8] for start in range(0, len(raw), 8))


class _OneKey(Deserializer):  # type: ignore[misc]  # quixstreams has no types
    """All records of a partition share its state, which Quix keeps per key."""

    def __call__(self, *_: Any, **__: Any) -> bytes:
        return b"0"


class _Payload(Serializer):  # type: ignore[misc]
    def __call__(self, value: Output, *_: Any, **__: Any) -> bytes | None:
        return value.payload


class _MemberApplication(Application):  # type: ignore[misc]
    """Reports to the metrics which partitions the group assigns to this member."""

    def report_to(self, metrics: StreamMetrics, topic: str) -> None:
        """Reports the assignments of one topic; the others have the same partitions."""
        self._metrics, self._reported_topic = metrics, topic

    def _on_assign(self, consumer: Any, topic_partitions: list[Any]) -> None:
        super()._on_assign(consumer, topic_partitions)
        self._metrics.record_assignment(self._reported(topic_partitions))

    def _on_revoke(self, consumer: Any, topic_partitions: list[Any]) -> None:
        self._metrics.record_revocation(self._reported(topic_partitions))
        super()._on_revoke(consumer, topic_partitions)

    def _on_lost(self, consumer: Any, topic_partitions: list[Any]) -> None:
        self._metrics.record_revocation(self._reported(topic_partitions))
        super()._on_lost(consumer, topic_partitions)

    def _reported(self, topic_partitions: list[Any]) -> list[int]:
        return [one.partition for one in topic_partitions if one.topic == self._reported_topic]


class QuixStream:
    """One member. ``application`` is run by the caller, in the main thread.

    Args:
        load_dataset: reads what an empty partition begins with, and is called when the first one is assigned.
        begin_us: time in the stream at which empty partitions begin.
    """

    def __init__(
        self,
        settings: QuixSettings,
        rules: StreamRules,
        begin_us: int,
        load_dataset: Callable[[], DatasetState],
        facts: VideoFacts,
        metrics: StreamMetrics,
        parked: ParkedRecords | None = None,
    ) -> None:
        self._settings, self._rules, self._begin_us = settings, rules, begin_us
        self._load_dataset, self._facts = load_dataset, facts
        self._metrics, self._parked = metrics, parked
        self._dataset: DatasetState | None = None
        self.last_reads: dict[tuple[str, int], LastRead] = {}
        """(topic, partition) -> its last record."""
        metrics.measure_ages(rules.behind_us, {view: schedule.grid_us for view, schedule in rules.schedules.items()})
        self.application = _MemberApplication(
            broker_address=_connection(settings),
            consumer_group=f"{settings.prefix}features",
            auto_offset_reset="earliest",
            commit_interval=COMMIT_INTERVAL_S,
            consumer_poll_timeout=0.1,
            state_dir=settings.state,
            processing_guarantee="exactly-once",
            loglevel=None,
            consumer_extra_config={"session.timeout.ms": SESSION_TIMEOUT_MS, "heartbeat.interval.ms": 2_000},
            producer_extra_config={
                "partitioner": PARTITIONER, "compression.type": "lz4", "linger.ms": 5,
                "transaction.timeout.ms": SESSION_TIMEOUT_MS,
                "transactional.id": f"{settings.prefix}features-{uuid4().hex}",  # so that rights can name a prefix
            },
        )  # fmt: skip
        self.application.report_to(metrics, settings.prefix + Topic.OUTCOMES)
        self._build()

    def _build(self) -> None:
        settings, application = self._settings, self.application
        compacted = {"cleanup.policy": "compact", "max.compaction.lag.ms": str(MAX_COMPACTION_LAG_MS)}
        self._topics = {
            name: self._topic(name, partitions, config)
            for name, partitions, config in (
                (VIEWER_ROWS, settings.partitions, compacted),
                (VIDEO_ROWS, 1, compacted),  # one partition, so that one consumer numbers the changes
                *((name, settings.partitions, {}) for name in CELL_TOPICS.values()),
            )
        }
        inputs = [
            application.topic(settings.prefix + topic, key_deserializer=_OneKey(), value_deserializer="bytes")
            for topic in (Topic.EXPOSURES, Topic.OUTCOMES)
        ]
        exposures, outcomes = (application.dataframe(topic) for topic in inputs)
        self._produce(exposures.concat(outcomes).apply(self._process_events, stateful=True, metadata=True, expand=True))
        for view, name in CELL_TOPICS.items():

            def process(value: bytes, _key: Any, _time: int, _headers: Any, state: State, view: str = view) -> Any:
                return self._process_cells(view, value, state)

            cells = application.dataframe(self._topics[name])
            self._produce(cells.apply(process, stateful=True, metadata=True, expand=True))

    def _topic(self, name: str, partitions: int, config: dict[str, str]) -> QuixTopic:
        return self.application.topic(
            self._settings.prefix + name,
            key_deserializer=_OneKey(),
            value_deserializer="bytes",
            value_serializer=_Payload(),
            config=TopicConfig(partitions, self._settings.replication, config),
        )

    def _produce(self, outputs: Any) -> None:
        outputs.to_topic(lambda output, *_: self._topics[output.topic], key=lambda output: output.key)

    def _process_events(
        self, value: bytes | None, _key: Any, time_ms: int, _headers: Any, state: State
    ) -> list[Output]:
        """Handles one record of exposures or outcomes."""
        context, store = message_context(), QuixStore(state)
        task = ViewerTask(store, self._rules)
        outputs: list[Output] = []
        if task.settled_us is None:
            outputs += self._begin_viewers(task, context.partition)
        is_outcome = context.topic.endswith(Topic.OUTCOMES)
        stored = get_integers(store, _TIMES)
        times = np.zeros(2, np.int64) if stored is None else stored.copy()
        # A broker that takes over a partition may have a slower clock.
        times[int(is_outcome)] = time_us = max(int(times[int(is_outcome)]), time_ms * 1000)
        put_integers(store, _TIMES, times)
        outputs += self._erase(value, task)
        self._read(context, value, int(time_us), task)
        done = task.advance(int(times.min()) - self._rules.behind_us)
        self._metrics.count_events(done.results)
        if not done.steps:
            return outputs
        self._metrics.record_progress(done.settled_us, context.partition)
        outputs += self._row_outputs(VIEWER_ROWS, done.rows)
        for view in VIDEO_VIEWS:
            cells = [some for some in done.cells if some.view == view]
            for partition, mine in enumerate(split_cells(cells, self._settings.partitions)):
                key = partition_key(partition, self._settings.partitions)
                records = encode_cells(context.partition, done.began_us, done.settled_us, mine)
                outputs += [Output(CELL_TOPICS[view], key, payload) for payload in records]
        return outputs

    def _process_cells(self, view: str, value: bytes, state: State) -> list[Output]:
        """Handles one record of cells."""
        context, store = message_context(), QuixStore(state)
        task = VideoTask(store, view, self._rules, self._settings.partitions)
        outputs: list[Output] = []
        if not task.has_begun:
            task.begin(self._begin_us)
            rows = bootstrap_view(task.entities, self._read_dataset(), self._begin_us, self._owner(context.partition))
            outputs += self._row_outputs(VIDEO_ROWS, rows)
        source, settled_us, cells = decode_cells(view, value)
        for some in cells:
            if (viewer_partitions(some.entity, self._settings.partitions) != context.partition).any():
                raise DataError(f"{context.topic}: cells in partition {context.partition} belong to another partition")
        outputs += self._row_outputs(VIDEO_ROWS, task.add(source, settled_us, cells))
        reported = get_integers(store, _REPORTED)
        if reported is None or task.watermark_us - int(reported[0]) >= SECOND_US:
            put_integers(store, _REPORTED, [task.watermark_us])
            progress = Progress(view, context.partition, task.watermark_us)
            outputs.append(Output(VIDEO_ROWS, *encode_progress(progress)))
        return outputs

    def _begin_viewers(self, task: ViewerTask, partition: int) -> list[Output]:
        rows = [
            rows
            for view in task.views.values()
            for rows in bootstrap_view(view, self._read_dataset(), self._begin_us, self._owner(partition))
        ]
        task.begin(self._begin_us)
        return self._row_outputs(VIEWER_ROWS, rows)

    def _erase(self, value: bytes | None, task: ViewerTask) -> list[Output]:
        """Applies an erasure: the viewers leave the state, and tombstones replace their rows."""
        erased = erased_viewers(value or b"")
        if not len(erased):
            return []
        task.erase(erased)
        return [Output(VIEWER_ROWS, row_key(view, int(viewer)), None) for viewer in erased for view in task.views]

    def _owner(self, partition: int) -> Callable[[I64], Any]:
        return lambda ids: viewer_partitions(ids, self._settings.partitions) == partition

    def _read_dataset(self) -> DatasetState:
        if self._dataset is None:
            self._dataset = self._load_dataset()
        return self._dataset

    def _read(self, context: MessageContext, value: bytes | None, time_us: int, task: ViewerTask) -> None:
        record = StoredRecord(context.partition, context.offset, time_us, value or b"")
        topic = Topic(context.topic.removeprefix(self._settings.prefix))
        events, parked = read_records(topic, context.topic, [record], self._facts)
        if parked:
            self._metrics.count_parked({parked[0].kind: 1})
            first = parked[0]
            log.warning(
                "records parked: log=%s count=1, the first: partition=%d offset=%d reason=%s",
                first.log, first.partition, first.offset, first.reason,
            )  # fmt: skip
            if self._parked is not None:
                self._parked.park(parked)
        task.add(events)
        self.last_reads[topic, context.partition] = LastRead(context.offset + 1, time_us, time.monotonic())

    def _row_outputs(self, topic: str, rows: Sequence[Any]) -> list[Output]:
        return [Output(topic, key, value) for key, value in encode_rows(rows)]


def _connection(settings: QuixSettings) -> Any:
    from quixstreams.kafka import ConnectionConfig

    return ConnectionConfig.from_librdkafka_dict(
        {"bootstrap.servers": settings.servers, **settings.client}, ignore_extras=True
    )
