"""The stream of a run: opens its inputs and sinks, processes micro-batches until it is stopped, and exports metrics.

A run without features is an error. If an online store or changelog cannot be written, computed rows wait in the state
and are delivered later. Meanwhile the lag metric grows.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
from prometheus_client import CollectorRegistry, start_http_server

from reelway.pipelines.features.stream.cells import STREAMED, rhythms
from reelway.pipelines.features.stream.engine import FATES, Catalogue
from reelway.pipelines.features.stream.outputs import Outputs
from reelway.pipelines.features.stream.processor import SECOND_US, Processor, Round, StreamSettings
from reelway.pipelines.features.stream.state import StreamState
from reelway.pipelines.features.training_rows import LABELS_FILE, read_artifact
from reelway.pipelines.features.views import Prior, ViewSettings
from reelway.platform.contracts.feature_dimensions import FeatureDimensions
from reelway.platform.errors import FeatureError, StorageError
from reelway.platform.eventlog import EventLog, open_event_log
from reelway.platform.eventlog.changelog import Changelog
from reelway.platform.features.store import open_feature_store
from reelway.platform.runs import RunDirectory
from reelway.platform.telemetry import counter, gauge

log = logging.getLogger(__name__)

PATIENCE_S: Final = 2.0
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
        self._rows = counter("reelway_stream_rows_total", "Rows written.", ["view"], registry)
        self._faults = counter("reelway_stream_faults_total", "Micro-batches that failed.", [], registry)
        self._freshness = gauge("reelway_stream_freshness_seconds", "Age of a view's rows.", ["view"], registry)
        for result in FATES:
            self._outcomes.labels(result)
        self._before = dict.fromkeys(FATES, 0)

    def ended(self, done: Round, processor: Processor, now_s: float, grids_us: Mapping[str, int]) -> None:
        now_us = now_s * SECOND_US - processor.behind_us
        self._lag.set((now_us - processor.settled_us) / SECOND_US)
        for view, grid_us in grids_us.items():
            self._freshness.labels(view).set((now_us - processor.settled_us // grid_us * grid_us) / SECOND_US)
        for view, count in done.rows.items():
            self._rows.labels(view).inc(count)
        self._late.inc(done.late)
        for result, count in processor.engine.fates.items():
            self._outcomes.labels(result).inc(count - self._before[result])
            self._before[result] = count

    def failed(self) -> None:
        self._faults.inc()


def view_settings(run: RunDirectory) -> ViewSettings:
    """Returns the grids and priors of the run's features. The stream uses the same values."""
    config: dict[str, Any] = dict(run.record("features")["config"]["views"])
    dimensions = FeatureDimensions(**config.pop("dimensions"))
    priors = {name: Prior(**value) for name, value in config.items() if isinstance(value, dict)}
    return ViewSettings(dimensions, **{**config, **priors})


def stream(
    run: RunDirectory, options: StreamOptions, stop: threading.Event, said: Callable[[Round], None] | None = None
) -> None:
    """Processes micro-batches until ``stop`` is set. Everything read by then is recorded and delivered.

    Raises:
        FeatureError: if the run has no features.
        StorageError: if the log or the state cannot be opened.
    """
    registry = CollectorRegistry()
    metrics = StreamMetrics(registry)
    with _metrics_server(options.metrics_port, registry), opened(run, options) as processor:
        grids_us = {view: rhythm.grid_us for view, rhythm in rhythms(view_settings(run)).items()}
        while not stop.is_set():
            try:
                done = processor.round()
            except (FeatureError, StorageError) as error:
                metrics.failed()
                log.error("micro-batch failed, retrying in %g s: %s", PATIENCE_S, error)
                stop.wait(PATIENCE_S)
                processor.resume()
                continue
            metrics.ended(done, processor, time.time(), grids_us)
            if said:
                said(done)


@contextmanager
def opened(run: RunDirectory, options: StreamOptions) -> Iterator[Processor]:
    """Opens and starts the run's processor."""
    store = open_feature_store(run.features)
    ttl_us = {view: int(store.get_feature_view(view).ttl.total_seconds() * SECOND_US) for view in STREAMED}
    outputs = Outputs(store, Changelog(options.overlay or run.overlay))
    events: EventLog = open_event_log(options.events or run.event_log)
    try:
        state = StreamState(run.path / "stream" / "state.db")
        try:
            processor = Processor(events, state, outputs, view_settings(run), ttl_us, options.settings)
            processor.start(catalogue_of(run), read_artifact(run.features / LABELS_FILE))
            yield processor
        finally:
            state.close()
    finally:
        events.close()


def catalogue_of(run: RunDirectory) -> Catalogue:
    """Reads the data set's videos and creators."""
    tables: dict[str, pa.Table] = {}
    for name in ("videos", "creators"):
        try:
            tables[name] = pq.read_table(run.dataset / f"{name}.parquet")
        except FileNotFoundError as error:
            raise FeatureError(
                f"{run.dataset}: {name}.parquet not found; simulate or import a data set first"
            ) from error
    return Catalogue.of(tables["videos"], tables["creators"])


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
