"""Series as readers return them, scrape by scrape, with the values that a real service would expose."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from reelway.platform.contracts.events import Arm
from reelway.platform.rollout import metric_names as names
from reelway.platform.rollout.counters import Sample
from reelway.platform.rollout.evidence import EvidenceSnapshot
from reelway.platform.rollout.policy import RolloutPolicy, Slice, parse_policy
from reelway.platform.rollout.sources.parity_findings import ParityFindings
from reelway.platform.rollout.sources.series_reader import BUCKET, UP, SeriesKey, SeriesReadResult
from reelway.platform.rollout.sources.snapshot import build_snapshot
from reelway.platform.rollout.state import Phase, RolloutState

CANARY, STABLE, ROLLOUT = "c" * 64, "5" * 64, "r-7"
POLICY = parse_policy(
    """
steps: [{weight_percent: 5}]
evidence_max_age_s: 20
outcomes:
  - {name: long_watch_rate, margin: 0.05, slices: [overall, new_viewers], minimum_viewers: 50}
  - {name: like_rate, kind: mean, margin: 0.05, minimum_viewers: 50}
""",
    source="test",
)
Values = dict[SeriesKey, float]


def state_of(**changes: object) -> RolloutState:
    """A rollout at its first step that began at time 0."""
    plain = RolloutState(
        id=ROLLOUT, stable_release=STABLE, canary_release=CANARY, phase=Phase.STEPPING, step=0, canary_bp=500,
        started_at=0, changed_at=0, tick_at=0,
    )  # fmt: skip
    return plain.model_copy(update=changes)


def requests(arm: Arm, *, latency: Mapping[str, float] | None = None, empty: float = 0, **outcomes: float) -> Values:
    """A router's series of one arm."""
    release = (STABLE if arm is Arm.STABLE else CANARY)[: names.SHORT_RELEASE]
    both = {"release": release, "arm": arm.value}
    values = {SeriesKey.of(names.REQUESTS, {**both, "outcome": name}): n for name, n in outcomes.items()}
    values |= {SeriesKey.of(BUCKET, {**both, "le": le}): n for le, n in (latency or {}).items()}
    if empty:
        values[SeriesKey.of(names.EMPTY_SLATES, both)] = empty
    return values


def sums(arm: Arm, viewers: int, *, part: Slice = Slice.OVERALL, rate: float = 0.5, rollout: str = ROLLOUT) -> Values:
    """The collector's series of an arm whose viewers had 1, 2, 3, 1, 2, 3 ... impressions and these outcomes."""
    x = [1.0 + i % 3 for i in range(viewers)]
    y = [rate * xi + (0.1 if i % 2 else -0.1) for i, xi in enumerate(x)]
    release = (STABLE if arm is Arm.STABLE else CANARY)[: names.SHORT_RELEASE]
    labels = {"rollout": rollout, "release": release, "arm": arm.value, "slice": part.value}
    exposure = {"viewers": viewers, "impressions": sum(x), "sum_x": sum(x), "sum_xx": sum(v * v for v in x)}
    exposure |= {"idle_x": 0, "idle_xx": 0}
    outcome = {
        "sum_y": sum(y),
        "sum_yy": sum(v * v for v in y),
        "sum_xy": sum(a * b for a, b in zip(x, y, strict=True)),
    }
    values = {SeriesKey.of(names.EXPOSURE, {**labels, "statistic": k}): float(v) for k, v in exposure.items()}
    if part is Slice.OVERALL:
        values |= audience(arm, viewers, rollout=rollout)
    for metric in names.OUTCOME_METRICS:
        for name, value in outcome.items():
            values[SeriesKey.of(names.STATISTIC, {**labels, "metric": metric, "statistic": name})] = value
    return values


def audience(arm: Arm, viewers: int, *, rollout: str = ROLLOUT, silent: int = 0, weight: float = 0.5) -> Values:
    """The collector's counts of an arm's viewers; ``silent`` of them reported no outcome."""
    release = (STABLE if arm is Arm.STABLE else CANARY)[: names.SHORT_RELEASE]
    labels = {"rollout": rollout, "release": release, "arm": arm.value}
    counts = {"viewers": viewers, "impressions": 2 * viewers, "outcomes": viewers - silent, "capped_impressions": 0}
    values = {SeriesKey.of(names.AUDIENCE, {**labels, "statistic": k}): float(v) for k, v in counts.items()}
    for group, members in {"all": viewers, "silent": silent, "saturated": 0}.items():
        for statistic, each in (("sum_w", weight), ("sum_ww", weight**2)):
            key = SeriesKey.of(names.AUDIENCE_WEIGHT, {**labels, "kind": group, "statistic": statistic})
            values[key] = each * members
    return values


@dataclass
class SeriesFixture:
    """Consecutive scrapes."""

    rows: defaultdict[SeriesKey, list[Sample]] = field(default_factory=lambda: defaultdict(list))

    def scrape(self, job: str, at: float, *values: Values, instance: str = "one") -> None:
        """Adds a successful scrape."""
        origin = {"job": job, "instance": instance}
        self.rows[SeriesKey.of(UP, origin)].append(Sample(at, 1.0))
        for key, value in (item for part in values for item in part.items()):
            self.rows[SeriesKey.of(key.name, {**dict(key.labels), **origin})].append(Sample(at, value))

    def routers(self, *times_and_values: tuple[float, Iterable[Values]], instance: str = "one") -> None:
        for at, values in times_and_values:
            self.scrape(names.ROUTER_JOB, at, *values, instance=instance)

    def collector(self, at: float, *values: Values, instance: str = "one") -> None:
        self.scrape(names.OUTCOMES_JOB, at, *values, instance=instance)

    def failed(self, job: str, at: float, instance: str = "one") -> None:
        """Adds a failed scrape."""
        self.rows[SeriesKey.of(UP, {"job": job, "instance": instance})].append(Sample(at, 0.0))

    def gone(self, job: str, at: float, instance: str = "one") -> None:
        """Removes a target."""
        self.rows[SeriesKey.of(UP, {"job": job, "instance": instance})].append(Sample(at, math.nan))

    def snapshot(
        self,
        now: float,
        *,
        state: RolloutState | None = None,
        policy: RolloutPolicy = POLICY,
        parity: ParityFindings | None = None,
        problem: str = "",
    ) -> EvidenceSnapshot:
        report = ParityFindings(problem="not made") if parity is None else parity
        return build_snapshot(policy, state or state_of(), SeriesReadResult(self.rows, problem), report, now)
