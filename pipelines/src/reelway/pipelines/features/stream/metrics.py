"""Metrics ``reelway_stream_*``, exported for Prometheus by either host."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from prometheus_client import CollectorRegistry, start_http_server

from reelway.pipelines.features.stream.log_records import PARKED_KINDS
from reelway.pipelines.features.stream.open_impressions import APPLY_RESULTS
from reelway.pipelines.features.views import SECOND_US
from reelway.platform.listen_address import all_interfaces
from reelway.platform.telemetry import counter, gauge


class StreamMetrics:
    """Counts events, rows and faults, and measures how far the stream is behind.

    Ages are computed when Prometheus reads them, so they grow while the stream fails or hangs.

    Args:
        clock: Unix seconds.
    """

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._behind_us = 0
        self._settled_us: dict[int, int] = {}  # by partition
        self._lag = gauge("reelway_stream_lag_seconds", "Age of the watermark.", [], registry)
        self._lag_records = gauge(
            "reelway_stream_lag_records", "Unread records of a partition.", ["topic", "partition"], registry
        )
        self._events = {
            "outcomes": counter("reelway_stream_outcomes_total", "Outcomes by result.", ["result"], registry),
            "exposures": counter("reelway_stream_exposures_total", "Exposures by result.", ["result"], registry),
        }
        self._parked = counter(
            "reelway_stream_parked_records_total", "Unreadable records of the event log.", ["kind"], registry
        )
        self._rows = counter("reelway_stream_rows_total", "Rows written.", ["view"], registry)
        self._faults = counter("reelway_stream_faults_total", "Micro-batches that failed.", [], registry)
        self._freshness = gauge("reelway_stream_freshness_seconds", "Age of a view's rows.", ["view"], registry)
        self._viewer_memory = gauge(
            "reelway_stream_viewer_memory_complete", "1 if the viewers' memory is complete.", [], registry
        )
        self._viewer_memory_faults = counter(
            "reelway_stream_viewer_memory_faults_total", "Failed checks of the viewers' memory.", [], registry
        )
        for events in self._events.values():
            for result in APPLY_RESULTS:
                events.labels(result)
        for kind in PARKED_KINDS:
            self._parked.labels(kind)

    def measure_ages(self, behind_us: int, grids_us: Mapping[str, int]) -> None:
        """Begins to export ages: of the watermark, and of each view's rows, which are due on its grid.

        Args:
            behind_us: how far the stream's time is behind the clock.
        """
        self._behind_us = behind_us
        self._lag.set_function(lambda: self._age_s(1))
        for view, grid_us in grids_us.items():
            self._freshness.labels(view).set_function(partial(self._age_s, grid_us))

    def record_progress(self, settled_us: int, partition: int = 0) -> None:
        """Records a partition's watermark. The ages are those of the partition that is furthest behind."""
        self._settled_us[partition] = settled_us

    def record_assignment(self, partitions: Iterable[int]) -> None:
        """Lets the age of newly assigned partitions grow from now on until their first progress."""
        for partition in partitions:
            self._settled_us.setdefault(partition, self._now_us())

    def record_revocation(self, partitions: Iterable[int]) -> None:
        """Forgets partitions that another member processes from now on."""
        for partition in partitions:
            self._settled_us.pop(partition, None)

    def _now_us(self) -> int:
        """Returns the present in the stream's time."""
        return int(self._clock() * 1e6) - self._behind_us

    def _age_s(self, grid_us: int) -> float:
        """Returns the age of the oldest watermark's moment on a grid; 0 without partitions."""
        settled_us = list(self._settled_us.values())  # another thread may change it
        return (self._now_us() - min(settled_us) // grid_us * grid_us) / SECOND_US if settled_us else 0.0

    def record_lag(self, records: Mapping[tuple[str, int], int]) -> None:
        """Sets the number of unread records by topic and partition; partitions of other members are removed."""
        self._lag_records.clear()
        for (topic, partition), count in records.items():
            self._lag_records.labels(topic, str(partition)).set(count)

    def count_events(self, results: Mapping[tuple[str, str], int]) -> None:
        for (kind, result), count in results.items():
            self._events[kind].labels(result).inc(count)

    def count_parked(self, kinds: Mapping[str, int]) -> None:
        for kind, count in kinds.items():
            self._parked.labels(kind).inc(count)

    def count_rows(self, rows: Mapping[str, int]) -> None:
        for view, count in rows.items():
            self._rows.labels(view).inc(count)

    def record_viewer_memory(self, is_complete: bool) -> None:
        self._viewer_memory.set(float(is_complete))

    def count_viewer_memory_fault(self) -> None:
        self._viewer_memory_faults.inc()

    def count_fault(self) -> None:
        self._faults.inc()


@contextmanager
def metrics_server(port: int | None, registry: CollectorRegistry) -> Iterator[None]:
    """Serves the metrics for the block; nothing if ``port`` is None."""
    if port is None:
        yield
        return
    server, thread = start_http_server(port, all_interfaces(), registry=registry)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
