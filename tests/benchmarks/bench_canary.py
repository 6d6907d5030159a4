"""Measures error rates and power of the rollout decision: ``python -m tests.benchmarks.bench_canary``.

Simulates rollouts under the default policy on one core in a few minutes. Viewers differ and return. All ten tests of
the policy run on every reconcile, and every rollout runs to its end. Reconciles are one minute apart for the first 90
minutes and 20 minutes apart after that.

The report has error rates with exact 95 % intervals, the number of viewers needed to detect a drop (compared with an
oracle and with the rules of other tools), error rates and power under attack (``canary_attacks``), the effect of a
telemetry outage, and random event histories.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from tests.support.bench_results import Row, write_report
from tests.support.rollout.canary_attacks import MODES, SHARES, attack_kinds
from tests.support.rollout.canary_events import HistoryGenerator
from tests.support.rollout.canary_peers import NEVER, ArgoRollouts, Flagger, Kayenta
from tests.support.rollout.canary_population import N_X, TESTS, Population
from tests.support.rollout.canary_simulation import (
    PAUSED,
    PROMOTED,
    ROLLED_BACK,
    RUNNING,
    Attackers,
    Scenario,
    Simulation,
    clopper_pearson,
    reconcile_times,
)

from reelway.platform.cli.terminal import print_status
from reelway.platform.rollout.policy import RolloutPolicy, Slice, default_policy

F64 = NDArray[np.float64]

TRAFFIC = {"low": 300, "medium": 3_000, "high": 30_000}
"""Arriving viewers per minute, over all arms."""
LONG_WATCH = TESTS.index(("long_watch_rate", Slice.OVERALL))
DROP = 0.10
BATCH = 2_500


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the full number of simulations")
    parser.add_argument("--only-attacks", action="store_true", help="report on attacks alone, as `canary-attacks`")
    arguments = parser.parse_args(argv)
    scale, only_attacks = arguments.scale, arguments.only_attacks
    began = time.perf_counter()
    policy = default_policy().model_copy(update={"longest_tick_s": 1200.0})
    same = Population(1)
    if only_attacks:
        write_report("canary-attacks", attacks(policy, same, max(20, int(300 * scale))))
        return
    rows = [
        *false_rollbacks(policy, same, max(20, int(10_000 * scale))),
        *false_promotions(policy, same, max(60, int(10_000 * scale))),
        *detection(policy, same, max(100, int(2_000 * scale))),
        *attacks(policy, same, max(20, int(300 * scale))),
        *outages(policy, same, max(40, int(1_000 * scale))),
        *histories(max(200, int(100_000 * scale))),
        Row("variance that pre-period data would remove (not implemented)", 100 * cuped_saving(same), "%"),
    ]
    rows.append(Row("duration of this benchmark on one core", time.perf_counter() - began, "s", "under 300", None))
    write_report("canary", rows)


def false_rollbacks(policy: RolloutPolicy, same: Population, rollouts: int) -> list[Row]:
    """Counts false rollbacks in A/A rollouts, in which both arms have the same release."""
    rows = []
    for name, per_minute in TRAFFIC.items():
        outcome, suspected = _outcomes(policy, same, same, per_minute, rollouts)
        wrong = int((outcome == ROLLED_BACK).sum())
        low, high = clopper_pearson(wrong, rollouts)
        print_status(f"A/A {name}: {wrong} of {rollouts} rolled back, {(outcome == PROMOTED).mean():.1%} promoted")
        bar = f"at most 1 % (nominal {policy.alpha.rollback:.1%}); 95 % interval {low:.3%}..{high:.3%}"
        rows.append(Row(f"false rollbacks, A/A, {name} traffic ({per_minute} viewers/min, {rollouts:,} rollouts)",
                        100 * wrong / rollouts, "%", bar, high <= 0.01))  # fmt: skip
        rows.append(Row(f"promotions, A/A, {name} traffic", 100 * float((outcome == PROMOTED).mean()), "%"))
        rows.append(Row(f"pauses for a user, A/A, {name} traffic", 100 * float((outcome == PAUSED).mean()), "%"))
        held = float(suspected.mean())
        rows.append(
            Row(f"suspicions without an attacker, A/A, {name} traffic", 100 * held, "%", "at most 1", held <= 0.01)
        )
    return rows


def false_promotions(policy: RolloutPolicy, same: Population, rollouts: int) -> list[Row]:
    """Rollouts with harm of twice the margin in each metric that promotion requires, at all traffic levels."""
    rows, wrong, total = [], 0, 0
    required = [m for m in policy.outcomes if m.promotion_requires == "excluded"]
    each = rollouts // (len(required) * len(TRAFFIC)) + 1
    for metric in required:
        factor = 1 - 2 * metric.margin if metric.direction == "higher" else 1 + 2 * metric.margin
        worse = Population(2, {metric.name: factor})
        promoted = rolled_back = 0
        for per_minute in TRAFFIC.values():
            outcome, _ = _outcomes(policy, same, worse, per_minute, each)
            promoted += int((outcome == PROMOTED).sum())
            rolled_back += int((outcome == ROLLED_BACK).sum())
        played = each * len(TRAFFIC)
        print_status(f"{metric.name} worse by {2 * metric.margin:.0%}: {promoted} of {played} promoted")
        rows.append(Row(f"rollbacks, {metric.name} {2 * metric.margin:.0%} worse", 100 * rolled_back / played, "%"))
        wrong, total = wrong + promoted, total + played
    low, high = clopper_pearson(wrong, total)
    bar = f"at most 1 % (nominal {policy.alpha.promotion:.1%}); 95 % interval {low:.3%}..{high:.3%}"
    return [Row(f"false promotions, harm of twice the margin ({total:,} rollouts)", 100 * wrong / total, "%", bar,
                high <= 0.01), *rows]  # fmt: skip


def _outcomes(
    policy: RolloutPolicy, stable: Population, canary: Population, per_minute: float, rollouts: int,
    attackers: tuple[Attackers, ...] = (),
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:  # fmt: skip
    """Returns how rollouts end, and which were held for a suspicion.

    Undecided rollouts reach the deadline and count as paused.
    """
    grid = reconcile_times(60, 5_400, 1_200, 26 * 3_600)
    outcomes, suspected = [], []
    for begin in range(0, rollouts, BATCH):
        scenario = Scenario(policy, stable, canary, per_minute, grid, attackers=attackers)
        rng = np.random.default_rng((begin, int(per_minute)))
        simulation = Simulation(scenario, min(BATCH, rollouts - begin), rng).run()
        outcomes.append(simulation.outcome)
        suspected.append(simulation.ever_suspected)
    joined = np.concatenate(outcomes)
    return np.where(joined == RUNNING, PAUSED, joined), np.concatenate(suspected)


def attacks(policy: RolloutPolicy, same: Population, rollouts: int) -> list[Row]:
    """Error rates and power while an attacker owns a share of the requests or accounts, for every kind of attack."""
    worse = Population(3, {"long_watch_rate": 1 - DROP})
    kinds, rows = attack_kinds(), []
    for mode in MODES:
        for share in SHARES:
            equal: list[NDArray[np.int64]] = []
            dropped: list[NDArray[np.int64]] = []
            held: list[NDArray[np.bool_]] = []
            for kind in kinds:
                canary = worse if kind.hides_harm else same
                attackers = kind.attackers(mode, share, TRAFFIC["medium"], same, canary)
                outcome, suspected = _outcomes(policy, same, canary, TRAFFIC["medium"], rollouts, attackers)
                (dropped if kind.hides_harm else equal).append(outcome)
                held.append(suspected)
                print_status(
                    f"{mode.label}, {share:.0%}, {kind.label}: {(outcome == ROLLED_BACK).mean():.1%} rolled back, "
                    f"{(outcome == PROMOTED).mean():.1%} promoted, {suspected.mean():.1%} suspected"
                )
            name = f"attacker with {share:.0%} of {mode.owns}"
            wrong = sum(int((outcome == ROLLED_BACK).sum()) for outcome in equal)
            promoted = sum(int((outcome == PROMOTED).sum()) for outcome in dropped)
            for label, count, total in (
                ("false rollbacks", wrong, rollouts * len(equal)),
                (f"promotions of a {DROP:.0%} drop", promoted, rollouts * len(dropped)),
            ):
                low, high = clopper_pearson(count, total)
                bar = f"at most 1 %; 95 % interval {low:.3%}..{high:.3%}"
                rows.append(
                    Row(f"{name}: {label}", 100 * count / total, "%", bar, low <= 0.01 and count <= 0.01 * total)
                )
            power = min(float((outcome == ROLLED_BACK).mean()) for outcome in dropped)
            bar, holds = ("at least 70", power >= 0.7) if mode.authenticated else ("", None)
            rows.append(Row(f"{name}: rollbacks of a {DROP:.0%} drop, hardest attack", 100 * power, "%", bar, holds))
            rows.append(Row(f"{name}: rollouts with a suspicion", 100 * float(np.concatenate(held).mean()), "%"))
    return rows


@dataclass
class _MetricTrace:
    """Sums of the long-watch rate and the running Z per reconcile, recorded in a simulation without an end."""

    sums: list[list[F64]]
    z: list[F64]
    viewers: list[F64]

    def __call__(self, _look: int, simulation: Simulation) -> None:
        stable, canary = simulation.stable.of_tests(), simulation.canary.of_tests()
        margin = simulation.scenario.policy.outcomes[0].margin
        bounds = simulation.bounds
        columns = (canary[2], canary[1], stable[2], stable[1])
        self.sums.append([column[:, LONG_WATCH].copy() for column in columns])
        self.z.append(np.stack([(bounds.harm - m)[:, LONG_WATCH] / bounds.error[:, LONG_WATCH] for m in (margin, 0.0)]))
        self.viewers.append(simulation.canary.viewers.copy())

    def per_look(self) -> tuple[F64, F64, F64, F64]:
        """Returns the increments of the four cumulative sums, each of shape [rollouts, reconciles]."""
        cumulative = np.array(self.sums).transpose(1, 2, 0)
        steps = np.diff(cumulative, axis=-1, prepend=0.0)
        return steps[0], steps[1], steps[2], steps[3]


def detection(policy: RolloutPolicy, same: Population, rollouts: int) -> list[Row]:
    """Counts canary viewers until a 10 % drop in the long-watch rate is detected with 80 % power (weight 1 %)."""
    first = policy.steps[0].model_copy(update={"hold_s": 1e9})
    still = policy.model_copy(update={"steps": (first,)})
    worse = Population(3, {"long_watch_rate": 1 - DROP})
    grid = np.arange(60.0, 3 * 3_600 + 1, 60.0)
    per_minute, rows = 2_000.0, []
    runs: dict[str, tuple[Simulation, _MetricTrace]] = {}
    for name, population in (("A/A", same), ("drop", worse)):
        watch = _MetricTrace([], [], [])
        scenario = Scenario(still, same, population, per_minute, grid, on_reconcile=watch)
        simulation = Simulation(scenario, rollouts, np.random.default_rng(7))
        simulation.outcome[:] = RUNNING
        runs[name] = (_play_on(simulation), watch)
    ours, watch = runs["drop"]
    viewers = np.array(watch.viewers)
    caught = _viewers_at_power(ours.first_harm, viewers)
    alone = _viewers_at_power(ours.first_long_watch, viewers)
    alpha = policy.rollback_alphas[LONG_WATCH]
    oracle = _oracle(np.array(watch.z)[:, 0], viewers, alpha)
    bold = _oracle(np.array(watch.z)[:, 1], viewers, policy.alpha.rollback)
    print_status(f"10 % drop: caught after {caught:.0f} viewers, by its own test {alone:.0f}, oracle {oracle:.0f}")
    false_ours = float((runs["A/A"][0].first_harm != NEVER).mean())
    rows += [
        Row("viewers to detect a 10 % drop in long-watch rate, 80 % power", caught, "canary viewers"),
        Row("viewers to detect the drop by the long-watch test alone", alone, "canary viewers"),
        Row("viewers of an oracle: fixed horizon, same hypothesis, same alpha", oracle, "canary viewers"),
        Row("long-watch test over the oracle", alone / oracle, "x", "at most 1.5", alone / oracle <= 1.5),
        Row("long-watch test over an oracle without margin and with the whole alpha", alone / bold, "x"),
        Row("false rollbacks in A/A rollouts of the same runs", 100 * false_ours, "%", "at most 1", false_ours <= 0.01),
    ]
    peers = {"rule of Argo Rollouts": ArgoRollouts(), "rule of Flagger": Flagger(), "rule of Kayenta": Kayenta()}
    for name, rule in peers.items():
        wrong = rule.rolled_back_at(*runs["A/A"][1].per_look())
        right = rule.rolled_back_at(*watch.per_look())
        needed = _viewers_at_power(right, viewers)
        rows.append(Row(f"{name}: viewers to detect the drop, 80 % power", needed, "canary viewers"))
        rows.append(Row(f"{name}: false rollbacks in A/A rollouts", 100 * float((wrong != NEVER).mean()), "%"))
    return rows


class _FirstDetections(Simulation):
    first_harm: NDArray[np.int64]
    first_long_watch: NDArray[np.int64]


def _play_on(simulation: Simulation) -> _FirstDetections:
    """Runs all reconciles and records when any test, and the long-watch test, first established harm."""
    inner = simulation.scenario.on_reconcile
    any_at, own_at = (np.full(simulation.rollouts, NEVER) for _ in range(2))

    def note(index: int, arrays: Simulation) -> None:
        for at, hit in (
            (any_at, arrays.bounds.established.any(1)), (own_at, arrays.bounds.established[:, LONG_WATCH]),
        ):  # fmt: skip
            at[(at == NEVER) & hit] = index
        arrays.outcome[:] = RUNNING
        if inner is not None:
            inner(index, arrays)

    simulation.scenario.on_reconcile = note
    simulation.run()
    simulation.first_harm, simulation.first_long_watch = any_at, own_at  # type: ignore[attr-defined]
    return simulation  # type: ignore[return-value]


def _viewers_at_power(at: NDArray[np.int64], viewers: F64, power: float = 0.8) -> float:
    """Returns the canary viewers by which ``power`` of the rollouts were detected; infinite if they were not."""
    detected = np.where(at == NEVER, math.inf, viewers[np.maximum(at, 0), np.arange(len(at))])
    return float(np.sort(detected)[math.ceil(power * len(detected)) - 1])


def _oracle(z: F64, viewers: F64, alpha: float, power: float = 0.8) -> float:
    """Returns the viewers that a single one-sided test of level ``alpha`` needs; interpolated between reconciles."""
    critical = norm.isf(alpha)
    reached = (z > critical).mean(1)
    mean = viewers.mean(1)
    k = int(np.argmax(reached >= power))
    if reached[k] < power:
        return math.inf
    if k == 0:
        return float(mean[0])
    part = (power - reached[k - 1]) / (reached[k] - reached[k - 1])
    return float(mean[k - 1] + part * (mean[k] - mean[k - 1]))


def outages(policy: RolloutPolicy, same: Population, rollouts: int) -> list[Row]:
    """Counts changes while telemetry is down for five minutes in mid-rollout.

    Reconciles before and after the outage run in the array code, those of the outage in ``decide``; see
    ``tests.support.rollout.canary_outage``.
    """
    from tests.support.rollout.canary_outage import play_outages

    promoted, rolled_back, moved, held = play_outages(policy, same, rollouts)
    print_status(
        f"outage: {promoted} promotions, {rolled_back} rollbacks, {moved} weight changes, {held} held of {rollouts}"
    )
    return [
        Row(f"promotions while telemetry was down 5 min ({rollouts:,} rollouts)", promoted, "", "0", promoted == 0),
        Row("rollbacks while telemetry was down", rolled_back, "", "0", rolled_back == 0),
        Row("weight changes while telemetry was down", moved, "", "0", moved == 0),
        Row("rollouts that held and recorded it", held, "", f"all {rollouts:,}", held == rollouts),
    ]


def histories(count: int) -> list[Row]:
    """Plays random event histories; ``check`` raises at the first broken invariant."""
    runner = HistoryGenerator(0)
    for _ in range(count):
        runner.play(40)
    unseen = [action.value for action, times in runner.counts.items() if not times]
    print_status(
        f"{count} histories, {runner.events} events; ends: { {p.value: n for p, n in runner.ends.items() if n} }"
    )
    return [
        Row(
            "random event histories in which all invariants held",
            count,
            "histories",
            "at least 100,000",
            count >= 100_000,
        ),
        Row("events in these histories", runner.events, "events"),
        Row("actions that occurred in none of these histories", len(unseen), "actions", "0", not unseen),
    ]


def cuped_saving(population: Population) -> float:
    """Returns the squared correlation of viewers' long-watch residuals in two sessions (CUPED)."""
    (x1, y1), (x2, y2) = ((done[:, 0], done[:, N_X + LONG_WATCH]) for done in population.sessions)
    now, past = (y - y.sum() / x.sum() * x for x, y in ((x1, y1), (x2, y2)))
    return float(np.corrcoef(now, past)[0, 1] ** 2)


if __name__ == "__main__":
    main()
