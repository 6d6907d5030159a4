"""Comparison of the arms' audiences: what is suspected, and what it does to the decision."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.support.rollout.canary_events import RELEASE, HistoryGenerator
from tests.support.rollout.canary_outage import begin

from reelway.platform.contracts.events import Arm
from reelway.platform.rollout.assessment import assess
from reelway.platform.rollout.decision import Action, advance, decide
from reelway.platform.rollout.evidence import EvidenceSnapshot
from reelway.platform.rollout.policy import default_policy
from reelway.platform.rollout.state import Phase
from reelway.platform.rollout.summary import summarise_evidence
from reelway.platform.rollout.suspicion import (
    CHECKS,
    MAX_FORGED_SHARE,
    Audience,
    GroupWeights,
    compare_audiences,
    explained_harm,
    group_share,
    share_difference,
)


def audience(viewers: int, *, weight: float = 0.5, **members: float) -> Audience:
    """An arm whose viewers all arrived at the same overlap weight."""

    def group(count: float) -> GroupWeights:
        return GroupWeights(weight * count, weight**2 * count)

    groups = {name: group(count) for name, count in members.items()}
    return Audience(viewers, group(viewers), evidence=group(viewers), **groups)


def suspected(stable: Audience, canary: Audience) -> list[str]:
    checks = compare_audiences(stable, canary, alpha=0.005, margin=0.02)
    assert tuple(check.name for check in checks) == CHECKS
    return [check.name for check in checks if bool(check.suspected)]


def test_equal_audiences_are_not_suspicious() -> None:
    stable = audience(99_000, weight=0.01, silent=5_000, saturated=200, idle=3_000)
    assert suspected(stable, audience(1_000, weight=0.99, silent=52, saturated=1, idle=33)) == []


@pytest.mark.parametrize(("viewers", "found"), [(1_000, []), (1_500, ["new_viewers"]), (600, ["new_viewers"])])
def test_number_of_viewers_must_fit_the_weight(viewers: int, found: list[str]) -> None:
    """At a weight of 1 %, 99,000 viewers of stable explain about 1,000 of the canary."""
    assert suspected(audience(99_000, weight=0.01), audience(viewers, weight=0.99)) == found


@pytest.mark.parametrize("group", ["silent", "saturated", "idle"])
@pytest.mark.parametrize("more_on_canary", [True, False])
def test_share_of_a_group_must_be_equal(group: str, more_on_canary: bool) -> None:
    few, many = audience(5_000, **{group: 250}), audience(5_000, **{group: 700})
    assert suspected(*((few, many) if more_on_canary else (many, few))) == [f"{group}_viewers"]
    assert suspected(few, audience(5_000, **{group: 330})) == []


def test_few_viewers_are_not_compared() -> None:
    assert suspected(audience(199, silent=0), audience(199, silent=199)) == []


def test_group_of_one_arm_alone_is_noticed() -> None:
    """All viewers of the canary and none of stable: the observed shares have no variance."""
    assert suspected(audience(1_000, silent=0), audience(1_000, silent=1_000)) == ["silent_viewers"]


@pytest.mark.parametrize(
    ("idle", "higher", "lower"),
    [(500, 0.05, 0.05 * 0.7 / 0.3), (40, 0.0, 0.0), (4_000, 0.4, 0.4 * 0.7 / 0.3), (4_200, 0.0, 0.0)],
)
def test_idle_viewers_explain_harm_up_to_a_share(idle: int, higher: float, lower: float) -> None:
    """A few are chance, and more than ``MAX_FORGED_SHARE`` of the impressions are not forged, beyond chance."""
    assert MAX_FORGED_SHARE == 0.4
    stable, canary = (group_share(10_000, 10_000, 10_000, count, count) for count in (0, idle))
    difference = share_difference(stable, canary)
    found = explained_harm(difference, difference, np.array([0.3, 0.3]), np.array([False, True]))
    assert found.tolist() == pytest.approx([higher, lower])


POLICY = default_policy().model_copy(update={"outcomes": HistoryGenerator(0).policy.outcomes})


def evidence(kind: str, stable: Audience, canary: Audience) -> EvidenceSnapshot:
    snapshot = HistoryGenerator(0).kinds[kind]
    share = float(canary.idle.sum_w / canary.evidence.sum_w)
    metrics = {
        key: replace(
            metric,
            canary=replace(metric.canary, idle_x=share * metric.canary.sum_x, idle_xx=share * metric.canary.sum_xx),
        )
        for key, metric in snapshot.metrics.items()
    }
    return replace(snapshot, time=100.0, metrics=metrics, audiences={Arm.STABLE: stable, Arm.CANARY: canary})


CALM = (audience(5_000), audience(5_000))
INVENTED = (audience(5_000), audience(9_000))
SILENT = (audience(5_000), audience(5_000, silent=900))
IDLE = (audience(5_000), audience(5_000, idle=1_200))


@pytest.mark.parametrize(
    ("kind", "audiences", "action"),
    [
        ("good", CALM, Action.PROMOTE), ("good", INVENTED, Action.HOLD), ("good", SILENT, Action.HOLD),
        ("good", IDLE, Action.HOLD),
        ("harm", CALM, Action.ROLL_BACK), ("harm", INVENTED, Action.HOLD), ("harm", SILENT, Action.ROLL_BACK),
        ("harm", IDLE, Action.HOLD),
        ("errors", INVENTED, Action.ROLL_BACK), ("alert", INVENTED, Action.ROLL_BACK),
    ],
)  # fmt: skip
def test_suspicion_holds_the_rollout(kind: str, audiences: tuple[Audience, Audience], action: Action) -> None:
    """Guardrails, and harm that the suspicious viewers cannot cause, still roll back."""
    state = begin(POLICY, 3, 10_000.0, 95.0).model_copy(update={"canary_release": RELEASE})
    decision = decide(POLICY, state, evidence(kind, *audiences), 100.0)
    assert decision.action is action
    if action is Action.HOLD:
        assert "suspicion: " in decision.reason
        assert advance(state, decision, POLICY, 100.0).phase is Phase.HOLDING


def test_long_suspicion_pauses_for_a_user() -> None:
    state = begin(POLICY, 3, 10_000.0, 95.0).model_copy(
        update={"canary_release": RELEASE, "held_insufficient_s": POLICY.deadlines.insufficient.after_s}
    )
    decision = decide(POLICY, state, evidence("good", *INVENTED), 100.0)
    assert decision.action is Action.PAUSE
    assert "new viewers: suspected forgery" in decision.reason


def test_policy_can_disable_suspicion() -> None:
    state = begin(POLICY, 3, 10_000.0, 95.0).model_copy(update={"canary_release": RELEASE})
    off = POLICY.model_copy(update={"suspicion": None})
    assert decide(off, state, evidence("good", *INVENTED), 100.0).action is Action.PROMOTE


def test_summary_has_all_comparisons() -> None:
    snapshot = evidence("good", *SILENT)
    found = summarise_evidence(assess(POLICY, snapshot), snapshot, 100.0)["suspicions"]
    assert [one["name"] for one in found] == list(CHECKS)
    assert [one["name"] for one in found if one["suspected"]] == ["silent_viewers"]
    low, high = (100 * found[1][end] for end in ("low", "high"))
    assert found[1]["sentence"] == (
        "silent viewers: suspected forgery: the shares of viewers that reported no outcome differ (canary 18.0%, "
        f"stable 0.0%, at any time within {low:+.1f}..{high:+.1f} percentage points)"
    )
