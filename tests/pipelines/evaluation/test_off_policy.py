"""Off-policy estimators on a small simulation whose true values are enumerated."""

from __future__ import annotations

import numpy as np
import pytest

from reelway.pipelines.evaluation.off_policy import estimate_off_policy
from reelway.platform.errors import DataError

CONTEXTS, VIDEOS = 6, 5


class SmallWorld:
    """A table of mean rewards, a logging policy with full support, and a target that prefers good videos."""

    def __init__(self, seed: int = 0, sharpness: float = 1.5) -> None:
        rng = np.random.default_rng(seed)
        self.reward = rng.uniform(0, 10, (CONTEXTS, VIDEOS))
        self.logging = rng.dirichlet(np.full(VIDEOS, 2.0), CONTEXTS) * 0.8 + 0.2 / VIDEOS
        preference = np.exp(sharpness * self.reward / 5)
        self.target = preference / preference.sum(axis=1, keepdims=True)
        self.truth = float((self.target * self.reward).sum(axis=1).mean())

    def log(self, rows: int, seed: int):
        rng = np.random.default_rng(seed)
        context = rng.integers(0, CONTEXTS, rows)
        draw = rng.random(rows)
        video = (draw[:, None] >= np.cumsum(self.logging[context], axis=1)).sum(axis=1).clip(max=VIDEOS - 1)
        reward = self.reward[context, video] + rng.normal(0, 1, rows)
        return {
            "reward_N": reward,
            "logged_propensity_N": self.logging[context, video],
            "target_propensity_N": self.target[context, video],
            "viewer_ids_N": np.arange(rows) // 4,
        }, (context, video)


def test_every_estimator_covers_the_known_truth():
    world = SmallWorld()
    log, _ = world.log(20_000, seed=1)
    estimates = estimate_off_policy(**log, clip=1e9)
    for estimate in (estimates.ips, estimates.snips, estimates.doubly_robust):
        assert estimate.low <= world.truth <= estimate.high
        assert estimate.value == pytest.approx(world.truth, rel=0.05)
    naive = float(log["reward_N"].mean())
    assert abs(naive - world.truth) > 5 * abs(estimates.snips.value - world.truth)


def test_intervals_have_their_nominal_coverage():
    world = SmallWorld(seed=3)
    covered = [
        estimates.snips.low <= world.truth <= estimates.snips.high
        for estimates in (estimate_off_policy(**world.log(800, seed=s)[0], clip=1e9) for s in range(60))
    ]
    assert sum(covered) >= 51  # 95 % of 60 is 57; below 51 has a chance under 1 in 500


def test_doubly_robust_is_consistent_with_right_and_wrong_reward_models():
    world = SmallWorld()
    log, (context, video) = world.log(8_000, seed=2)
    plain = estimate_off_policy(**log, clip=1e9)

    def with_model(table):
        expected = (world.target * table).sum(axis=1)[context]
        return estimate_off_policy(
            **log, modelled_logged_N=table[context, video], modelled_target_N=expected, clip=1e9
        ).doubly_robust

    good, wrong = with_model(world.reward), with_model(np.full((CONTEXTS, VIDEOS), 3.0))
    assert good.high - good.low < 0.7 * (plain.ips.high - plain.ips.low)
    assert wrong.low <= world.truth <= wrong.high


def test_logging_policy_has_its_mean_reward_and_full_sample_size():
    log, _ = SmallWorld().log(2_000, seed=5)
    estimates = estimate_off_policy(**(log | {"target_propensity_N": log["logged_propensity_N"]}))
    assert estimates.ips.value == pytest.approx(log["reward_N"].mean())
    assert estimates.effective_sample_size == pytest.approx(2_000)
    assert estimates.clipped_share == 0


def test_clipping_is_reported_and_lowers_the_estimate_of_positive_rewards():
    log, _ = SmallWorld(sharpness=4.0).log(5_000, seed=6)
    log["reward_N"] = np.abs(log["reward_N"])
    free, cut = estimate_off_policy(**log, clip=1e9), estimate_off_policy(**log, clip=2.0)
    assert cut.clipped_share > 0.05
    assert cut.ips.value < free.ips.value
    assert cut.effective_sample_size > free.effective_sample_size


@pytest.mark.parametrize("bad", [0.0, -0.1, 1.5, np.nan])
def test_impossible_propensity_is_rejected_with_its_row(bad):
    log, _ = SmallWorld().log(10, seed=7)
    log["logged_propensity_N"][3] = bad
    with pytest.raises(DataError, match="row 3"):
        estimate_off_policy(**log)


def test_disjoint_target_policy_has_no_self_normalised_estimate():
    log, _ = SmallWorld().log(10, seed=8)
    estimates = estimate_off_policy(**(log | {"target_propensity_N": np.zeros(10)}))
    assert estimates.snips.to_dict()["value"] is None
    assert estimates.effective_sample_size == 0
