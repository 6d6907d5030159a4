"""Why: on one machine the service can be asked itself, so that evidence needs no Prometheus.

Remembers what it scraped for as long as a window; refuses to fill a gap: a scrape that failed leaves none of its
samples, and what is not heard again grows old. Its memory is the process's: after a restart the first window is short.
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
from reelway.platform.rollout import series as names
from reelway.platform.rollout.counters import Sample
from reelway.platform.rollout.sources.heard_series import (
    COUNTED_OVER_A_WINDOW,
    KEPT_SINCE_THE_START,
    LONGEST_SHADOW_S,
    UP,
    Heard,
    Scope,
    SeriesKey,
)
from reelway.platform.runs import RunDirectory

PATHS: Final = {names.ROUTER_JOB: "/metrics", names.OUTCOMES_JOB: "/v1/outcomes/metrics"}
INTERVAL_S: Final = 0.5
"""Asked more often than this, the memory answers: a scrape costs the router a few milliseconds."""
TIMEOUT_S: Final = 1.0
_KEPT: Final = (*COUNTED_OVER_A_WINDOW, *KEPT_SINCE_THE_START, names.SHADOW_REQUESTS)


class DirectScrape:
    """Scrapes one service's two pages when it is read.

    Args:
        address: where the service is now; raises ServingError when it is nowhere.
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

    def read(self, scope: Scope, now: float) -> Heard:
        """Scrape, unless that was done less than the interval ago, and give what is remembered."""
        self._forget(scope, now)
        if now - self._read_at >= self._interval_s:
            self._read_at, self._problem = now, self._scrape(scope, now)
        sums = {key: [*dict.fromkeys(pair)] for key, pair in self._sums.items()}
        return Heard({**{key: list(samples) for key, samples in self._recent.items()}, **sums}, self._problem)

    def close(self) -> None:
        """Let go of the connections."""
        self._client.close()

    def _scrape(self, scope: Scope, now: float) -> str:
        """Ask both pages; why one did not answer, empty when both did."""
        try:
            instance = self._address()
        except ServingError as error:
            self._move(None, now)
            return str(error)
        self._move(instance, now)
        problems = []
        for job, path in PATHS.items():
            origin = {"instance": instance, "job": job}
            try:
                found = list(self._samples(instance + path, origin))
            except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
                problems.append(f"GET {instance}{path}: {error or type(error).__name__}")
                found = None
            self._keep(SeriesKey.of(UP, origin), Sample(now, float(found is not None)))
            for key, value in found or ():
                self._remember(scope, key, Sample(now, value))
        return "; ".join(problems)

    def _samples(self, url: str, origin: dict[str, str]) -> Iterator[tuple[SeriesKey, float]]:
        """The kept families of one page. Raises ValueError: it is not what Prometheus' text format says."""
        answer = self._client.get(url)
        answer.raise_for_status()
        lines = (line for line in answer.text.splitlines() if line.startswith(_KEPT))
        for family in text_string_to_metric_families("\n".join(lines) + "\n"):  # type: ignore[no-untyped-call]
            for sample in family.samples:
                yield SeriesKey.of(sample.name, {**sample.labels, **origin}), sample.value

    def _remember(self, scope: Scope, key: SeriesKey, sample: Sample) -> None:
        if key.name not in KEPT_SINCE_THE_START:
            self._keep(key, sample)
        elif key.get("rollout") == scope.rollout:
            highest = self._sums[key][0] if key in self._sums else sample
            if sample.value > highest.value or not math.isfinite(highest.value):
                highest = sample
            self._sums[key] = (highest, sample)

    def _keep(self, key: SeriesKey, sample: Sample) -> None:
        self._recent.setdefault(key, deque()).append(sample)

    def _move(self, instance: str | None, now: float) -> None:
        """The service has another address than before: the old one is gone, not silent."""
        if self._instance and self._instance != instance:
            for job in PATHS:
                self._keep(SeriesKey.of(UP, {"instance": self._instance, "job": job}), Sample(now, math.nan))
        self._instance = instance or ""

    def _forget(self, scope: Scope, now: float) -> None:
        """Drop what is older than its window, sums of other rollouts, and a future that a clock set back undid."""
        if now < self._read_at:
            self._recent.clear()
            self._read_at = -math.inf
        self._sums = {key: pair for key, pair in self._sums.items() if key.get("rollout") == scope.rollout}
        for key, samples in list(self._recent.items()):
            since = now - (LONGEST_SHADOW_S if key.name == names.SHADOW_REQUESTS else scope.window_s)
            while samples and samples[0].time < since:
                samples.popleft()
            if not samples:
                del self._recent[key]


def served_at(run: RunDirectory) -> str:
    """The address of a run's service, read anew at each use since a restart may change it.

    Raises:
        ServingError: the run is not being served.
    """
    path = run.path / "serving.json"
    try:
        return str(json.loads(path.read_text())["url"]).rstrip("/")
    except FileNotFoundError:
        raise ServingError(f"{run.path} is not being served; start `reelway serve --run {run.path}`") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ServingError(
            f"{path} does not say where the service is ({error!r}); start `reelway serve` again"
        ) from error
