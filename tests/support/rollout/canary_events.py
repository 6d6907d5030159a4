"""Random histories of one rollout, and the invariants that must hold after each event.

Evidence is good, bad, missing, stale or about another release. Commands are repeated and out of order, clocks jump, and
crashes reload the recorded state. ``check`` has the invariants. Tests and benchmark run the same code with different
numbers of histories.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace

import numpy as np

from reelway.platform.contracts.events import Arm
from reelway.platform.errors import RolloutError
from reelway.platform.rollout.assessment import Assessment, assess
from reelway.platform.rollout.decision import Action, Decision, advance, decide_on, start_state
from reelway.platform.rollout.evidence import (
    ArmStatistics,
    EvidenceSnapshot,
    EvidenceState,
    FiringAlert,
    GuardrailName,
    GuardrailReading,
    MetricEvidence,
)
from reelway.platform.rollout.policy import RolloutPolicy, Slice, parse_policy
from reelway.platform.rollout.state import RAMPING_PHASES, Command, Phase, RolloutState, Verb, add_command

SHADOW = "shadow: {duration_s: 60, mirror_percent: 5, minimum_requests: 100}"
POLICY = """
steps:
  - {weight_percent: 1, hold_s: 60, minimum_viewers: 200, minimum_impressions: 1000}
  - {weight_percent: 10, hold_s: 60, minimum_viewers: 200, minimum_impressions: 1000}
  - {weight_percent: 50, hold_s: 60, minimum_viewers: 200, minimum_impressions: 1000}
holdout_percent: 2
outcomes:
  - {name: long_watch_rate, margin: 0.05}
  - {name: skip_rate, direction: lower, role: safeguard, margin: 0.1}
deadlines:
  preparing: {after_s: 300, action: rollback}
  insufficient: {after_s: 600, action: pause}
  telemetry_down: {after_s: 300, action: pause}
cooldown_s: 600
retention_s: 600
"""
RELEASE, STABLE = "c" * 64, "a" * 64


def _arm(viewers: int, rate: float, seed: int) -> ArmStatistics:
    rng = np.random.default_rng(seed)
    x = 1.0 + rng.poisson(10, viewers)
    y = rng.binomial(x.astype(int), rng.beta(20 * rate, 20 * (1 - rate), viewers)).astype(float)
    return ArmStatistics(viewers, x.sum(), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum())


def _kinds() -> dict[str, EvidenceSnapshot]:
    ok = EvidenceState.OK
    key, skip = ("long_watch_rate", Slice.OVERALL), ("skip_rate", Slice.OVERALL)
    guardrails: dict[GuardrailName, GuardrailReading] = {
        "error_ratio": GuardrailReading(ok, 0, 500), "empty_slate_ratio": GuardrailReading(ok, 0, 500),
        "p99_ms": GuardrailReading(ok, trials=500, value=60.0), "parity_mismatches": GuardrailReading(ok, 0, 100),
    }  # fmt: skip
    big, calm = _arm(60_000, 0.4, 1), MetricEvidence(ok, _arm(20_000, 0.3, 2), _arm(20_000, 0.3, 3))
    good = EvidenceSnapshot(
        0.0,
        RELEASE,
        {key: MetricEvidence(ok, big, _arm(30_000, 0.4, 4)), skip: calm},
        guardrails,
        canary_ready=True,
        shadow_requests=500,
    )  # type: ignore[arg-type]
    few = {key: MetricEvidence(ok, big, _arm(300, 0.4, 5)), skip: calm}
    tiny = {key: MetricEvidence(ok, big, _arm(60, 0.4, 6)), skip: calm}
    harm = {key: MetricEvidence(ok, big, _arm(20_000, 0.3, 7)), skip: calm}
    nan = {key: MetricEvidence(ok, big, replace(big, sum_y=math.nan)), skip: calm}
    errors = {**guardrails, "error_ratio": GuardrailReading(ok, 30, 100)}
    silent: dict[GuardrailName, GuardrailReading] = {
        name: reading for name, reading in guardrails.items() if name != "p99_ms"
    }
    alert = FiringAlert("ReelwayErrorBudgetBurn", RELEASE, 0.0)
    return {
        "good": good, "few": replace(good, metrics=few), "tiny": replace(good, metrics=tiny),
        "harm": replace(good, metrics=harm), "nan": replace(good, metrics=nan),
        "errors": replace(good, guardrails=errors), "silent": replace(good, guardrails=silent),
        "nothing": EvidenceSnapshot(0.0, RELEASE), "foreign": replace(good, release="f" * 64),
        "alert": replace(good, alerts=(alert,)),
        "foreign_alert": replace(good, alerts=(replace(alert, release="f" * 64),)),
        "not_ready": replace(good, canary_ready=False),
    }  # type: ignore[arg-type]  # fmt: skip


MISSING = frozenset({"few", "tiny", "nan", "silent", "nothing", "foreign"})
DANGEROUS = frozenset({"harm", "errors", "alert"})
_WEIGHTED = ["good"] * 30 + ["few"] * 6 + sorted((MISSING | DANGEROUS | {"foreign_alert", "not_ready"}) - {"few"})


class HistoryGenerator:
    """Generates and plays random histories. ``counts`` is the number of times that each action was taken."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.policies = [parse_policy(POLICY + more, source="histories") for more in ("", SHADOW)]
        self.policy = self.policies[0]
        self.kinds = _kinds()
        self.assessed = {name: assess(self.policy, snapshot) for name, snapshot in self.kinds.items()}
        self.counts: dict[Action, int] = dict.fromkeys(Action, 0)
        self.ends: dict[Phase, int] = dict.fromkeys(Phase, 0)
        self.events = 0

    def play(self, events: int) -> RolloutState:
        """Plays one history of this many events and checks the invariants after each."""
        rng, world = self.random, _FakeEnvironment()
        self.policy = rng.choice(self.policies)
        state = start_state(self.policy, rollout_id="r", canary_release=RELEASE, stable_release=STABLE, now=world.now)
        for number in range(events):
            self.events += 1
            state = self._event(state, world, f"{number}", rng.random())
            if (state.phase is Phase.ROLLED_BACK or state.retired) and rng.random() < 0.3:
                break
        self.ends[state.phase] += 1
        return state

    def _event(self, state: RolloutState, world: _FakeEnvironment, number: str, dice: float) -> RolloutState:
        rng = self.random
        if dice < 0.06:
            return RolloutState.model_validate_json(state.model_dump_json())
        if dice < 0.12:
            world.now += rng.choice((-7200.0, -300.0, -1.0, 3600.0, 86_400.0 * 400))
            return state
        if dice < 0.18:
            verbs: tuple[Verb, ...] = ("pause", "pause", "resume", "resume", "promote", "promote", "rollback")
            verb = rng.choice(verbs)
            command = Command(id=rng.choice((number, "again")), verb=verb, force=rng.random() < 0.2)
            updated = add_command(state, command)
            assert add_command(updated, command) == updated, "a repeated command changed the state"
            return updated
        world.now += rng.choice((0.0, 10.0, 30.0, 60.0, 60.0))
        kind = rng.choice(_WEIGHTED)
        evidence = replace(self.kinds[kind], time=world.evidence_time(rng), weights=world.observed_weights(state, rng))
        decision = decide_on(self.policy, state, evidence, self.assessed[kind], world.now)
        after = advance(state, decision, self.policy, world.now)
        check(self.policy, state, kind, evidence, self.assessed[kind], decision, after)
        self.counts[decision.action] += 1
        if rng.random() < 0.05:  # killed right after the record was written
            assert RolloutState.model_validate_json(after.model_dump_json()) == after
        elif rng.random() < 0.05:  # killed before the record: decide again from the previous state
            again = advance(state, decide_on(self.policy, state, evidence, self.assessed[kind], world.now), self.policy,
                            world.now)  # fmt: skip
            assert again == after, "the same inputs gave another decision"
        world.apply(after, rng)
        return after


@dataclass
class _FakeEnvironment:
    """Clock and traffic of the simulated controller."""

    now: float = 1_000_000.0
    weights: dict[Arm, int] = field(default_factory=dict)

    def evidence_time(self, rng: random.Random) -> float:
        return self.now - rng.choice((0.0, 0.0, 0.0, 0.0, 5.0, 30.0, 600.0, -5.0, -600.0))

    def observed_weights(self, state: RolloutState, rng: random.Random) -> dict[Arm, int] | None:
        return None if rng.random() < 0.2 else dict(self.weights or state.weights)

    def apply(self, state: RolloutState, rng: random.Random) -> None:
        if rng.random() < 0.8:
            self.weights = state.weights


def check(
    policy: RolloutPolicy, before: RolloutState, kind: str, evidence: EvidenceSnapshot, verdicts: Assessment,
    decision: Decision, after: RolloutState,
) -> None:  # fmt: skip
    """Asserts the invariants of a rollout."""
    weights = after.weights
    assert sum(weights.values()) == 10_000, "weights sum to 10,000"
    assert all(isinstance(w, int) and w >= 0 for w in weights.values()), "weights are non-negative integers"
    assert weights[Arm.HOLDOUT] == policy.holdout_bp, "the holdout is never ramped"
    assert decision.reason, "every decision has a reason"
    if not before.retired:
        assert after.retired or before.stable_release in after.warm_releases, "stable keeps its capacity"
    assert before.stable_release in after.deployed_releases or after.retired
    promoting = after.phase is Phase.PROMOTING and before.phase is not Phase.PROMOTING
    forced = before.command is not None and before.command.verb == "promote" and before.command.force
    if (promoting or (decision.action is Action.STEP and before.phase in RAMPING_PHASES)) and not forced:
        sufficient_for_step = {"few"} if decision.action is Action.STEP else set()
        assert kind not in MISSING - sufficient_for_step, "a step or promotion without evidence"
        assert kind not in DANGEROUS
        assert evidence.release == before.canary_release
    if decision.action is Action.STEP and before.phase not in RAMPING_PHASES:
        assert evidence.canary_ready, "no traffic before the release is ready"
    if promoting and not forced:
        assert not verdicts.harm_not_excluded, "promotion excludes harm"
    if promoting and before.command is None:
        assert before.step == len(policy.steps) - 1, "no step is skipped"
    if before.phase in (Phase.ROLLING_BACK, Phase.ROLLED_BACK):
        assert after.phase in (Phase.ROLLING_BACK, Phase.ROLLED_BACK), "rollback is final"
        assert weights[Arm.CANARY] == 0
    if kind in DANGEROUS - {"harm"} and before.phase is not Phase.PENDING and not before.retired:
        assert weights[Arm.CANARY] == 0, "a guardrail acts immediately"
    if kind == "harm" and before.phase in RAMPING_PHASES:
        assert weights[Arm.CANARY] == 0, "established harm acts immediately, even if paused"
    if after.phase is Phase.STEPPING and before.phase in RAMPING_PHASES:
        assert after.canary_bp >= before.canary_bp, "the ramp is monotone"
    if decision.action in (Action.HOLD, Action.WAIT, Action.PAUSE, Action.CARRY_ON, Action.RESUME, Action.REFUSE):
        assert after.weights == before.weights, "holding moves nothing"
    if after.phase is Phase.ROLLED_BACK:
        try:
            start_state(policy, rollout_id="n", canary_release=RELEASE, stable_release=STABLE, now=1e12, previous=after)
        except RolloutError:
            pass
        else:
            raise AssertionError("a rolled-back release started again without --force")
