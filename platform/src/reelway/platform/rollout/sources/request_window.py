"""Request guardrails over the last window: error ratio, empty slates and p99 latency, from the routers' counters.

Only the canary's own requests count: those of its release, shown (arm ``canary``) or mirrored (arm ``shadow``), summed
over the routers. ``assessment`` judges the readings.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from reelway.platform.contracts.events import Arm
from reelway.platform.rollout import metric_names as names
from reelway.platform.rollout.counters import (
    CounterReading,
    Sample,
    counter_increase,
    histogram_quantile,
    sum_counters,
)
from reelway.platform.rollout.evidence import EvidenceState, GuardrailName, GuardrailReading
from reelway.platform.rollout.policy import RolloutPolicy
from reelway.platform.rollout.sources.series_reader import (
    BUCKET,
    Scope,
    ScrapeJob,
    ScrapeTarget,
    SeriesKey,
    SeriesReadResult,
    samples_since,
)

CANARY_ARMS: Final = (Arm.CANARY, Arm.SHADOW)
QUANTILE: Final = 0.99
_TORN_SCRAPE_TOLERANCE: Final = 2
"""Requests by which two counters of one scrape may differ, because they are not read at the same instant."""


@dataclass(frozen=True, slots=True)
class RequestWindow:
    """The routers' counter increases in the window, without those before the rollout began."""

    read_result: SeriesReadResult
    routers: ScrapeJob
    since: float
    started_at: float

    @classmethod
    def of(cls, read_result: SeriesReadResult, routers: ScrapeJob, scope: Scope, now: float) -> RequestWindow:
        return cls(read_result, routers, now - scope.window_s, scope.started_at)

    def increases(self, name: str, label: str, selects: Callable[[SeriesKey], bool]) -> Mapping[str, CounterReading]:
        """Returns the increases of all selected series over all routers, by the value of ``label``.

        A router with one sample has no increase yet and does not make the others' unknown.
        """
        parts = defaultdict[str, list[CounterReading]](list)
        known = [i for i in self.routers.instances.values() if i.last_sample_at > i.first_sample_at]
        for key, instance, samples in samples_since(self.read_result, self.routers, name, since=self.since):
            if samples and selects(key) and (instance in known or not known):
                parts[key.get(label)].append(self._increase(instance, samples))
        return {value: sum_counters(readings) for value, readings in parts.items()}

    def _increase(self, instance: ScrapeTarget, samples: list[Sample]) -> CounterReading:
        """Returns the increase of one series, from 0 if the series appeared after its exporter's first sample."""
        earlier = sum(sample.time <= self.started_at for sample in samples)
        began = samples[0].time > instance.first_sample_at and not earlier
        samples = samples[max(earlier - 1, 0) :]
        return counter_increase(samples, origin=began)


def request_guardrails(
    policy: RolloutPolicy, scope: Scope, read_result: SeriesReadResult, routers: ScrapeJob, now: float
) -> dict[GuardrailName, GuardrailReading]:
    """Returns the readings of error_ratio, empty_slate_ratio and p99_ms over the scope's window."""
    if routers.problem:
        down = GuardrailReading(EvidenceState.TELEMETRY_DOWN, detail=routers.problem)
        return {"error_ratio": down, "empty_slate_ratio": down, "p99_ms": down}
    window = RequestWindow.of(read_result, routers, scope, now)
    outcomes = window.increases(names.REQUESTS, "outcome", _is_canary_series(scope))
    requests = _total(outcomes, names.REQUEST_OUTCOMES)
    faults = _total(outcomes, names.FAULTY_OUTCOMES)
    empty = _total(window.increases(names.EMPTY_SLATES, "release", _is_canary_series(scope)), (scope.releases[0],))
    limit = policy.guardrails.p99_ms
    compared = limit is not None and limit.maximum_ratio_to_stable is not None
    return {
        "error_ratio": _ratio(faults, requests, scope),
        "empty_slate_ratio": _ratio(empty, requests, scope),
        "p99_ms": _p99(window, scope, compared=compared),
    }


def _is_canary_series(scope: Scope) -> Callable[[SeriesKey], bool]:
    return lambda key: key.get("release") == scope.releases[0] and key.get("arm") in CANARY_ARMS


def _is_stable_series(scope: Scope) -> Callable[[SeriesKey], bool]:
    return lambda key: key.get("release") == scope.releases[1] and key.get("arm") == Arm.STABLE


def _total(increases: Mapping[str, CounterReading], label_values: tuple[str, ...]) -> CounterReading:
    """Returns the sum of the counters with these label values. A counter that a running router does not expose is 0."""
    readings = [increases[name] for name in label_values if name in increases]
    return sum_counters(readings) if readings else CounterReading(EvidenceState.OK)


def _ratio(events: CounterReading, requests: CounterReading, scope: Scope) -> GuardrailReading:
    for reading in (requests, events):
        if reading.state is not EvidenceState.OK:
            return GuardrailReading(reading.state, detail=reading.detail)
    if not requests.increase:
        return GuardrailReading(EvidenceState.INSUFFICIENT, detail=_no_requests("the canary", scope))
    event_count = events.increase
    if requests.increase < event_count <= requests.increase + _TORN_SCRAPE_TOLERANCE:
        event_count = requests.increase
    return GuardrailReading(EvidenceState.OK, event_count, requests.increase)


def _no_requests(arm: str, scope: Scope) -> str:
    return f"no request of {arm} in the last {scope.window_s:.0f} s"


def _p99(window: RequestWindow, scope: Scope, *, compared: bool) -> GuardrailReading:
    canary = _latencies(window, _is_canary_series(scope))
    if isinstance(canary, GuardrailReading):
        return canary
    stable = _latencies(window, _is_stable_series(scope))
    if not canary:
        return GuardrailReading(EvidenceState.INSUFFICIENT, detail=_no_requests("the canary", scope))
    if compared and not stable:
        return GuardrailReading(EvidenceState.INSUFFICIENT, detail=_no_requests("stable", scope))
    value = histogram_quantile(canary, QUANTILE) * 1000
    if math.isnan(value):
        problem = f"{BUCKET} has the bounds {sorted(canary)}, expected several and +Inf"
        return GuardrailReading(EvidenceState.TELEMETRY_DOWN, detail=problem)
    against = histogram_quantile(stable, QUANTILE) * 1000 if isinstance(stable, dict) else math.nan
    if compared and isinstance(stable, GuardrailReading):
        return stable
    return GuardrailReading(
        EvidenceState.OK,
        trials=max(canary.values()),
        value=value,
        stable_value=None if math.isnan(against) else against,
    )


def _latencies(window: RequestWindow, selects: Callable[[SeriesKey], bool]) -> dict[float, float] | GuardrailReading:
    """Returns the observations by upper bound, empty without any; a reading if they are unknown."""
    increases = window.increases(BUCKET, "le", selects)
    if not increases:
        return {}
    if (total := sum_counters(increases.values())).state is not EvidenceState.OK:
        return GuardrailReading(total.state, detail=total.detail)
    if not any(rise.increase for rise in increases.values()):
        return {}
    return {float(bound): rise.increase for bound, rise in increases.items()}
