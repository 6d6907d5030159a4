"""Outcome metrics from the collector's cumulative sums over a whole rollout.

The newest sample of a statistic is its value; increases are not used. If a count of the audience decreased, all sums
are rejected: after the collector lost data, every later comparison would be a different experiment. Sums over the
viewers that are evidence may decrease, because a viewer can stop being evidence.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Final, NamedTuple

from reelway.platform.contracts.events import Arm
from reelway.platform.rollout import metric_names as names
from reelway.platform.rollout.evidence import ArmStatistics, EvidenceState, MetricEvidence, metric_evidence
from reelway.platform.rollout.policy import OutcomeMetric, RolloutPolicy, Slice
from reelway.platform.rollout.sources.series_reader import CUMULATIVE_SERIES, Scope, ScrapeJob, SeriesReadResult
from reelway.platform.rollout.state import RolloutState
from reelway.platform.rollout.suspicion import Audience, GroupWeights

_TOLERANCE: Final = 1e-9
"""Relative tolerance: float sums may differ in their last digits between two scrapes."""


class _Key(NamedTuple):
    arm: str
    slice_: str  # empty for the audience
    metric: str  # empty for exposure; the kind for the audience's weights
    statistic: str
    name: str


class _Sums(NamedTuple):
    """``problem`` states why there are no sums, or how the collector's data loss was detected; empty if all is well."""

    newest: dict[_Key, float]
    problem: str


class OutcomeEvidence(NamedTuple):
    """What the collector's sums show. ``audiences`` is empty if the metrics are ``telemetry_down``."""

    metrics: dict[tuple[str, Slice], MetricEvidence]
    audiences: dict[Arm, Audience]


def outcome_evidence(
    policy: RolloutPolicy, state: RolloutState, read_result: SeriesReadResult, collector: ScrapeJob
) -> OutcomeEvidence:
    """Returns evidence for every (metric, slice) of the policy, and the audiences of both arms.

    A metric is ``insufficient`` if the collector answers but has no series of an arm yet: the arm has no impressions.
    It is ``telemetry_down`` if the collector does not answer, its sums are not finite, negative or incomplete, or its
    counts decrease.
    """
    sums = _Sums({}, collector.problem) if collector.problem else _sums(state, read_result, collector)
    audiences: dict[Arm, Audience] = {}
    problem = sums.problem
    for arm in (Arm.STABLE, Arm.CANARY):
        found = _audience(arm, sums.newest)
        if isinstance(found, str):
            problem = problem or found
        elif found is not None:
            audiences[arm] = found
    if problem:
        down = MetricEvidence(EvidenceState.TELEMETRY_DOWN, detail=problem)
        return OutcomeEvidence({(metric.name, part): down for metric, part in policy.tests}, {})
    metrics = {(metric.name, part): _evidence(metric, part, sums.newest) for metric, part in policy.tests}
    return OutcomeEvidence(metrics, audiences)


def _sums(state: RolloutState, read_result: SeriesReadResult, collector: ScrapeJob) -> _Sums:
    """Returns the newest values of one running collector.

    One process sums the outcomes. Two running instances are that process at two addresses, or a successor that is still
    reading the event log: the one with the larger sums is used, and nothing is added. A removed instance does not
    count, because its successor has its data. A count of the audience must not be below an earlier one of any instance.
    """
    by_instance, highest = defaultdict[str, dict[_Key, float]](dict), dict[_Key, float]()
    canary, stable = Scope.of(state).releases
    release_of = {Arm.CANARY.value: canary, Arm.STABLE.value: stable}
    for key, samples in read_result.series.items():
        if key.name not in CUMULATIVE_SERIES or key.get("rollout") != state.id or not samples:
            continue
        if key.get("job") != collector.name or release_of.get(key.get("arm")) != key.get("release"):
            continue  # another job, the holdout, or the arm that became stable when the rollout ended
        sum_key = _Key(
            key.get("arm"), key.get("slice"), key.get("metric") or key.get("kind"), key.get("statistic"), key.name
        )
        if key.name == names.AUDIENCE:
            peak = max((s.value for s in samples if math.isfinite(s.value)), default=0.0)
            highest[sum_key] = max(peak, highest.get(sum_key, 0.0))
        instance = collector.instances.get(key.get("instance"))
        if instance is not None and not instance.removed and samples[-1].time >= instance.last_sample_at:
            by_instance[instance.name][sum_key] = samples[-1].value
    newest = max(by_instance.values(), key=_total, default=dict[_Key, float]())
    for sum_key, peak in highest.items():
        if 0 <= (now := newest.get(sum_key, 0.0)) < peak * (1 - _TOLERANCE):
            change = f"fell from {peak:g} to {now:g} during the rollout"
            reason = f"{sum_key.arm} {sum_key.statistic} of the audience {change}: collector data lost"
            return _Sums({}, reason)
    return _Sums(newest, "")


def _total(sums: dict[_Key, float]) -> float:
    """Returns the sum of all finite values."""
    return sum(value for value in sums.values() if math.isfinite(value))


def _audience(arm: Arm, newest: dict[_Key, float]) -> Audience | str | None:
    """Returns an arm's audience, an error message, or None if the arm has no impressions."""
    count = newest.get(_Key(arm, "", "", "viewers", names.AUDIENCE))
    weights = {
        (group, statistic): newest.get(_Key(arm, "", group, statistic, names.AUDIENCE_WEIGHT))
        for group in names.AUDIENCE_GROUPS
        for statistic in names.WEIGHT_STATISTICS
    }
    exposed = any(key.arm == arm and key.name == names.EXPOSURE and value for key, value in newest.items())
    if count is None and not exposed:
        return None
    for name, value in {"viewers": count, **{f"{group} {s}": v for (group, s), v in weights.items()}}.items():
        if value is None:
            return f"{arm}'s audience has no {name} although the arm has had viewers"
        if not math.isfinite(value) or value < 0:
            return f"{arm}'s audience has {name} {value:g}, expected a number of 0 or more"
    groups = {
        group: GroupWeights(*(weights[group, statistic] or 0.0 for statistic in names.WEIGHT_STATISTICS))
        for group in names.AUDIENCE_GROUPS
    }
    for group, statistics in (("evidence", ("sum_x", "sum_xx")), ("idle", ("idle_x", "idle_xx"))):
        keys = [_Key(arm, Slice.OVERALL, "", statistic, names.EXPOSURE) for statistic in statistics]
        groups[group] = GroupWeights(*(newest.get(key, 0.0) for key in keys))
    return Audience(count or 0.0, **groups)


def _evidence(metric: OutcomeMetric, part: Slice, newest: dict[_Key, float]) -> MetricEvidence:
    if metric.name not in names.OUTCOME_METRICS:
        known = ", ".join(names.OUTCOME_METRICS)
        return MetricEvidence(
            EvidenceState.TELEMETRY_DOWN, detail=f"no series counts {metric.name}; known metrics: {known}"
        )
    arms = dict[Arm, ArmStatistics]()
    for arm in (Arm.STABLE, Arm.CANARY):
        found = _arm(metric, part, arm, newest)
        if isinstance(found, str):
            return MetricEvidence(EvidenceState.TELEMETRY_DOWN, detail=found)
        arms[arm] = found
    return metric_evidence(arms[Arm.STABLE], arms[Arm.CANARY], minimum_viewers=metric.minimum_viewers)


def _arm(metric: OutcomeMetric, part: Slice, arm: Arm, newest: dict[_Key, float]) -> ArmStatistics | str:
    """Returns one arm's sums, or an error message. With ``kind: mean`` every viewer has x_i = 1.

    Idle viewers then have the share of viewers that they have of impressions.
    """
    exposure = {name: newest.get(_Key(arm, part, "", name, names.EXPOSURE)) for name in names.EXPOSURE_STATISTICS}
    if all(value is None for value in exposure.values()):
        return ArmStatistics()  # the collector answers, and this arm has no impressions
    outcome = {
        name: newest.get(_Key(arm, part, metric.name, name, names.STATISTIC)) for name in names.METRIC_STATISTICS
    }
    values = dict[str, float]()
    for name, value in (exposure | outcome).items():
        if value is None:
            return f"{arm}'s {name} of {metric.name} on {part} is absent although the arm has had viewers"
        if not math.isfinite(value) or value < 0:
            return f"{arm}'s {name} of {metric.name} on {part} is {value:g}, expected a number of 0 or more"
        values[name] = value
    if metric.kind == "mean":
        viewers = values["viewers"]
        idle = values["idle_x"] / values["sum_x"] * viewers if values["sum_x"] else 0.0
        values |= {"sum_x": viewers, "sum_xx": viewers, "sum_xy": values["sum_y"], "idle_x": idle, "idle_xx": idle}
    return ArmStatistics(**values)
