"""The array code of the canary benchmark and ``decide`` must agree on the same sums."""

from __future__ import annotations

import numpy as np
import pytest
from tests.support.rollout.canary_attacks import MODES, attack_kinds
from tests.support.rollout.canary_outage import play_both
from tests.support.rollout.canary_peers import ArgoRollouts, Flagger, Kayenta
from tests.support.rollout.canary_population import COUNTS, N_X, Population
from tests.support.rollout.canary_simulation import (
    PROMOTED,
    ROLLED_BACK,
    RUNNING,
    Scenario,
    Simulation,
    clopper_pearson,
    reconcile_times,
)

from reelway.platform.rollout.policy import default_policy


@pytest.fixture(scope="module")
def populations() -> dict[str, Population]:
    return {"same": Population(1), "worse": Population(2, {"long_watch_rate": 0.95, "skip_rate": 1.1})}


@pytest.mark.parametrize(("arm", "end"), [("same", PROMOTED), ("worse", ROLLED_BACK)])
def test_simulation_decides_as_the_decision_rules_do(populations: dict[str, Population], arm: str, end: int) -> None:
    policy = default_policy().model_copy(update={"longest_tick_s": 1e4, "evidence_max_age_s": 1e4})
    scenario = Scenario(policy, populations["same"], populations[arm], 3_000, reconcile_times(60, 5_400, 1_200, 36_000))
    simulation = Simulation(scenario, 30, np.random.default_rng(4))
    assert play_both(simulation, list(range(6))) == []
    assert (simulation.outcome[:6] == end).all()


@pytest.mark.parametrize("number", [0, 1, 3], ids=["forged", "idle", "silent"])
def test_simulated_suspicion_holds_as_the_decision_rules_do(populations: dict[str, Population], number: int) -> None:
    """An attacker with a tenth of the accounts neither rolls back nor promotes."""
    policy = default_policy().model_copy(update={"longest_tick_s": 1e4, "evidence_max_age_s": 1e4})
    same, kind = populations["same"], attack_kinds()[number]
    attackers = kind.attackers(MODES[0], 0.1, 3_000, same, same)
    scenario = Scenario(policy, same, same, 3_000, reconcile_times(60, 5_400, 1_200, 12_000), attackers=attackers)
    simulation = Simulation(scenario, 6, np.random.default_rng(4))
    assert play_both(simulation, [0, 1]) == []
    assert simulation.ever_suspected.all()
    assert (simulation.outcome == RUNNING).all()


def test_cohorts_of_every_size_have_the_moments_of_the_pool(populations: dict[str, Population]) -> None:
    rng, population = np.random.default_rng(0), populations["same"]
    column = population.rows[:, 2 * len(COUNTS) + N_X]  # long watches of first sessions
    for size in (1, 20, 300, 5_000):
        cohorts = population.cohorts(rng, np.full(3_000, size))
        per_viewer = cohorts.linear[:, 0, 4].astype(float) / size
        assert per_viewer.mean() == pytest.approx(column.mean(), rel=0.1 if size == 1 else 0.02)
        assert per_viewer.std() * size**0.5 == pytest.approx(column.std(), rel=0.15)


def _rates(rng: np.random.Generator, factor: float) -> tuple[np.ndarray, ...]:
    x = np.full((50, 60), 1_000.0)
    return rng.binomial(1_000, 0.4 * factor, x.shape).astype(float), x, rng.binomial(1_000, 0.4, x.shape) * 1.0, x


@pytest.mark.parametrize("rule", [ArgoRollouts(), Flagger(), Kayenta()])
def test_peer_rules_detect_a_collapse_but_not_an_improvement(rule: ArgoRollouts | Flagger | Kayenta) -> None:
    rng = np.random.default_rng(0)
    assert (rule.rolled_back_at(*_rates(rng, 0.5)) >= 0).all()
    assert (rule.rolled_back_at(*_rates(rng, 1.3)) == -1).all()


def test_argo_rule_counts_failures_or_consecutive_errors() -> None:
    rule, one = ArgoRollouts(interval=1), np.ones((1, 12))
    failing = np.where(np.arange(12) < 3, 0.0, 1.0)[None]
    assert rule.rolled_back_at(failing, one, one, one)[0] == -1
    assert rule.rolled_back_at(np.where(np.arange(12) < 4, 0.0, 1.0)[None], one, one, one)[0] == 3
    absent = np.where(np.arange(12) < 4, 0.0, 1.0)[None]
    assert rule.rolled_back_at(one, absent, one, one)[0] == -1
    assert rule.rolled_back_at(one, np.where(np.arange(12) < 5, 0.0, 1.0)[None], one, one)[0] == 4


def test_flagger_rule_counts_failed_checks() -> None:
    rule, one = Flagger(), np.ones((1, 20))
    assert rule.rolled_back_at(np.zeros((1, 20)), one, one, one)[0] == 4
    assert rule.rolled_back_at(one, np.zeros((1, 20)), one, one)[0] == 4, "a missing value counts as a failed check"
    assert rule.promoted_at(one, one, one, one)[0] == 10


def test_clopper_pearson_interval_of_zero_errors() -> None:
    assert clopper_pearson(0, 10_000) == pytest.approx((0.0, 1 - 0.025 ** (1 / 10_000)), rel=1e-6)
