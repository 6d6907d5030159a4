"""Routings: arms in a fixed order give a monotone ramp and a constant holdout."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from reelway.platform.contracts.events import Arm
from reelway.platform.contracts.ids import MAX_ID
from reelway.platform.rollout.traffic.bucketing import BUCKETS
from reelway.platform.rollout.traffic.routing import ArmRoute, Routing, ShadowRoute

VIEWERS = st.integers(0, MAX_ID)


def routing(canary: int, holdout: int = 0, **more: object) -> Routing:
    """Returns a rollout's routing with the given weights."""
    shares = {Arm.CANARY: canary, Arm.STABLE: BUCKETS - canary - holdout, Arm.HOLDOUT: holdout}
    arms = tuple(
        ArmRoute(arm=arm, release="new" if arm is Arm.CANARY else "old", weight_bp=share)
        for arm, share in shares.items()
        if share
    )
    return Routing(salt="s", rollout="r", arms=arms, **more)  # type: ignore[arg-type]


@given(VIEWERS, st.integers(0, 8_000), st.integers(0, 8_000), st.integers(0, 2_000))
def test_growing_canary_takes_viewers_from_stable_only(viewer: int, one: int, other: int, holdout: int) -> None:
    small, large = sorted((one, other))
    before, after = routing(small, holdout).route_of(viewer).arm, routing(large, holdout).route_of(viewer).arm
    assert after is before or (before, after) == (Arm.STABLE, Arm.CANARY)


@given(VIEWERS, st.integers(0, 5_000))
def test_holdout_keeps_its_viewers_during_the_ramp(viewer: int, canary: int) -> None:
    in_holdout = routing(0, 500).route_of(viewer).arm is Arm.HOLDOUT
    assert (routing(canary, 500).route_of(viewer).arm is Arm.HOLDOUT) == in_holdout


@given(VIEWERS)
def test_single_release_routing_has_all_viewers_on_stable(viewer: int) -> None:
    assert Routing.single_release("only").route_of(viewer) == ArmRoute(
        arm=Arm.STABLE, release="only", weight_bp=BUCKETS
    )


def test_routing_lists_each_release_once() -> None:
    complete_routing = routing(100, 50, shadow=ShadowRoute(release="next", weight_bp=500), warm=("old", "older"))
    assert complete_routing.releases == ("new", "old", "next", "older")


def test_routing_survives_a_json_round_trip() -> None:
    complete_routing = routing(100, 50, shadow=ShadowRoute(release="next", weight_bp=500), warm=("older",))
    assert Routing.model_validate(complete_routing.model_dump(mode="json")) == complete_routing


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ([("stable", 9_000)], "sum to 9000"),
        ([("stable", 9_000), ("canary", 1_000)], "in this order"),
        ([("stable", 5_000), ("stable", 5_000)], "in this order"),
        ([("shadow", 10_000)], "in this order"),
    ],
)
def test_invalid_arms_are_rejected(arms: list[tuple[str, int]], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Routing(salt="s", arms=tuple(ArmRoute(arm=Arm(arm), release="r", weight_bp=bp) for arm, bp in arms))
