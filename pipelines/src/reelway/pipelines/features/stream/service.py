"""The stream of a run: opens its inputs and sinks, processes micro-batches until it is stopped, and exports metrics.

A run without features is an error. Records of the log that cannot be read are parked in ``stream/parked.db`` and
counted. If an online store or changelog cannot be written, computed rows wait in the state and are delivered later.
Meanwhile the lag metric grows.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
from prometheus_client import CollectorRegistry, start_http_server

from reelway.pipelines.features.stream.engine import APPLY_RESULTS, StreamCatalogue
from reelway.pipelines.features.stream.log_records import PARKED_KINDS
from reelway.pipelines.features.stream.processor import SECOND_US, MicroBatchResult, StreamProcessor, StreamSettings
from reelway.pipelines.features.stream.sinks import FeatureSinks
from reelway.pipelines.features.stream.state import StreamState
from reelway.pipelines.features.stream.time_buckets import STREAMED, emission_schedules
from reelway.pipelines.features.training_rows import LABELS_FILE, read_feature_file
from reelway.pipelines.features.views import Prior, ViewSettings
from reelway.platform.contracts.feature_dimensions import FeatureDimensions
from reelway.platform.errors import FeatureError, MalformedFileError, StorageError
from reelway.platform.eventlog.feature_changelog import FeatureChangelog
from reelway.platform.eventlog.parked_records import ParkedRecords
from reelway.platform.eventlog.topics import Topic, open_topic
from reelway.platform.features.feast_store import open_feature_store
from reelway.platform.run_directory import RunDirectory
from reelway.platform.telemetry import counter, gauge

log = logging.getLogger(__name__)

RETRY_DELAY_S: Final = 2.0
"""Delay between two attempts when a store cannot be reached."""


@dataclass(frozen=True)
class StreamOptions:
    """Inputs and outputs of a run's stream; empty values mean the run's own files."""

    events: str = ""
    overlay: str = ""
    metrics_port: int | None = None
    settings: StreamSettings = field(default_factory=StreamSettings)


class StreamMetrics:
    """Exports the metrics ``reelway_stream_*``."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._lag = gauge("reelway_stream_lag_seconds", "Age of the watermark.", [], registry)
        self._outcomes = counter("reelway_stream_outcomes_total", "Outcomes by result.", ["result"], registry)
        self._late = counter(
            "reelway_stream_late_outcomes_total", "Outcomes that arrived behind the watermark.", [], registry
        )
        self._parked = counter(
            "reelway_stream_parked_records_total", "Unreadable records of the event log.", ["kind"], registry
        )
        self._rows = counter("reelway_stream_rows_total", "Rows written.", ["view"], registry)
        self._faults = counter("reelway_stream_faults_total", "Micro-batches that failed.", [], registry)
        self._freshness = gauge("reelway_stream_freshness_seconds", "Age of a view's rows.", ["view"], registry)
        for result in APPLY_RESULTS:
            self._outcomes.labels(result)
        for kind in PARKED_KINDS:
            self._parked.labels(kind)
        self._before = dict.fromkeys(APPLY_RESULTS, 0)

    def record_batch(
        self, done: MicroBatchResult, processor: StreamProcessor, now_s: float, grids_us: Mapping[str, int]
    ) -> None:
        now_us = now_s * SECOND_US - processor.behind_us
        self._lag.set((now_us - processor.settled_us) / SECOND_US)
        for view, grid_us in grids_us.items():
            self._freshness.labels(view).set((now_us - processor.settled_us // grid_us * grid_us) / SECOND_US)
        for view, count in done.rows.items():
            self._rows.labels(view).inc(count)
        self._late.inc(done.late)
        for kind, count in done.parked.items():
            self._parked.labels(kind).inc(count)
        for result, count in processor.engine.result_counts.items():
            self._outcomes.labels(result).inc(count - self._before[result])
            self._before[result] = count

    def record_failure(self) -> None:
        self._faults.inc()


def view_settings(run: RunDirectory) -> ViewSettings:
    """Returns the grids and priors of the run's features. The stream uses the same values."""
    config: dict[str, Any] = dict(run.record("features")["config"]["views"])
    dimensions = FeatureDimensions(**config.pop("dimensions"))
    priors = {name: Prior(**value) for name, value in config.items() if isinstance(value, dict)}
    return ViewSettings(dimensions, **{**config, **priors})


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
    metrics = StreamMetrics(registry)
    with _metrics_server(options.metrics_port, registry), open_processor(run, options) as processor:
        grids_us = {view: schedule.grid_us for view, schedule in emission_schedules(view_settings(run)).items()}
        while not stop.is_set():
            try:
                done = processor.run_micro_batch()
            except (FeatureError, MalformedFileError, StorageError) as error:
                metrics.record_failure()
                log.error("micro-batch failed, retrying in %g s: %s", RETRY_DELAY_S, error)
                stop.wait(RETRY_DELAY_S)
                processor.resume()
                continue
            metrics.record_batch(done, processor, time.time(), grids_us)
            if on_batch:
                on_batch(done)


@contextmanager
def open_processor(run: RunDirectory, options: StreamOptions) -> Iterator[StreamProcessor]:
    """Opens and starts the run's processor."""
    store = open_feature_store(run.features)
    ttl_us = {view: int(store.get_feature_view(view).ttl.total_seconds() * SECOND_US) for view in STREAMED}
    outputs = FeatureSinks(store, FeatureChangelog(options.overlay or run.overlay))
    with (
        closing(open_topic(options.events or run.events, Topic.OUTCOMES)) as events,
        closing(StreamState(run.path / "stream" / "state.db")) as state,
        closing(ParkedRecords(run.path / "stream" / "parked.db")) as parked,
    ):
        processor = StreamProcessor(events, state, outputs, view_settings(run), ttl_us, options.settings, parked=parked)
        processor.start(catalogue_of(run), read_feature_file(run.features / LABELS_FILE))
        yield processor


def catalogue_of(run: RunDirectory) -> StreamCatalogue:
    """Reads the data set's videos and creators."""
    tables: dict[str, pa.Table] = {}
    for name in ("videos", "creators"):
        try:
            tables[name] = pq.read_table(run.dataset / f"{name}.parquet")
        except FileNotFoundError as error:
            raise FeatureError(
                f"{run.dataset}: {name}.parquet not found; simulate or import a data set first"
            ) from error
    return StreamCatalogue.of(tables["videos"], tables["creators"])


@contextmanager
def _metrics_server(port: int | None, registry: CollectorRegistry) -> Iterator[None]:
    if port is None:
        yield
        return
    server, thread = start_http_server(port, registry=registry)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
