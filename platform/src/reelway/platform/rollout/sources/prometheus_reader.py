"""Why: where Prometheus scrapes the service, the controller asks Prometheus and sees all routers at once.

Reads raw samples (a range selector as an instant query), so that rates, resets and staleness are judged by the code
that also judges a direct scrape. All or nothing: an error, a warning (a part of the data is missing), an answer that
is late or is not what the API says ends the whole reading, and everything is ``telemetry_down``.

Where Prometheus serves others too, ``Access.labels`` name what is ours: a release under the same id in another
namespace is another canary.

The scrape jobs must be called as ``series.ROUTER_JOB`` and ``series.OUTCOMES_JOB`` say; see rules/scrape.example.yaml.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any, Final

import httpx

from reelway.platform.errors import RolloutError
from reelway.platform.rollout import series as names
from reelway.platform.rollout.counters import Sample
from reelway.platform.rollout.sources.access import Access
from reelway.platform.rollout.sources.heard_series import (
    COUNTED_OVER_A_WINDOW,
    KEPT_SINCE_THE_START,
    LONGEST_SHADOW_S,
    UP,
    Heard,
    Scope,
    SeriesKey,
)

TIMEOUT_S: Final = 1.0
_Rows = dict[SeriesKey, list[Sample]]


class PrometheusReader:
    """Reads one Prometheus (or what speaks its HTTP API v1)."""

    def __init__(self, url: str, *, access: Access | None = None, timeout_s: float = TIMEOUT_S) -> None:
        access = access or Access()
        self._url = f"{url.rstrip('/')}/api/v1/query"
        self._timeout_s = timeout_s
        self._ours = "".join(f",{name}={json.dumps(value)}" for name, value in access.labels.items())
        self._client = access.client(timeout_s)

    def read(self, scope: Scope, now: float) -> Heard:
        """Targets first, samples after: a scrape in between makes samples newer than ``up``, never older."""
        try:
            return Heard(self._read(scope, now))
        except RolloutError as error:
            return Heard(problem=str(error))

    def close(self) -> None:
        """Let go of the connections."""
        self._client.close()

    def _read(self, scope: Scope, now: float) -> _Rows:
        jobs = f"job=~{_any_of((names.ROUTER_JOB, names.OUTCOMES_JOB))}{self._ours}"
        window = f"[{math.ceil(scope.window_s)}s]"
        rows = self._query(f"{UP}{{{jobs}}}{window}", now, "matrix")
        targets = self._query(f"{UP}{{{jobs}}}", now, "vector")
        for key, samples in rows.items():
            if key not in targets:
                samples.append(Sample(now, math.nan))
        releases = f"release=~{_any_of(scope.releases)}"
        rows |= self._query(f"{{__name__=~{_any_of(COUNTED_OVER_A_WINDOW)},{jobs},{releases}}}{window}", now, "matrix")
        if scope.shadow_since is not None:
            reach = math.ceil(min(max(now - scope.shadow_since, scope.window_s), LONGEST_SHADOW_S))
            rows |= self._query(f"{names.SHADOW_REQUESTS}{{{jobs},{releases}}}[{reach}s]", now, "matrix")
        heard = [time for key, samples in rows.items() if (time := _last_heard(key, samples)) is not None]
        if not heard:
            return rows
        return rows | self._sums(scope, now, f"{jobs},rollout={json.dumps(scope.rollout)}", heard)

    def _sums(self, scope: Scope, now: float, selector: str, heard: list[float]) -> _Rows:
        """The collector's sums, the number of viewers preceded by the highest that it ever was in the rollout.

        Sums are what they are at the last scrape, so only those at the moments ``heard`` are read.
        """
        span = f"[{math.ceil((max(heard) - min(heard)) * 1000) + 100}ms]"
        newest = f"{{__name__=~{_any_of(KEPT_SINCE_THE_START)},{selector}}}{span}"
        rows = self._query(newest, max(heard), "matrix")
        reach = math.ceil(max(now - scope.started_at, 0.0) + scope.window_s)
        viewers = f'{names.EXPOSURE}{{{selector},statistic="viewers"}}[{reach}s]'
        highest = self._query(f"max_over_time({viewers})", now, "vector")
        for key, [sample] in highest.items():
            named = SeriesKey(names.EXPOSURE, key.labels)
            rows[named] = [Sample(now - reach, sample.value), *rows.get(named, [])]
        return rows

    def _query(self, promql: str, now: float, kind: str) -> _Rows:
        """One instant query.

        Raises:
            RolloutError: no answer in time, an error, a warning, or an answer of another shape.
        """
        parameters = {"query": promql, "time": f"{now:.3f}", "timeout": f"{self._timeout_s:g}s"}
        try:
            answer = self._client.get(self._url, params=parameters)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise RolloutError(f"no answer from Prometheus at {self._url}: {error or type(error).__name__}") from error
        try:
            body = answer.json()
            if not answer.is_success or not isinstance(body, dict) or body.get("status") != "success":
                raise RolloutError(f"Prometheus at {self._url} answered {answer.status_code}: {_complaint(body)}")
            if body.get("warnings"):
                raise RolloutError(f"Prometheus at {self._url} answered in part: {'; '.join(body['warnings'])}")
            if (seen := body["data"]["resultType"]) != kind:
                raise RolloutError(f"Prometheus at {self._url} answered {seen}, expected {kind}, to {promql}")
            return dict(_row(item, kind) for item in body["data"]["result"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            told = f"{answer.status_code}, {answer.text[:100]!r}"
            raise RolloutError(f"Prometheus at {self._url}: not an answer of API v1 ({told}): {error!r}") from error


def _last_heard(key: SeriesKey, samples: list[Sample]) -> float | None:
    """When a collector that is still a target was last heard; None for everything else."""
    if key.name != UP or key.get("job") != names.OUTCOMES_JOB or math.isnan(samples[-1].value):
        return None
    return max((s.time for s in samples if s.value == 1.0), default=None)


def _row(item: dict[str, Any], kind: str) -> tuple[SeriesKey, list[Sample]]:
    labels = dict(item["metric"])
    key = SeriesKey.of(labels.pop("__name__", ""), labels)
    pairs = item["values"] if kind == "matrix" else [item["value"]]
    return key, [Sample(float(time), float(value)) for time, value in pairs]


def _complaint(body: object) -> str:
    if isinstance(body, dict) and "error" in body:
        return f"{body.get('errorType', 'error')}: {body['error']}"
    return f"{body!r:.200}"


def _any_of(values: Iterable[str]) -> str:
    """A quoted regular expression that matches exactly these."""
    return json.dumps("|".join(re.escape(value) for value in values))
