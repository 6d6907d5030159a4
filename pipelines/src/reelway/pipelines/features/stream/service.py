"""A run's stream from start to end: opens what it needs, goes on until it is told to stop, says how it does.

It refuses a run without features. An online store or changelog that cannot be written stops nothing for good: what was
made waits in the state and is delivered later, and the lag grows for everybody to see.
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
from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

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

log = logging.getLogger(__name__)

PATIENCE_S: Final = 2.0
"""Between two tries where a store cannot be reached."""


@dataclass(frozen=True)
class StreamOptions:
    """Where a run's stream reads and writes; the run's own places when empty."""

    events: str = ""
    overlay: str = ""
    metrics_port: int | None = None
    settings: StreamSettings = field(default_factory=StreamSettings)


class StreamMetrics:
    """``reelway_stream_*``."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._lag = Gauge("reelway_stream_lag_seconds", "Age of what is settled", registry=registry)
        self._outcomes = Counter("reelway_stream_outcomes", "Outcomes by fate", ["fate"], registry=registry)
        self._late = Counter("reelway_stream_late", "Outcomes that came after their time", registry=registry)
        self._rows = Counter("reelway_stream_rows", "Rows written", ["view"], registry=registry)
        self._faults = Counter("reelway_stream_faults", "Rounds that could not be ended", registry=registry)
        self._freshness = Gauge(
            "reelway_stream_freshness_seconds", "Age of what a view's rows say", ["view"], registry=registry
        )
        for fate in FATES:
            self._outcomes.labels(fate)
        self._before = dict.fromkeys(FATES, 0)

    def ended(self, done: Round, processor: Processor, now_s: float, grids_us: Mapping[str, int]) -> None:
        """Add one round."""
        now_us = now_s * SECOND_US - processor.behind_us
        self._lag.set((now_us - processor.settled_us) / SECOND_US)
        for view, grid_us in grids_us.items():
            self._freshness.labels(view).set((now_us - processor.settled_us // grid_us * grid_us) / SECOND_US)
        for view, count in done.rows.items():
            self._rows.labels(view).inc(count)
        self._late.inc(done.late)
        for fate, count in processor.engine.fates.items():
            self._outcomes.labels(fate).inc(count - self._before[fate])
            self._before[fate] = count

    def failed(self) -> None:
        """Add a round that raised."""
        self._faults.inc()


def view_settings(run: RunDirectory) -> ViewSettings:
    """Grids and priors that the run's features were built with: the stream's are the same."""
    config: dict[str, Any] = dict(run.record("features")["config"]["views"])
    dimensions = FeatureDimensions(**config.pop("dimensions"))
    priors = {name: Prior(**value) for name, value in config.items() if isinstance(value, dict)}
    return ViewSettings(dimensions, **{**config, **priors})


def stream(
    run: RunDirectory, options: StreamOptions, stop: threading.Event, said: Callable[[Round], None] | None = None
) -> None:
    """Go on until ``stop`` is set; what was read is then recorded and delivered.

    Raises:
        FeatureError: the run has no features.
        StorageError: the log or the state cannot be opened.
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
                log.error("the stream waits %g s: %s", PATIENCE_S, error)
                stop.wait(PATIENCE_S)
                processor.resume()
                continue
            metrics.ended(done, processor, time.time(), grids_us)
            if said:
                said(done)


@contextmanager
def opened(run: RunDirectory, options: StreamOptions) -> Iterator[Processor]:
    """The run's processor, started."""
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
    """The data set's videos and creators."""
    tables: dict[str, pa.Table] = {}
    for name in ("videos", "creators"):
        try:
            tables[name] = pq.read_table(run.dataset / f"{name}.parquet")
        except FileNotFoundError as error:
            raise FeatureError(f"{run.dataset}: no {name}.parquet; simulate or import a data set first") from error
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
