"""Traffic target of each rollout state."""

from __future__ import annotations

from typing import Any

import pytest

from reelway.platform.contracts.events import Arm
from reelway.platform.rollout.state import Phase, RolloutState
from reelway.platform.rollout.traffic.routing import Routing
from reelway.platform.rollout.traffic.target import TrafficObservation, traffic_target


def state(phase: Phase, **more: Any) -> RolloutState:
    """Returns the state of a rollout of ``new`` over ``old``."""
    return RolloutState(
        id="r-1", stable_release="old", canary_release="new", phase=phase, started_at=0, changed_at=0, tick_at=0, **more
    )


def shares(rollout_state: RolloutState) -> dict[tuple[str, str], int]:
    return {(route.arm.value, route.release): route.weight_bp for route in traffic_target(rollout_state).routing.arms}


@pytest.mark.parametrize("phase", [Phase.PENDING, Phase.ROLLED_BACK])
def test_release_does_not_run_before_or_after_its_rollout(phase: Phase) -> None:
    assert traffic_target(state(phase)).releases == ("old",)
    assert shares(state(phase)) == {("stable", "old"): 10_000}


@pytest.mark.parametrize("phase", [Phase.PREPARING, Phase.SHADOW, Phase.ROLLING_BACK])
def test_release_without_traffic_runs_and_stays_open(phase: Phase) -> None:
    target = traffic_target(state(phase))
    assert target.releases == ("new", "old")
    assert set(target.routing.releases) == {"new", "old"}
    assert shares(state(phase)) == {("stable", "old"): 10_000}


def test_step_has_two_arms_and_a_holdout_on_the_live_release() -> None:
    stepping = state(Phase.STEPPING, step=0, canary_bp=500, holdout_bp=100)
    assert shares(stepping) == {("canary", "new"): 500, ("stable", "old"): 9_400, ("holdout", "old"): 100}


def test_promoted_release_has_all_traffic() -> None:
    promoted = state(Phase.PROMOTED, canary_bp=10_000)
    assert shares(promoted) == {("canary", "new"): 10_000}
    assert set(traffic_target(promoted).routing.releases) == {"new", "old"} == set(traffic_target(promoted).releases)


def test_retired_rollout_leaves_one_stable_release() -> None:
    retired = state(Phase.PROMOTED, canary_bp=9_900, holdout_bp=100, retired=True)
    assert shares(retired) == {("stable", "new"): 9_900, ("holdout", "new"): 100}
    assert traffic_target(retired).routing.releases == ("new",) == traffic_target(retired).releases


def test_requests_are_mirrored_only_in_the_shadow_phase() -> None:
    shadow = traffic_target(state(Phase.SHADOW, shadow_bp=500)).routing.shadow
    assert shadow is not None
    assert (shadow.release, shadow.weight_bp) == ("new", 500)
    assert traffic_target(state(Phase.STEPPING, step=0, canary_bp=100, shadow_bp=500)).routing.shadow is None


def test_observed_weights_require_a_routing_of_this_rollout() -> None:
    stepping = state(Phase.STEPPING, step=0, canary_bp=500)
    own = TrafficObservation(routing=traffic_target(stepping).routing)
    assert own.weights(stepping) == {Arm.STABLE: 9_500, Arm.CANARY: 500, Arm.HOLDOUT: 0}
    other = TrafficObservation(routing=traffic_target(stepping.model_copy(update={"id": "r-0"})).routing)
    assert other.weights(stepping) is None
    assert TrafficObservation().weights(stepping) is None


def test_single_stable_routing_counts_as_canary_weight_zero() -> None:
    rolling_back = state(Phase.ROLLING_BACK)
    weights = TrafficObservation(routing=Routing.single_release("old")).weights(rolling_back)
    assert weights == {Arm.STABLE: 10_000, Arm.CANARY: 0, Arm.HOLDOUT: 0}
    assert TrafficObservation(routing=Routing.single_release("new")).weights(rolling_back) is None


def test_salt_is_random_and_stays() -> None:
    """The id is in every impression token, so that a salt derived from it would not be secret."""
    one, other = state(Phase.STEPPING, canary_bp=500), state(Phase.STEPPING, canary_bp=500)
    salts = {traffic_target(rollout).routing.salt for rollout in (one, other)}
    assert len(salts) == 2
    assert min(len(salt) for salt in salts) >= 32
    promoted = one.model_copy(update={"phase": Phase.PROMOTED, "canary_bp": 10_000})
    recorded = RolloutState.model_validate_json(promoted.model_dump_json())
    assert traffic_target(recorded).routing.salt == traffic_target(one).routing.salt
