"""The stream of a run on one machine: opens its inputs and sinks, and processes micro-batches until it is stopped.

A run without features is an error. Records of the log that cannot be read are parked in ``stream/parked.db`` and
counted. If an online store or changelog cannot be written, computed rows wait in the state and are delivered later.
Meanwhile the lag metric grows.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry

from reelway.pipelines.features.stream.clock import StreamClock, write_stream_clock
from reelway.pipelines.features.stream.local_stream import LocalStream, MicroBatchResult
from reelway.pipelines.features.stream.memory_keeper import viewer_memory_kept_complete
from reelway.pipelines.features.stream.metrics import StreamMetrics, metrics_server
from reelway.pipelines.features.stream.run_inputs import load_dataset, video_facts, view_settings, view_ttl_us
from reelway.pipelines.features.stream.sinks import FeatureSinks
from reelway.pipelines.features.stream.sqlite_store import SqliteStore
from reelway.pipelines.features.stream.time_buckets import emission_schedules
from reelway.platform.errors import FeatureError, MalformedFileError, StorageError
from reelway.platform.eventlog.feature_changelog import FeatureChangelog
from reelway.platform.eventlog.parked_records import ParkedRecords
from reelway.platform.eventlog.topics import Topic, open_topic
from reelway.platform.features.feast_store import open_feature_store
from reelway.platform.run_directory import RunDirectory
from reelway.platform.supervised_thread import export_failures

log = logging.getLogger(__name__)

RETRY_DELAY_S: Final = 2.0
"""Delay between two attempts when a store cannot be reached."""
TOPICS: Final = (Topic.EXPOSURES, Topic.OUTCOMES)


@dataclass(frozen=True)
class StreamOptions:
    """Inputs and outputs of a run's stream; empty values mean the run's own files."""

    events: str = ""
    overlay: str = ""
    metrics_port: int | None = None
    state: Path | None = None


def run_stream(
    run: RunDirectory,
    options: StreamOptions,
    stop: threading.Event,
    on_batch: Callable[[MicroBatchResult], None] | None = None,
) -> None:
    """Processes micro-batches until ``stop`` is set. Everything read by then is recorded and delivered.

    Raises:
        FeatureError: if the run has no features.
        StorageError: if the log or the state cannot be opened.
    """
    registry = CollectorRegistry()
    export_failures(registry)
    metrics = StreamMetrics(registry)
    grids_us = {view: schedule.grid_us for view, schedule in emission_schedules(view_settings(run)).items()}
    with metrics_server(options.metrics_port, registry), open_stream(run, options, metrics) as stream:
        metrics.measure_ages(stream.behind_us, grids_us)
        metrics.record_progress(stream.settled_us)
        while not stop.is_set():
            try:
                done = stream.run_micro_batch()
                record_batch(metrics, done)
                metrics.record_lag(stream.lag_records())
            except (FeatureError, MalformedFileError, StorageError) as error:
                metrics.count_fault()
                log.error("micro-batch failed, retrying in %g s: %s", RETRY_DELAY_S, error)
                stop.wait(RETRY_DELAY_S)
                stream.resume()
                continue
            if on_batch:
                on_batch(done)


def record_batch(metrics: StreamMetrics, done: MicroBatchResult) -> None:
    """Exports what a micro-batch did."""
    metrics.record_progress(done.watermark_us)
    metrics.count_events(done.results)
    metrics.count_parked(done.parked)
    metrics.count_rows(done.rows)


@contextmanager
def open_stream(run: RunDirectory, options: StreamOptions, metrics: StreamMetrics) -> Iterator[LocalStream]:
    """Opens and starts the run's stream."""
    features = open_feature_store(run.features)
    sinks = FeatureSinks(features, FeatureChangelog(options.overlay or run.overlay))
    with ExitStack() as stack:
        stack.enter_context(viewer_memory_kept_complete(features, options.events or run.events, metrics))
        logs = {
            topic: stack.enter_context(closing(open_topic(options.events or run.events, topic))) for topic in TOPICS
        }
        store = stack.enter_context(closing(SqliteStore((options.state or run.path / "stream") / "state.db")))
        parked = stack.enter_context(closing(ParkedRecords((options.state or run.path / "stream") / "parked.db")))
        stream = LocalStream(logs, store, sinks, view_settings(run), view_ttl_us(run), video_facts(run), parked=parked)
        stream.start(lambda: load_dataset(run))
        write_stream_clock(run, StreamClock(stream.began_us, stream.behind_us))
        yield stream
