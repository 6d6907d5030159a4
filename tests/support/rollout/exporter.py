"""A service's two metrics endpoints over real HTTP, with counters that a test sets."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from reelway.platform.contracts.events import Arm
from reelway.platform.rollout import metric_names as names
from reelway.platform.rollout.sources.series_reader import SeriesKey
from reelway.platform.telemetry import counter, histogram

Values = dict[SeriesKey, float]


class _Sums(Collector):
    def __init__(self) -> None:
        self.values: Values = {}

    def collect(self) -> Iterator[Metric]:
        for name in (names.EXPOSURE, names.STATISTIC, names.AUDIENCE, names.AUDIENCE_WEIGHT):
            keys = [key for key in self.values if key.name == name]
            if keys:
                labels = [label for label, _ in keys[0].labels]
                family = (CounterMetricFamily if name == names.AUDIENCE else GaugeMetricFamily)(
                    name, "Sums.", labels=labels
                )
                for key in keys:
                    family.add_metric([value for _, value in key.labels], self.values[key])
                yield family


class _AtOnce(ThreadingHTTPServer):
    allow_reuse_address = True
    daemon_threads = True


class Exporter:
    """Router and collector of one service, for releases with these labels.

    ``answer`` replaces a page (path, with or without its query -> status, body), as a broken one would; ``delay_s``
    makes every page late.
    """

    def __init__(self, canary: str, stable: str) -> None:
        self.name(canary, stable)
        self.delay_s = 0.0
        self.sums = _Sums()
        self.answer: dict[str, tuple[int, bytes]] = {}
        self.forget()
        self._start(0)

    def name(self, canary: str, stable: str) -> None:
        """Sets the labels of the releases."""
        self._releases = {Arm.CANARY: canary, Arm.SHADOW: canary, Arm.STABLE: stable, Arm.HOLDOUT: stable}

    def forget(self) -> None:
        """Resets the router's counters; a collector keeps its sums across a restart."""
        router = CollectorRegistry()
        both = ["release", "arm"]
        self._requests = counter(names.REQUESTS, "Requests.", [*both, "outcome"], router)
        self._empty = counter(names.EMPTY_SLATES, "Empty slates.", both, router)
        self._latency = histogram(names.LATENCY, "Latency.", both, router)
        self._mirrored = counter(names.SHADOW_REQUESTS, "Mirrored.", ["release", "outcome"], router)
        collector = CollectorRegistry()
        collector.register(self.sums)
        self.pages = {"/metrics": router, "/v1/outcomes/metrics": collector}

    def count(self, arm: Arm, outcome: str = "ok", times: int = 1, *, latency_s: float = 0.02, empty: int = 0) -> None:
        """Adds requests with this outcome."""
        labels = (self._releases[arm], arm.value)
        self._requests.labels(*labels, outcome).inc(times)
        for _ in range(times):
            self._latency.labels(*labels).observe(latency_s)
        if empty:
            self._empty.labels(*labels).inc(empty)

    def mirror(self, outcome: str, times: int) -> None:
        """Adds mirrored requests with this outcome."""
        self._mirrored.labels(self._releases[Arm.SHADOW], outcome).inc(times)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def stop(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def restart(self) -> None:
        """Restarts at the same address with reset router counters."""
        self.stop()
        self.forget()
        self.start_again()

    def start_again(self) -> None:
        """Listens again at the same address with unchanged counters."""
        self._start(self.port)

    def _start(self, port: int) -> None:
        exporter = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                page = exporter.pages.get(path)
                status, body = (200, generate_latest(page)) if page else (404, b"")
                status, body = exporter.answer.get(self.path, exporter.answer.get(path, (status, body)))
                time.sleep(exporter.delay_s)
                with contextlib.suppress(ConnectionError):  # the client gave up
                    self.send_response(status)
                    self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Logs nothing."""

        self._server = _AtOnce(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
