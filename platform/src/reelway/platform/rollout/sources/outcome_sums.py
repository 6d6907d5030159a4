"""Why: outcome metrics are judged on sums over a whole rollout, so one lost memory of the collector spoils them all.

From the newest cumulative samples to ``MetricEvidence``; refuses increases (a statistic is a state, not a rate) and
refuses sums that fell: what was forgotten would make every later comparison a different experiment.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Final, NamedTuple

from reelway.platform.contracts.events import Arm
from reelway.platform.rollout import series as names
from reelway.platform.rollout.evidence import ArmStatistics, EvidenceState, MetricEvidence, metric_evidence
from reelway.platform.rollout.policy import OutcomeMetric, RolloutPolicy, Slice
from reelway.platform.rollout.sources.heard_series import KEPT_SINCE_THE_START, Heard, Job, Scope
from reelway.platform.rollout.state import RolloutState

EXPOSURE_STATISTICS: Final = ("viewers", "impressions", "sum_x", "sum_xx")
METRIC_STATISTICS: Final = ("sum_y", "sum_yy", "sum_xy")
_SLACK: Final = 1e-9
"""Relative; sums of floats may differ in the last digits between two writings."""


class _Key(NamedTuple):
    arm: str
    part: str
    metric: str  # empty for exposure
    statistic: str


class _Sums(NamedTuple):
    """``lost`` says how it is known that the collector forgot; empty when it didn't."""

    newest: dict[_Key, float]
    lost: str


def outcome_metrics(
    policy: RolloutPolicy, state: RolloutState, heard: Heard, collector: Job
) -> dict[tuple[str, Slice], MetricEvidence]:
    """Every (metric, slice) of the policy.

    The collector was heard and has no series of an arm yet: nobody was shown anything, which is ``insufficient``. It
    was not heard, or its sums are not finite, negative, incomplete or less than they were: ``telemetry_down``.
    """
    if collector.problem:
        down = MetricEvidence(EvidenceState.TELEMETRY_DOWN, detail=collector.problem)
        return {(metric.name, part): down for metric, part in policy.tests}
    sums = _sums(state, heard, collector)
    if sums.lost:
        down = MetricEvidence(EvidenceState.TELEMETRY_DOWN, detail=sums.lost)
        return {(metric.name, part): down for metric, part in policy.tests}
    return {(metric.name, part): _evidence(metric, part, sums.newest) for metric, part in policy.tests}


def _sums(state: RolloutState, heard: Heard, collector: Job) -> _Sums:
    """Newest values, added over the collector's live instances.

    An instance that is gone does not count: its successor has its memory. What is newest may not be below what any
    one instance said before.
    """
    newest, highest = defaultdict[_Key, float](float), dict[_Key, float]()
    canary, stable = Scope.of(state).releases
    release_of = {Arm.CANARY.value: canary, Arm.STABLE.value: stable}
    for key, samples in heard.series.items():
        if key.name not in KEPT_SINCE_THE_START or key.get("rollout") != state.id or not samples:
            continue
        if release_of.get(key.get("arm")) != key.get("release"):
            continue  # the holdout, or what became stable at the rollout's end
        place = _Key(key.get("arm"), key.get("slice"), key.get("metric"), key.get("statistic"))
        peak = max((s.value for s in samples if math.isfinite(s.value)), default=0.0)
        highest[place] = max(peak, highest.get(place, 0.0))
        instance = collector.instances.get(key.get("instance"))
        if instance is not None and not instance.gone and samples[-1].time >= instance.last_heard:
            newest[place] += samples[-1].value
    for place, peak in highest.items():
        if 0 <= (now := newest.get(place, 0.0)) < peak * (1 - _SLACK):
            what = " ".join(word for word in (place.arm, place.metric, place.statistic) if word)
            lost = f"{what} on {place.part} fell from {peak:g} to {now:g} within the rollout: the collector lost memory"
            return _Sums({}, lost)
    return _Sums(dict(newest), "")


def _evidence(metric: OutcomeMetric, part: Slice, newest: dict[_Key, float]) -> MetricEvidence:
    if metric.name not in names.OUTCOME_METRICS:
        known = ", ".join(names.OUTCOME_METRICS)
        return MetricEvidence(EvidenceState.TELEMETRY_DOWN, detail=f"nobody counts {metric.name}; known are {known}")
    arms = dict[Arm, ArmStatistics]()
    for arm in (Arm.STABLE, Arm.CANARY):
        found = _arm(metric, part, arm, newest)
        if isinstance(found, str):
            return MetricEvidence(EvidenceState.TELEMETRY_DOWN, detail=found)
        arms[arm] = found
    return metric_evidence(arms[Arm.STABLE], arms[Arm.CANARY], minimum_viewers=metric.minimum_viewers)


def _arm(metric: OutcomeMetric, part: Slice, arm: Arm, newest: dict[_Key, float]) -> ArmStatistics | str:
    """One arm's sums, or what is wrong with them. ``kind: mean``: each viewer is one, x_i = 1."""
    exposure = {name: newest.get(_Key(arm, part, "", name)) for name in EXPOSURE_STATISTICS}
    if all(value is None for value in exposure.values()):
        return ArmStatistics()  # the collector is alive and nobody on this arm was shown anything
    outcome = {name: newest.get(_Key(arm, part, metric.name, name)) for name in METRIC_STATISTICS}
    values = dict[str, float]()
    for name, value in (exposure | outcome).items():
        if value is None:
            return f"{arm}'s {name} of {metric.name} on {part} is absent although the arm has had viewers"
        if not math.isfinite(value) or value < 0:
            return f"{arm}'s {name} of {metric.name} on {part} is {value:g}, expected a number of 0 or more"
        values[name] = value
    if metric.kind == "mean":
        viewers = values["viewers"]
        values |= {"sum_x": viewers, "sum_xx": viewers, "sum_xy": values["sum_y"]}
    return ArmStatistics(**values)
