"""Simulates thousands of rollouts at once, with the statistics of ``assess`` and the rules of ``decide`` as array code.

The statistics are calls of the real functions. ``tests/platform/rollout/test_simulation_agrees.py`` compares the rules
with the real ones, reconcile by reconcile. All guardrails are healthy, so only the outcome tests are measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest
from tests.support.rollout.canary_population import (
    COUNTS,
    LINEAR,
    N_X,
    N_Y,
    QUADRATIC,
    TESTS,
    X_ROW,
    Cohorts,
    Population,
)

from reelway.platform.rollout.assessment import harm_of
from reelway.platform.rollout.policy import RolloutPolicy, Slice
from reelway.platform.rollout.sequential import BASIS_POINTS, Estimate, ratio_estimate, rejection_boundary
from reelway.platform.rollout.suspicion import (
    CHECKS,
    TAINTS_HARM,
    Audience,
    GroupWeights,
    compare_audiences,
    explained_harm,
    group_share,
    share_difference,
)

F64 = NDArray[np.float64]
GROUPS = ("silent", "saturated")
_FIRST_GROUP = COUNTS.index(GROUPS[0])

RUNNING, PROMOTED, ROLLED_BACK, PAUSED = range(4)


@dataclass
class ArmSums:
    """Cumulative sufficient statistics of one arm, for all rollouts."""

    counts: F64  # [rollouts, COUNTS]
    linear: F64  # [rollouts, LINEAR]
    quadratic: F64  # [rollouts, QUADRATIC]
    arrived: F64  # [rollouts]
    weights: F64  # [rollouts, sum_w and sum_ww, all + silent + saturated]

    @staticmethod
    def empty(rollouts: int) -> ArmSums:
        return ArmSums(
            np.zeros((rollouts, len(COUNTS))), np.zeros((rollouts, LINEAR)), np.zeros((rollouts, QUADRATIC)),
            np.zeros(rollouts), np.zeros((rollouts, 2, 1 + len(GROUPS))),
        )  # fmt: skip

    @property
    def viewers(self) -> F64:
        """Viewers that are evidence, ``[rollouts]``."""
        return self.counts[:, COUNTS.index("evidence")]

    @property
    def impressions(self) -> F64:
        return self.counts[:, COUNTS.index("impressions")]

    def add_first_sessions(self, cohort: Cohorts, weight: F64) -> None:
        """Adds first sessions, with each impression counted ``weight`` times."""
        self.counts += cohort.counts[:, 0]
        self.linear += weight[:, None] * cohort.linear[:, 0]
        self.quadratic += (weight**2)[:, None] * cohort.pairs[:, 0]
        self.arrived += cohort.arrived
        self._add_groups(np.concatenate([cohort.arrived[:, None], cohort.counts[:, 0, _FIRST_GROUP:]], axis=1), weight)

    def add_second_sessions(self, cohort: Cohorts, first_weight: F64, weight: F64) -> None:
        """Adds second sessions of a cohort whose first sessions had ``first_weight``."""
        self.counts += cohort.counts[:, 1]
        self.linear += first_weight[:, None] * cohort.linear[:, 1] + weight[:, None] * cohort.linear[:, 2]
        self.quadratic += (first_weight**2)[:, None] * cohort.pairs[:, 1]
        self.quadratic += (first_weight * weight)[:, None] * cohort.pairs[:, 2]
        self.quadratic += (weight**2)[:, None] * cohort.pairs[:, 3]
        changed = cohort.counts[:, 1, _FIRST_GROUP:]
        self._add_groups(np.concatenate([np.zeros((len(changed), 1)), changed], axis=1), first_weight)

    def _add_groups(self, members: F64, weight: F64) -> None:
        self.weights += np.stack([weight[:, None] * members, (weight**2)[:, None] * members], axis=1)

    def audience(self) -> Audience:
        """Returns the audience of every rollout."""
        groups = {
            name: GroupWeights(self.weights[:, 0, i], self.weights[:, 1, i]) for i, name in enumerate(("all", *GROUPS))
        }
        _, x, xx, idle_x, idle_xx = (column[:, 0] for column in self.idle_of_tests())
        return Audience(self.arrived, **groups, evidence=GroupWeights(x, xx), idle=GroupWeights(idle_x, idle_xx))

    def idle_of_tests(self) -> tuple[F64, ...]:
        """Returns viewers, sum_x, sum_xx, idle_x and idle_xx, each [rollouts, tests]."""
        viewers, x, _, xx, _, _ = self.of_tests()
        return viewers, x, xx, self.linear[:, N_X + N_Y :][:, X_ROW], self.quadratic[:, N_X + 2 * N_Y :][:, X_ROW]

    def of_tests(self) -> tuple[F64, ...]:
        """Returns viewers, sum_x, sum_y, sum_xx, sum_yy and sum_xy, each [rollouts, tests]."""
        new = np.array([part is Slice.NEW_VIEWERS for _, part in TESTS])
        viewers = np.where(new, self.counts[:, 1:2], self.counts[:, :1])
        x, y = self.linear[:, X_ROW], self.linear[:, N_X : N_X + N_Y]
        xx, yy = self.quadratic[:, X_ROW], self.quadratic[:, N_X : N_X + N_Y]
        return viewers, x, y, xx, yy, self.quadratic[:, N_X + N_Y : N_X + 2 * N_Y]


@dataclass(frozen=True)
class Bounds:
    """Results of ``assess`` as arrays [rollouts, tests]."""

    harm: F64
    error: F64
    low: F64
    high: F64
    established: NDArray[np.bool_]
    proven: NDArray[np.bool_]  # established harm that forged viewers do not explain
    excluded: NDArray[np.bool_]
    suspected: NDArray[np.bool_]  # [rollouts, CHECKS]


def judge(policy: RolloutPolicy, stable: ArmSums, canary: ArmSums) -> Bounds:
    """Returns the results of the outcome tests of ``assess`` for all rollouts."""
    assert tuple((m.name, part) for m, part in policy.tests) == TESTS
    of_stable, of_canary = stable.of_tests(), canary.of_tests()
    lower = np.array([m.direction == "lower" for m, _ in policy.tests])
    harm = harm_of(ratio_estimate(*of_canary), ratio_estimate(*of_stable), lower)
    margin = np.array([m.margin_on(part) for m, part in policy.tests])
    scale = np.array([m.effect_beyond_margin(part) for m, part in policy.tests])
    enough = np.array([m.minimum_viewers for m, _ in policy.tests])
    known = (of_stable[0] >= enough) & (of_canary[0] >= enough) & np.isfinite(harm.variance)
    known &= (of_stable[1] > 0) & (of_canary[1] > 0)
    variance = np.where(known, harm.variance, 1.0)
    error = np.sqrt(variance)
    low = harm.value - rejection_boundary(variance, scale, np.array(policy.rollback_alphas)) * error
    high = harm.value + rejection_boundary(variance, margin, policy.alpha.promotion) * error
    assert policy.suspicion is not None
    checks = compare_audiences(
        stable.audience(), canary.audience(), alpha=policy.suspicion.alpha, margin=policy.suspicion.margin
    )
    suspected = np.stack([check.suspected for check in checks], axis=1)
    idle = share_difference(group_share(*stable.idle_of_tests()), group_share(*canary.idle_of_tests()))
    overall = Estimate(idle.value[:, :1], idle.variance[:, :1], idle.viewers[:, :1])
    explained = explained_harm(idle, overall, ratio_estimate(*of_stable).value, lower)
    tainted = suspected[:, [CHECKS.index(name) for name in TAINTS_HARM]].any(1)
    established = known & (low > margin)
    proven = established & (low - explained > margin) & ~tainted[:, None]
    return Bounds(harm.value, error, low, high, established, proven, known & (high < margin) & ~established, suspected)


@dataclass(frozen=True)
class Attackers:
    """Viewers that somebody controls, beside the others. They come once.

    ``picks_arm``: all are on ``arm``, whatever its weight; otherwise only as many as the weight assigns to it.
    """

    population: Population
    canary: bool
    viewers_per_minute: float
    picks_arm: bool = False


@dataclass
class Scenario:
    """Course of the simulated rollouts. ``viewers_per_minute`` is the total of both arms, without attackers."""

    policy: RolloutPolicy
    stable: Population
    canary: Population
    viewers_per_minute: float
    reconciles_s: F64
    return_after: int = 15
    attackers: tuple[Attackers, ...] = ()
    telemetry_down: tuple[int, int] = (-1, -1)
    on_reconcile: Callable[[int, Simulation], None] | None = None


@dataclass
class Simulation:
    """State of every rollout. ``step`` and ``outcome`` are per rollout; ``ended`` is the last reconcile."""

    scenario: Scenario
    rollouts: int
    rng: np.random.Generator
    step: NDArray[np.int64] = field(init=False)
    outcome: NDArray[np.int64] = field(init=False)
    ended: NDArray[np.int64] = field(init=False)
    ended_viewers: F64 = field(init=False)
    ever_suspected: NDArray[np.bool_] = field(init=False)
    held_s: F64 = field(init=False)
    insufficient_s: F64 = field(init=False)
    stable: ArmSums = field(init=False)
    canary: ArmSums = field(init=False)
    bounds: Bounds = field(init=False)

    def __post_init__(self) -> None:
        n = self.rollouts
        self.step, self.outcome = np.zeros(n, dtype=np.int64), np.full(n, RUNNING)
        self.ended, self.ended_viewers = np.full(n, -1), np.full(n, np.nan)
        self.ever_suspected = np.zeros(n, bool)
        self.held_s, self.insufficient_s = np.zeros(n), np.zeros(n)
        self.stable, self.canary = ArmSums.empty(n), ArmSums.empty(n)

    def run(self) -> Simulation:
        """Plays all reconciles, or stops when no rollout is running."""
        scenario = self.scenario
        ramp = np.array([step.weight_bp for step in scenario.policy.steps]) / BASIS_POINTS
        past: list[tuple[Cohorts, Cohorts, F64]] = []
        before_s = 0.0
        for index, now_s in enumerate(scenario.reconciles_s):
            share = ramp[self.step]
            minutes = (now_s - before_s) / 60.0
            arrivals = [self.rng.poisson(scenario.viewers_per_minute * minutes * s) for s in (1 - share, share)]
            cohorts = (
                scenario.stable.cohorts(self.rng, arrivals[0]), scenario.canary.cohorts(self.rng, arrivals[1])
            )  # fmt: skip
            self.stable.add_first_sessions(cohorts[0], share)
            self.canary.add_first_sessions(cohorts[1], 1 - share)
            for group in scenario.attackers:
                part = np.ones(self.rollouts) if group.picks_arm else share if group.canary else 1 - share
                forged = group.population.cohorts(self.rng, self.rng.poisson(group.viewers_per_minute * minutes * part))
                arm, weight = (self.canary, 1 - share) if group.canary else (self.stable, share)
                arm.add_first_sessions(forged, weight)
            past.append((*cohorts, share))
            if index >= scenario.return_after:
                stable, canary, then = past[index - scenario.return_after]
                self.stable.add_second_sessions(stable, then, share)
                self.canary.add_second_sessions(canary, 1 - then, 1 - share)
                past[index - scenario.return_after] = (None, None, then)  # type: ignore[assignment]
            self._decide(index, now_s - before_s)
            if scenario.on_reconcile is not None:
                scenario.on_reconcile(index, self)
            before_s = now_s
            if not (self.outcome == RUNNING).any():
                break
        return self

    def _decide(self, index: int, tick_s: float) -> None:
        policy, running = self.scenario.policy, self.outcome == RUNNING
        if self.scenario.telemetry_down[0] <= index < self.scenario.telemetry_down[1]:
            return
        self.bounds = bounds = judge(policy, self.stable, self.canary)
        tick_s = min(tick_s, policy.longest_tick_s)
        required = np.array([m.promotion_requires == "excluded" and p is Slice.OVERALL for m, p in policy.tests])
        hold_s, viewers, impressions = (
            np.array([getattr(step, name) for step in policy.steps])[self.step]
            for name in ("hold_s", "minimum_viewers", "minimum_impressions")
        )
        harmed = running & bounds.proven.any(1)
        suspected = bounds.suspected.any(1) | bounds.established.any(1)
        self.ever_suspected |= running & ~harmed & bounds.suspected.any(1)
        waited_s = self.held_s + tick_s
        exposed = (np.floor(self.canary.viewers) >= viewers) & (np.floor(self.canary.impressions) >= impressions)
        excluded = bounds.excluded[:, required].all(1)
        last = self.step + 1 >= len(policy.steps)
        on_time = waited_s >= hold_s
        ready = running & ~harmed & ~suspected & exposed & np.where(last, on_time & excluded, on_time | excluded)
        lacking = running & ~harmed & ~ready
        overdue = lacking & (on_time | suspected)
        late = overdue & (self.insufficient_s + tick_s >= policy.deadlines.insufficient.after_s)
        self.insufficient_s = np.where(overdue, self.insufficient_s + tick_s, 0.0)
        self.held_s = np.where(ready, 0.0, waited_s)
        self.step = np.where(ready & ~last, self.step + 1, self.step)
        for which, outcome in ((harmed, ROLLED_BACK), (ready & last, PROMOTED), (late, PAUSED)):
            self.outcome[which], self.ended[which] = outcome, index
            self.ended_viewers[which] = self.canary.viewers[which]


def reconcile_times(dense_s: float, dense_until_s: float, sparse_s: float, until_s: float) -> F64:
    """Returns the times of reconciles: every ``dense_s`` at first, every ``sparse_s`` later."""
    return np.concatenate(
        [np.arange(dense_s, dense_until_s + 1, dense_s), np.arange(dense_until_s + sparse_s, until_s + 1, sparse_s)]
    )


def clopper_pearson(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Returns the exact binomial interval."""
    interval = binomtest(k, n).proportion_ci(confidence, "exact")
    return float(interval.low), float(interval.high)
