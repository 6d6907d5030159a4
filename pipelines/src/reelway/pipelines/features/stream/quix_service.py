"""The stream of a run on a cluster: one member with its heartbeats and deliveries, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict
from pathlib import Path
from uuid import uuid4

from prometheus_client import CollectorRegistry

from reelway.pipelines.features.stream.bootstrap import initial_watermark_us
from reelway.pipelines.features.stream.clock import STREAM_CLOCK_FILE, StreamClock
from reelway.pipelines.features.stream.heartbeats import HeartbeatGrid, send_heartbeats
from reelway.pipelines.features.stream.local_stream import offset_to_dataset_us
from reelway.pipelines.features.stream.member_threads import running_threads
from reelway.pipelines.features.stream.memory_keeper import viewer_memory_kept_complete
from reelway.pipelines.features.stream.metrics import StreamMetrics, metrics_server
from reelway.pipelines.features.stream.quix_stream import VIDEO_ROWS, VIEWER_ROWS, QuixSettings, QuixStream
from reelway.pipelines.features.stream.row_delivery import (
    VideoRowDelivery,
    ViewerRowDelivery,
    deliver_rows,
    row_schemas,
)
from reelway.pipelines.features.stream.rules import VIDEO_VIEWS, StreamRules
from reelway.pipelines.features.stream.run_inputs import load_dataset, video_facts, view_settings, view_ttl_us
from reelway.pipelines.features.stream.service import TOPICS, StreamOptions
from reelway.pipelines.features.stream.sinks import FeatureSinks
from reelway.platform.atomic_files import write_json
from reelway.platform.eventlog import EventLog
from reelway.platform.eventlog.addresses import client_settings
from reelway.platform.eventlog.feature_changelog import FeatureChangelog
from reelway.platform.eventlog.kafka_log import KafkaLog
from reelway.platform.eventlog.parked_records import ParkedRecords
from reelway.platform.eventlog.topics import Topic, open_topic
from reelway.platform.features.feast_store import open_feature_store
from reelway.platform.run_directory import RunDirectory
from reelway.platform.supervised_thread import export_failures

log = logging.getLogger(__name__)


def run_member(run: RunDirectory, options: StreamOptions, stop: threading.Event) -> None:
    """Runs one member of the stream's consumer group in the main thread until SIGTERM, Ctrl-C or ``stop``.

    Raises:
        FeatureError: if the run has no features.
        StorageError: if the log cannot be opened.
        Exception: whatever a thread of the member raised.
    """
    registry = CollectorRegistry()
    export_failures(registry)
    metrics, ended = StreamMetrics(registry), threading.Event()
    views = view_settings(run)
    with ExitStack() as stack:
        stack.enter_context(metrics_server(options.metrics_port, registry))
        logs = {topic: stack.enter_context(closing(open_topic(options.events, topic))) for topic in TOPICS}
        parked = stack.enter_context(closing(ParkedRecords(_state_folder(run, options) / "parked.db")))
        settings = member_settings(logs, options.events, _state_folder(run, options))
        time_axis = stream_clock(run, logs)
        rules, began_us = StreamRules(views, view_ttl_us(run), time_axis.behind_us), time_axis.began_us
        stream = QuixStream(settings, rules, began_us, lambda: load_dataset(run), video_facts(run), metrics, parked)
        features = open_feature_store(run.features)
        sinks = FeatureSinks(features, FeatureChangelog(options.overlay or run.overlay))
        stack.enter_context(viewer_memory_kept_complete(features, options.events, metrics))
        schemas, sources = row_schemas(views), settings.partitions * len(VIDEO_VIEWS)
        client = {"bootstrap.servers": settings.servers, **settings.client}
        targets = {
            "heartbeats": lambda: send_heartbeats(
                logs, lambda: dict(stream.last_reads), HeartbeatGrid(rules.fine_us, rules.behind_us), metrics, ended,
            ),
            "stop": lambda: stop_when_requested(stream, stop, ended),
            "viewer rows": lambda: deliver_rows(
                client, settings.prefix + VIEWER_ROWS, lambda: ViewerRowDelivery(sinks, schemas, metrics),
                metrics, ended,
            ),
            "video rows": lambda: deliver_rows(
                client, settings.prefix + VIDEO_ROWS, lambda: VideoRowDelivery(sinks, schemas, metrics, sources),
                metrics, ended,
            ),
        }  # fmt: skip
        with running_threads(targets, stop, ended, metrics):
            stream.application.run()


def member_settings(logs: Mapping[Topic, EventLog], events: str, state: Path) -> QuixSettings:
    """Returns the settings of a member: partitions and replication are those of the topic of outcomes."""
    outcomes = logs[Topic.OUTCOMES]
    assert isinstance(outcomes, KafkaLog), f"{events} is not on Kafka"
    return QuixSettings(
        servers=outcomes.servers,
        prefix=outcomes.name.removesuffix(Topic.OUTCOMES),
        partitions=outcomes.partitions,
        replication=outcomes.replication,
        state=state / "quix",
        client=client_settings(),
    )


def stream_clock(run: RunDirectory, logs: Mapping[Topic, EventLog]) -> StreamClock:
    """Returns the stream's time axis.

    The first member writes it to the run's folder, so that all members and the parity replay use the same.
    """
    path = run.path / STREAM_CLOCK_FILE
    if not path.exists():
        fine_us = StreamRules(view_settings(run), {}).fine_us
        began_us = initial_watermark_us(load_dataset(run), fine_us, time.time_ns() // 1000)
        clock = StreamClock(began_us, offset_to_dataset_us(logs, began_us, time.time))
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"clock-{uuid4().hex}.json")
        write_json(draft, asdict(clock))
        with suppress(FileExistsError):  # another member was faster
            path.hardlink_to(draft)
        draft.unlink()
    return StreamClock(**json.loads(path.read_text()))


def stop_when_requested(stream: QuixStream, stop: threading.Event, ended: threading.Event) -> None:
    """Stops the application also if ``stop`` was set before it ran. Quix handles signals only from then on."""
    while not ended.wait(0.2):
        if stop.is_set():
            stream.application.stop()


def _state_folder(run: RunDirectory, options: StreamOptions) -> Path:
    return options.state or run.path / "stream"
