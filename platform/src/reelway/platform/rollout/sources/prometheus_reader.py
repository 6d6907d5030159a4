"""Reads raw samples of all routers and collectors from Prometheus.

Range selectors as instant queries return raw samples, so the code that judges a direct scrape also handles rates,
resets and staleness here. A reading is complete or absent: an error, a warning (partial data), a timeout or an
unexpected answer discards it, and everything is ``telemetry_down``.

In a shared Prometheus, ``MonitoringAccess.labels`` select this installation's series: the same release id in another
namespace is another canary. The scrape jobs must have the names ``metric_names.ROUTER_JOB`` and
``metric_names.OUTCOMES_JOB``; see rules/scrape.example.yaml.

Prometheus' clock may differ from the controller's. Queries are for Prometheus' own time, which it is asked for first,
and the samples' times are converted to the controller's clock.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeVar

import httpx

from reelway.platform.errors import RolloutError
from reelway.platform.rollout import metric_names as names
from reelway.platform.rollout.counters import Sample
from reelway.platform.rollout.sources.monitoring_access import MonitoringAccess
from reelway.platform.rollout.sources.series_reader import (
    CUMULATIVE_SERIES,
    MAX_SHADOW_S,
    UP,
    WINDOWED_SERIES,
    Scope,
    SeriesKey,
    SeriesReadResult,
)

log = logging.getLogger(__name__)

TIMEOUT_S: Final = 1.0
CLOCK_TOLERANCE_S: Final = 1.0
"""Difference of the clocks that is not corrected. A correction that varied with the latency of each answer would let
the same sample appear older than before."""
_Rows = dict[SeriesKey, list[Sample]]
_T = TypeVar("_T")


class PrometheusReader:
    """Reads one Prometheus, or another server of its HTTP API v1."""

    def __init__(self, url: str, *, access: MonitoringAccess | None = None, timeout_s: float = TIMEOUT_S) -> None:
        access = access or MonitoringAccess()
        self._url = f"{url.rstrip('/')}/api/v1/query"
        self._timeout_s = timeout_s
        self._label_filter = "".join(f",{name}={json.dumps(value)}" for name, value in access.labels.items())
        self._client = access.client(timeout_s)
        self._ahead_s = 0.0
        """Seconds by which the controller's clock is ahead of Prometheus'."""

    def read(self, scope: Scope, now: float) -> SeriesReadResult:
        """Reads targets before samples, so that a scrape in between makes samples newer than ``up``, never older."""
        try:
            ahead_s = self._compare_clocks(now)
            rows = self._read(scope, now, now - ahead_s)
        except RolloutError as error:
            return SeriesReadResult(problem=str(error))
        if not ahead_s:
            return SeriesReadResult(rows)
        return SeriesReadResult({key: [Sample(s.time + ahead_s, s.value) for s in rows[key]] for key in rows})

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def _compare_clocks(self, now: float) -> float:
        """Returns the seconds by which the clock that gave ``now`` is ahead of Prometheus'."""
        ahead_s = now - self._fetch("time()", None, "scalar", lambda result: float(result[1]))
        if abs(ahead_s - self._ahead_s) > CLOCK_TOLERANCE_S:
            self._ahead_s = ahead_s if abs(ahead_s) > CLOCK_TOLERANCE_S else 0.0
            log.warning("Prometheus at %s: its clock is %.1f s behind; its times are corrected", self._url, ahead_s)
        return self._ahead_s

    def _read(self, scope: Scope, now: float, server_now: float) -> _Rows:
        """Returns the rows at ``server_now``, which is ``now`` by Prometheus' clock."""
        jobs = f"job=~{_any_of((names.ROUTER_JOB, names.OUTCOMES_JOB))}{self._label_filter}"
        window = f"[{math.ceil(scope.window_s)}s]"
        rows = self._query(f"{UP}{{{jobs}}}{window}", server_now, "matrix")
        targets = self._query(f"{UP}{{{jobs}}}", server_now, "vector")
        for key, samples in rows.items():
            if key not in targets:
                samples.append(Sample(server_now, math.nan))
        releases = f"release=~{_any_of(scope.releases)}"
        rows |= self._query(f"{{__name__=~{_any_of(WINDOWED_SERIES)},{jobs},{releases}}}{window}", server_now, "matrix")
        if scope.shadow_since is not None:
            reach = math.ceil(min(max(now - scope.shadow_since, scope.window_s), MAX_SHADOW_S))
            rows |= self._query(f"{names.SHADOW_REQUESTS}{{{jobs},{releases}}}[{reach}s]", server_now, "matrix")
        last_sample_times = [
            time for key, samples in rows.items() if (time := _last_sample_time(key, samples)) is not None
        ]
        if not last_sample_times:
            return rows
        reach = math.ceil(max(now - scope.started_at, 0.0) + scope.window_s)
        selector = f"{jobs},rollout={json.dumps(scope.rollout)}"
        return rows | self._sums(selector, server_now, reach, last_sample_times)

    def _sums(self, selector: str, server_now: float, reach: int, last_sample_times: list[float]) -> _Rows:
        """Returns the collector's sums. The number of viewers starts with its highest value of the last ``reach`` s.

        Sums are cumulative, so only the last scrapes, at ``last_sample_times``, are read.
        """
        span = f"[{math.ceil((max(last_sample_times) - min(last_sample_times)) * 1000) + 100}ms]"
        newest = f"{{__name__=~{_any_of(CUMULATIVE_SERIES)},{selector}}}{span}"
        rows = self._query(newest, max(last_sample_times), "matrix")
        viewers = f'{names.AUDIENCE}{{{selector},statistic="viewers"}}[{reach}s]'
        highest = self._query(f"max_over_time({viewers})", server_now, "vector")
        for key, [sample] in highest.items():
            named = SeriesKey(names.AUDIENCE, key.labels)
            rows[named] = [Sample(server_now - reach, sample.value), *rows.get(named, [])]
        return rows

    def _query(self, promql: str, time: float, kind: str) -> _Rows:
        """Sends one instant query. Raises RolloutError as ``_fetch``."""
        return self._fetch(promql, time, kind, lambda result: dict(_row(item, kind) for item in result))

    def _fetch(self, promql: str, time: float | None, kind: str, parse: Callable[[Any], _T]) -> _T:
        """Sends one instant query for ``time``, by default Prometheus' own, and returns its parsed result.

        Raises:
            RolloutError: on a timeout, an error, a warning, or an answer of another type.
        """
        parameters = {"query": promql, "timeout": f"{self._timeout_s:g}s"}
        if time is not None:
            parameters["time"] = f"{time:.3f}"
        try:
            answer = self._client.get(self._url, params=parameters)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise RolloutError(f"no answer from Prometheus at {self._url}: {error or type(error).__name__}") from error
        try:
            body = answer.json()
            if not answer.is_success or not isinstance(body, dict) or body.get("status") != "success":
                raise RolloutError(f"Prometheus at {self._url} answered {answer.status_code}: {_error_text(body)}")
            if body.get("warnings"):
                raise RolloutError(f"Prometheus at {self._url} gave a partial answer: {'; '.join(body['warnings'])}")
            if (result_type := body["data"]["resultType"]) != kind:
                raise RolloutError(f"Prometheus at {self._url} answered {result_type}, expected {kind}, to {promql}")
            return parse(body["data"]["result"])
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            shown = f"{answer.status_code}, {answer.text[:100]!r}"
            raise RolloutError(
                f"Prometheus at {self._url}: expected an answer of API v1 ({shown}): {error!r}"
            ) from error


def _last_sample_time(key: SeriesKey, samples: list[Sample]) -> float | None:
    """Returns the time of a collector's last successful scrape if it is still a target; None for any other series."""
    if key.name != UP or key.get("job") != names.OUTCOMES_JOB or math.isnan(samples[-1].value):
        return None
    return max((s.time for s in samples if s.value == 1.0), default=None)


def _row(item: dict[str, Any], kind: str) -> tuple[SeriesKey, list[Sample]]:
    labels = dict(item["metric"])
    key = SeriesKey.of(labels.pop("__name__", ""), labels)
    pairs = item["values"] if kind == "matrix" else [item["value"]]
    return key, [Sample(float(time), float(value)) for time, value in pairs]


def _error_text(body: object) -> str:
    if isinstance(body, dict) and "error" in body:
        return f"{body.get('errorType', 'error')}: {body['error']}"
    return f"{body!r:.200}"


def _any_of(values: Iterable[str]) -> str:
    """Returns a quoted regular expression that matches exactly these values."""
    return json.dumps("|".join(re.escape(value) for value in values))
