"""Evidence without Prometheus, for local mode: scrapes the service directly and stores samples for one window.

A failed scrape leaves a gap that is not filled, and its last samples age. Samples are in memory, so the first window
after a restart is short.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

import httpx
from prometheus_client.parser import text_string_to_metric_families

from reelway.platform.errors import ServingError
from reelway.platform.rollout import metric_names as names
from reelway.platform.rollout.counters import Sample
from reelway.platform.rollout.sources.series_reader import (
    CUMULATIVE_SERIES,
    MAX_SHADOW_S,
    UP,
    WINDOWED_SERIES,
    Scope,
    SeriesKey,
    SeriesReadResult,
)
from reelway.platform.run_directory import RunDirectory

PATHS: Final = {names.ROUTER_JOB: "/metrics", names.OUTCOMES_JOB: "/v1/outcomes/metrics"}
INTERVAL_S: Final = 0.5
"""Minimum seconds between scrapes: one costs the router a few milliseconds. Reads in between return stored samples."""
TIMEOUT_S: Final = 1.0
_KEPT: Final = (*WINDOWED_SERIES, *CUMULATIVE_SERIES, names.SHADOW_REQUESTS)


class DirectScrapeReader:
    """Scrapes the two metrics endpoints of one service's internal API on ``read``.

    Args:
        address: returns the current URL of the internal API; raises ServingError if it does not run.
    """

    def __init__(
        self, address: Callable[[], str], *, interval_s: float = INTERVAL_S, timeout_s: float = TIMEOUT_S
    ) -> None:
        self._address = address
        self._interval_s = interval_s
        self._client = httpx.Client(timeout=timeout_s, trust_env=False)
        self._recent: dict[SeriesKey, deque[Sample]] = {}
        self._sums: dict[SeriesKey, tuple[Sample, Sample]] = {}  # highest, newest
        self._instance = ""
        self._read_at = -math.inf
        self._problem = ""

    def read(self, scope: Scope, now: float) -> SeriesReadResult:
        """Scrapes, unless the last scrape is younger than the interval, and returns all stored samples."""
        self._evict(scope, now)
        if now - self._read_at >= self._interval_s:
            self._read_at, self._problem = now, self._scrape(scope, now)
        sums = {key: [*dict.fromkeys(pair)] for key, pair in self._sums.items()}
        return SeriesReadResult(
            {**{key: list(samples) for key, samples in self._recent.items()}, **sums}, self._problem
        )

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def _scrape(self, scope: Scope, now: float) -> str:
        """Scrapes both endpoints. Returns why one failed; empty if none did."""
        try:
            instance = self._address()
        except ServingError as error:
            self._on_address_change(None, now)
            return str(error)
        self._on_address_change(instance, now)
        problems = []
        for job, path in PATHS.items():
            origin = {"instance": instance, "job": job}
            try:
                page = list(self._samples(instance + path, origin))
            except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
                problems.append(f"GET {instance}{path}: {error or type(error).__name__}")
                page = None
            self._keep(SeriesKey.of(UP, origin), Sample(now, float(page is not None)))
            for key, value in page or ():
                self._remember(scope, key, Sample(now, value))
        return "; ".join(problems)

    def _samples(self, url: str, origin: dict[str, str]) -> Iterator[tuple[SeriesKey, float]]:
        """Returns the needed series of one endpoint. Raises ValueError if it is not in Prometheus' text format."""
        answer = self._client.get(url)
        answer.raise_for_status()
        lines = (line for line in answer.text.splitlines() if line.startswith(_KEPT))
        for family in text_string_to_metric_families("\n".join(lines) + "\n"):  # type: ignore[no-untyped-call]
            for sample in family.samples:
                yield SeriesKey.of(sample.name, {**sample.labels, **origin}), sample.value

    def _remember(self, scope: Scope, key: SeriesKey, sample: Sample) -> None:
        if key.name not in CUMULATIVE_SERIES:
            self._keep(key, sample)
        elif key.get("rollout") == scope.rollout:
            highest = self._sums[key][0] if key in self._sums else sample
            if sample.value > highest.value or not math.isfinite(highest.value):
                highest = sample
            self._sums[key] = (highest, sample)

    def _keep(self, key: SeriesKey, sample: Sample) -> None:
        self._recent.setdefault(key, deque()).append(sample)

    def _on_address_change(self, instance: str | None, now: float) -> None:
        """Marks the previous address as removed, so that it does not count as silent."""
        if self._instance and self._instance != instance:
            for job in PATHS:
                self._keep(SeriesKey.of(UP, {"instance": self._instance, "job": job}), Sample(now, math.nan))
        self._instance = instance or ""

    def _evict(self, scope: Scope, now: float) -> None:
        """Deletes samples before their window, sums of other rollouts, and everything if the clock was set back."""
        if now < self._read_at:
            self._recent.clear()
            self._read_at = -math.inf
        self._sums = {key: pair for key, pair in self._sums.items() if key.get("rollout") == scope.rollout}
        for key, samples in list(self._recent.items()):
            since = now - (MAX_SHADOW_S if key.name == names.SHADOW_REQUESTS else scope.window_s)
            while samples and samples[0].time < since:
                samples.popleft()
            if not samples:
                del self._recent[key]


def internal_url(run: RunDirectory) -> str:
    """Returns the URL of the internal API of a run's service, read on every use because a restart may change it.

    Raises:
        ServingError: if the run is not served.
    """
    path = run.path / "serving.json"
    try:
        return str(json.loads(path.read_text())["internal_url"]).rstrip("/")
    except FileNotFoundError:
        raise ServingError(f"{run.path} is not being served; start `reelway serve --run {run.path}`") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ServingError(f"{path} has no URL of the internal API ({error!r}); start `reelway serve` again") from error
