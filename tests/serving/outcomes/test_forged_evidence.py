"""Requests of a few viewers, forged or extreme, do not move a rollout: from the log's rows to the verdicts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.support.serving.forged_events import DAY_MS, STATE, ForgedRollout
from tests.support.serving.raw_events import NOW

from reelway.platform.contracts.events import Arm
from reelway.platform.rollout.assessment import Assessment, OutcomeVerdict, assess
from reelway.platform.rollout.decision import Action, decide_on
from reelway.platform.rollout.policy import RolloutPolicy, parse_policy

TEXT = """
steps: [{weight_percent: 50, hold_s: 0, minimum_viewers: 200, minimum_impressions: 200}]
guardrails: {error_ratio: null, empty_slate_ratio: null, p99_ms: null, parity_mismatches: null}
outcomes:
  - {name: long_watch_rate, margin: 0.02, tuned_for: 0.10}
  - {name: watch_s_per_impression, margin: 0.03, tuned_for: 0.10}
"""
POLICY = parse_policy(TEXT, source="test")
LOOSE_POLICY = parse_policy(TEXT.replace("0.02", "0.1").replace("0.03", "0.1").replace("0.10", "0.2"), source="test")


@pytest.fixture
def rollout(tmp_path: Path) -> Iterator[ForgedRollout]:
    rollout = ForgedRollout(tmp_path)
    yield rollout
    rollout.close()


def verdicts_of(rollout: ForgedRollout) -> Assessment:
    return assess(POLICY, rollout.evidence(POLICY))


def action(rollout: ForgedRollout, policy: RolloutPolicy = POLICY) -> tuple[Action, str]:
    evidence = rollout.evidence(policy)
    decision = decide_on(policy, STATE, evidence, assess(policy, evidence), NOW)
    return decision.action, decision.reason


def watched(verdicts: Assessment) -> OutcomeVerdict:
    return verdicts.outcomes[1]


def test_watches_of_a_day_do_not_roll_back(rollout: ForgedRollout) -> None:
    """One slate of 100 videos on stable and one batch of 24-hour watches: two requests."""
    rollout.honest(Arm.STABLE, 300)
    rollout.honest(Arm.CANARY, 300)
    before = watched(verdicts_of(rollout))
    rollout.add(Arm.STABLE, 1, 100, lambda viewer: np.full(len(viewer), DAY_MS))
    after = watched(verdicts_of(rollout))
    assert after.stable == pytest.approx(before.stable), "the viewer does the same on every impression"
    assert action(rollout)[0] is Action.HOLD


def test_loop_of_hours_leaves_the_interval_as_it_was(rollout: ForgedRollout) -> None:
    """An honest viewer of stable leaves one video running for 8 hours."""
    rollout.honest(Arm.STABLE, 2_000)
    rollout.honest(Arm.CANARY, 2_000)
    before = watched(verdicts_of(rollout))
    rollout.add(Arm.STABLE, 1, 10, lambda viewer: np.where(np.arange(len(viewer)) == 3, 8 * 3_600_000.0, 5_000.0))
    after = watched(verdicts_of(rollout))
    assert after.stable_viewers == before.stable_viewers + 1
    assert after.harm_high - after.harm_low == pytest.approx(before.harm_high - before.harm_low, rel=0.01)


@pytest.mark.parametrize("invented", [100, 160, 2_000])
def test_viewers_who_only_ask_do_not_roll_back(rollout: ForgedRollout, invented: int) -> None:
    rollout.honest(Arm.STABLE, 1_000)
    rollout.honest(Arm.CANARY, 1_000)
    before = verdicts_of(rollout).outcomes
    rollout.silent(Arm.CANARY, invented)
    assert verdicts_of(rollout).outcomes == before
    did, reason = action(rollout)
    assert did is Action.HOLD
    if invented == 2_000:
        assert "suspicion: new viewers: suspected forgery" in reason
        assert "silent viewers: suspected forgery" in reason


def test_viewers_who_only_ask_hide_no_loss(rollout: ForgedRollout) -> None:
    """160 invented viewers on stable, to lower its rate, and a canary that is 20 % worse."""
    rollout.honest(Arm.STABLE, 1_000)
    rollout.honest(Arm.CANARY, 1_000, long_watch=0.32)
    rollout.silent(Arm.STABLE, 160)
    did, reason = action(rollout)
    assert did is Action.ROLL_BACK
    assert reason.startswith("long_watch_rate: harm beyond the margin of 2.0% is established")


def test_forged_watches_are_suspected(rollout: ForgedRollout) -> None:
    """They are no evidence, and the difference of the arms is named."""
    for arm in (Arm.STABLE, Arm.CANARY):
        rollout.honest(arm, 3_000)
    rollout.add(Arm.CANARY, 300, 20, lambda viewer: np.full(len(viewer), 40_000.0))
    rollout.honest(Arm.STABLE, 300, seed=1)
    verdicts = verdicts_of(rollout)
    assert [one.name for one in verdicts.suspected] == ["saturated_viewers"]
    did, reason = action(rollout)
    assert did is Action.HOLD
    assert "saturated viewers: suspected forgery" in reason


def test_harm_of_idle_viewers_alone_is_suspected(rollout: ForgedRollout) -> None:
    """A tenth of the canary's viewers report that they watched nothing."""
    for arm in (Arm.STABLE, Arm.CANARY):
        rollout.honest(arm, 3_000)
    rollout.honest(Arm.STABLE, 300, seed=1)
    rollout.add(Arm.CANARY, 300, 10, lambda viewer: np.zeros(len(viewer)))
    verdicts = verdicts_of(rollout)
    assert verdicts.harms
    assert not verdicts.proven_harms
    did, reason = action(rollout)
    assert did is Action.HOLD
    assert "idle viewers" in reason


def test_canary_that_nobody_watches_rolls_back(rollout: ForgedRollout) -> None:
    rollout.honest(Arm.STABLE, 1_000)
    rollout.add(Arm.CANARY, 1_000, 10, lambda viewer: np.zeros(len(viewer)))
    did, reason = action(rollout)
    assert did is Action.ROLL_BACK
    assert "long_watch_rate: harm beyond the margin" in reason


def test_canary_whose_viewers_leave_silently_is_not_promoted(rollout: ForgedRollout) -> None:
    """The metrics cannot see viewers without an outcome. Their share differs between the arms, and a user must look."""
    for arm in (Arm.STABLE, Arm.CANARY):
        rollout.honest(arm, 4_000)
    did, reason = action(rollout, LOOSE_POLICY)
    assert did is Action.PROMOTE, reason
    rollout.honest(Arm.STABLE, 400, seed=1)
    rollout.silent(Arm.CANARY, 400)
    did, reason = action(rollout, LOOSE_POLICY)
    assert did is Action.HOLD
    assert reason.startswith("held at 50 %: suspicion: silent viewers: suspected forgery")
