"""The decision rules: one test per rule, and invariants over random histories."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.rollout.canary_events import POLICY, RELEASE, SHADOW, STABLE, HistoryGenerator

from reelway.platform.contracts.events import Arm
from reelway.platform.errors import RolloutError
from reelway.platform.rollout.decision import Action, Decision, advance, decide, start_state
from reelway.platform.rollout.evidence import EvidenceSnapshot
from reelway.platform.rollout.policy import RolloutPolicy, parse_policy
from reelway.platform.rollout.state import Command, Phase, RolloutState, add_command

POLICY_ = parse_policy(POLICY, source="test")
KINDS = HistoryGenerator(0).kinds


class Rollout:
    """A rollout with a clock, driven event by event."""

    def __init__(self, policy: RolloutPolicy = POLICY_, phase: Phase | None = None, step: int = 0) -> None:
        self.policy, self.now = policy, 10_000.0
        self.state = start_state(policy, rollout_id="r", canary_release=RELEASE, stable_release=STABLE, now=self.now)
        if phase is not None:
            points = policy.steps[step].weight_bp
            self.state = self.state.model_copy(update={"phase": phase, "step": step, "canary_bp": points})

    def see(self, kind: str, after_s: float = 30.0, **changes: object) -> Decision:
        self.now += after_s
        changes.setdefault("time", self.now)
        changes.setdefault("weights", self.state.weights)
        evidence: EvidenceSnapshot = replace(KINDS[kind], **changes)  # type: ignore[arg-type]
        decision = decide(self.policy, self.state, evidence, self.now)
        self.state = advance(self.state, decision, self.policy, self.now)
        return decision

    def ask(self, verb: str, *, force: bool = False, id_: str = "") -> None:
        command = Command(id=id_ or f"{verb}{self.now}", verb=verb, force=force, actor="ada")  # type: ignore[arg-type]
        self.state = add_command(self.state, command)


def test_good_release_is_promoted_while_the_old_one_stays_warm() -> None:
    rollout, seen = Rollout(), []
    for _ in range(40):
        seen.append(rollout.see("good").action)
        if rollout.state.phase is Phase.PROMOTED:
            break
    moves = [action for action in seen if action is not Action.WAIT]
    assert moves == [Action.PREPARE, *[Action.STEP] * 3, Action.PROMOTE, Action.COMPLETE_PROMOTION]
    assert rollout.state.weights == {Arm.STABLE: 0, Arm.CANARY: 9_800, Arm.HOLDOUT: 200}
    assert rollout.state.warm_releases == {STABLE}
    assert "excluded" in rollout.state.model_copy().reason or "all traffic" in rollout.state.reason


def test_step_waits_for_its_hold_until_harm_is_excluded() -> None:
    rollout = Rollout(phase=Phase.STEPPING)
    assert rollout.see("few").action is Action.WAIT
    decision = rollout.see("few")
    assert decision.action is Action.STEP
    assert "300 viewers" in decision.reason


def test_excluded_harm_skips_every_hold_except_the_last() -> None:
    assert Rollout(phase=Phase.STEPPING).see("good", 1.0).action is Action.STEP
    assert Rollout(phase=Phase.STEPPING, step=2).see("good", 1.0).action is Action.WAIT


def test_permanently_failed_release_is_rolled_back_at_once() -> None:
    rollout = Rollout(phase=Phase.PREPARING)
    decision = rollout.see("good", canary_ready=False, canary_failure="DEPLOY_FAILED: no such file")
    assert decision.action is Action.ROLL_BACK
    assert decision.reason == "the release cannot start: DEPLOY_FAILED: no such file"
    assert Rollout(phase=Phase.PREPARING).see("good", canary_ready=False).action is Action.WAIT


def test_insufficient_exposure_holds_the_step() -> None:
    rollout = Rollout(phase=Phase.STEPPING)
    rollout.see("tiny", 120)
    decision = rollout.see("tiny", 120)
    assert decision.action is Action.WAIT
    assert rollout.state.phase is Phase.HOLDING
    assert "60 of 200 viewers" in decision.reason


@pytest.mark.parametrize("phase", [Phase.STEPPING, Phase.HOLDING, Phase.PAUSED])
@pytest.mark.parametrize("kind", ["harm", "errors", "alert"])
def test_harm_or_breach_rolls_back_in_every_ramping_phase(phase: Phase, kind: str) -> None:
    rollout = Rollout(phase=phase)
    decision = rollout.see(kind, 0.0)
    assert decision.action is Action.ROLL_BACK
    assert rollout.state.weights == {Arm.STABLE: 9_800, Arm.CANARY: 0, Arm.HOLDOUT: 200}
    assert any(character.isdigit() for character in decision.reason) or kind == "alert"


@pytest.mark.parametrize("phase", [Phase.PREPARING, Phase.SHADOW, Phase.PROMOTING, Phase.PROMOTED])
def test_guardrail_breach_rolls_back_outside_of_the_ramp(phase: Phase) -> None:
    assert Rollout(phase=phase).see("errors").action is Action.ROLL_BACK


def test_breach_in_a_stale_snapshot_rolls_back() -> None:
    rollout = Rollout(phase=Phase.STEPPING)
    rollout.see("few")
    assert rollout.see("errors", time=rollout.now - 500).action is Action.ROLL_BACK


def test_prometheus_outage_holds_the_rollout() -> None:
    rollout = Rollout(phase=Phase.STEPPING, step=1)
    weights = rollout.state.weights
    for _ in range(9):
        decision = rollout.see("nothing", 30)
        assert decision.action in (Action.HOLD, Action.WAIT)
        assert "telemetry down" in decision.reason
        assert rollout.state.weights == weights
    assert rollout.see("nothing", 30).action is Action.PAUSE, "after the policy's 300 s"
    assert rollout.state.weights == weights


def test_missing_evidence_is_telemetry_down() -> None:
    rollout = Rollout(phase=Phase.STEPPING)
    assert decide(POLICY_, rollout.state, None, rollout.now).action is Action.HOLD


def test_time_without_telemetry_does_not_count_towards_a_hold() -> None:
    rollout = Rollout(phase=Phase.STEPPING)
    rollout.see("nothing", 100)
    assert rollout.see("few", 30).action is Action.CARRY_ON
    assert rollout.see("few", 30).action is Action.STEP


@pytest.mark.parametrize("action", ["hold", "pause", "rollback"])
def test_deadline_triggers_the_action_of_the_policy(action: str) -> None:
    policy = parse_policy(POLICY.replace("telemetry_down: {after_s: 300, action: pause}",
                                         f"telemetry_down: {{after_s: 60, action: {action}}}"), source="t")  # fmt: skip
    rollout = Rollout(policy, Phase.STEPPING)
    rollout.see("silent", 59)
    expected = {"hold": Action.WAIT, "pause": Action.PAUSE, "rollback": Action.ROLL_BACK}[action]
    assert rollout.see("silent", 60).action is expected


def test_undecided_evidence_at_the_last_step_pauses() -> None:
    rollout = Rollout(phase=Phase.STEPPING, step=2)
    seen = [rollout.see("few", 100).action for _ in range(12)]
    assert Action.PROMOTE not in seen
    assert rollout.state.phase is Phase.PAUSED


def test_release_that_is_never_ready_is_rolled_back() -> None:
    rollout = Rollout()
    rollout.see("not_ready")
    seen = [rollout.see("not_ready", 100).action for _ in range(4)]
    assert Action.ROLL_BACK in seen
    assert "not ready" in rollout.state.reason


def test_shadow_phase_waits_for_its_duration_and_requests() -> None:
    rollout = Rollout(parse_policy(POLICY + SHADOW, source="t"))
    rollout.see("good")
    assert rollout.see("good").action is Action.SHADOW
    assert rollout.state.shadow_bp == 500
    assert rollout.state.weights[Arm.CANARY] == 0
    assert rollout.see("good", 100, shadow_requests=99).action is Action.WAIT
    assert rollout.see("good", 1).action is Action.STEP
    assert rollout.state.shadow_bp == 0


def test_forward_clock_jump_ends_neither_hold_nor_deadline() -> None:
    rollout = Rollout(phase=Phase.STEPPING)
    patient = parse_policy(POLICY.replace("hold_s: 60", "hold_s: 3600"), source="t")
    rollout.policy = patient
    assert rollout.see("few", 86_400 * 365).action is Action.WAIT
    assert rollout.see("few", 10).action is Action.WAIT
    silent = Rollout(phase=Phase.STEPPING)
    assert silent.see("nothing", 86_400 * 365).action is Action.HOLD
    assert silent.see("nothing", 10).action is Action.WAIT


def test_backward_clock_jump_does_not_invalidate_evidence() -> None:
    rollout = Rollout(phase=Phase.STEPPING)
    rollout.see("few")
    rollout.see("few", -7_200)
    assert "telemetry" not in rollout.see("few", 30).reason


@pytest.mark.parametrize("changes", [{"time": 9_000.0}, {"time": 99_999.0}, {"release": "f" * 64}])
def test_stale_future_or_foreign_evidence_holds(changes: dict[str, object]) -> None:
    rollout = Rollout(phase=Phase.STEPPING)
    assert rollout.see("good", **changes).action is Action.HOLD


def test_out_of_order_evidence_does_not_promote() -> None:
    rollout = Rollout(phase=Phase.STEPPING, step=2)
    rollout.see("few", 100)
    decision = rollout.see("good", 1, time=rollout.now - 50)
    assert decision.action is not Action.PROMOTE
    assert "newer evidence" in decision.reason


def test_commands_pause_resume_or_roll_back() -> None:
    rollout = Rollout(phase=Phase.STEPPING)
    rollout.ask("pause")
    assert rollout.see("good").reason == "paused by ada"
    assert rollout.see("good", 1_000).action is Action.WAIT
    rollout.ask("resume")
    assert rollout.see("good").action is Action.RESUME
    rollout.ask("rollback")
    assert rollout.see("good").action is Action.ROLL_BACK


def test_promote_without_evidence_requires_force() -> None:
    for kind, force, action in (
        ("good", False, Action.PROMOTE), ("nothing", False, Action.REFUSE), ("nothing", True, Action.PROMOTE),
        ("few", False, Action.REFUSE), ("harm", True, Action.ROLL_BACK), ("errors", True, Action.ROLL_BACK),
    ):  # fmt: skip
        rollout = Rollout(phase=Phase.STEPPING)
        rollout.ask("promote", force=force)
        decision = rollout.see(kind)
        assert decision.action is action, kind
        if force and action is Action.PROMOTE:
            assert "forced despite telemetry down" in decision.reason


def test_repeated_command_id_has_no_effect() -> None:
    rollout = Rollout(phase=Phase.STEPPING)
    rollout.ask("pause", id_="x")
    rollout.see("few")
    rollout.ask("resume")
    rollout.see("few")
    rollout.ask("pause", id_="x")
    assert rollout.state.command is None
    rollout.ask("rollback")
    rollout.ask("promote", force=True)
    assert rollout.see("good").action is Action.ROLL_BACK


def test_inapplicable_command_is_rejected_once() -> None:
    rollout = Rollout(phase=Phase.STEPPING)
    rollout.ask("resume")
    assert rollout.see("few").reason == "resume by ada rejected: the rollout is stepping"
    assert rollout.state.command is None


def test_rollback_is_final() -> None:
    rollout = Rollout(phase=Phase.STEPPING)
    rollout.see("errors")
    assert rollout.see("good", weights={Arm.CANARY: 100}).action is Action.WAIT
    assert rollout.see("good", weights={Arm.CANARY: 0}).action is Action.COMPLETE_ROLLBACK
    rollout.ask("promote", force=True)
    assert rollout.see("good").action is Action.REFUSE
    assert rollout.state.phase is Phase.ROLLED_BACK
    assert "error_ratio" in rollout.state.reason


def test_promoted_release_can_be_rolled_back_until_retired() -> None:
    rollout = Rollout(phase=Phase.PROMOTED)
    rollout.ask("rollback")
    assert rollout.see("good").action is Action.ROLL_BACK
    kept = Rollout(phase=Phase.PROMOTED)
    actions = [kept.see("good", 100).action for _ in range(7)]
    assert Action.RETIRE in actions
    kept.ask("rollback")
    assert kept.see("good").action is Action.REFUSE
    assert kept.state.warm_releases == {RELEASE}


def test_start_after_a_rollback_requires_force_or_the_cooldown() -> None:
    rollout = Rollout(phase=Phase.STEPPING)
    rollout.see("errors")
    rollout.see("good", weights={Arm.CANARY: 0})
    ended, later = rollout.state, rollout.now + 1e6

    def again(release: str, now: float, *, force: bool = False) -> RolloutState:
        return start_state(POLICY_, rollout_id="n", canary_release=release, stable_release=STABLE, now=now,
                     previous=ended, force=force)  # fmt: skip

    with pytest.raises(RolloutError, match=r"was rolled back .*error_ratio.* --force"):
        again(RELEASE, later)
    with pytest.raises(RolloutError, match="cooldown"):
        again("d" * 64, rollout.now + 10)
    with pytest.raises(RolloutError, match="cooldown"):
        again("d" * 64, rollout.now - 1e9)
    assert again("d" * 64, later).phase is Phase.PENDING
    assert again(RELEASE, rollout.now, force=True).forced


def test_start_rejects_an_active_rollout_or_the_live_release() -> None:
    rollout = Rollout(phase=Phase.STEPPING)
    with pytest.raises(RolloutError, match="is stepping"):
        start_state(
            POLICY_, rollout_id="n", canary_release="d" * 64, stable_release=STABLE, now=0, previous=rollout.state,
            force=True,
        )  # fmt: skip
    with pytest.raises(RolloutError, match="is already live"):
        start_state(POLICY_, rollout_id="n", canary_release=STABLE, stable_release=STABLE, now=0)


def test_edited_policy_does_not_lower_the_ramp() -> None:
    rollout = Rollout(phase=Phase.STEPPING, step=2)
    rollout.policy = parse_policy(
        POLICY.replace("  - {weight_percent: 50, hold_s: 60, minimum_viewers: 200, minimum_impressions: 1000}\n", ""),
        source="shorter",
    )
    assert rollout.see("few", 100).action in (Action.HOLD, Action.WAIT)
    assert rollout.state.canary_bp == 5_000


@pytest.mark.parametrize("seed", range(4))
def test_random_histories_keep_every_invariant(seed: int) -> None:
    histories = HistoryGenerator(seed)
    for _ in range(400):
        histories.play(40)
    rare = {Action.RESUME, Action.RETIRE}
    assert {a for a, n in histories.counts.items() if n} >= set(Action) - rare


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(KINDS)),
            st.sampled_from(["", "pause", "resume", "promote", "rollback"]),
            st.floats(-1e4, 1e4),
            st.booleans(),
        ),
        max_size=40,
    )
)
def test_any_history_keeps_the_invariants_across_reloads(
    events: list[tuple[str, str, float, bool]],
) -> None:
    """Hypothesis searches for the shortest history that breaks an invariant; each event reloads the state from JSON."""
    rollout = Rollout()
    was_rolled_back = False
    for kind, verb, seconds, force in events:
        if verb:
            rollout.ask(verb, force=force)
        rollout.state = RolloutState.model_validate_json(rollout.state.model_dump_json())
        before = rollout.state
        decision = rollout.see(kind, seconds)
        assert sum(rollout.state.weights.values()) == 10_000
        assert decision.reason
        if decision.action is Action.PROMOTE and not (before.command and before.command.force):
            assert kind in ("good", "foreign_alert", "not_ready")
        was_rolled_back |= rollout.state.phase in (Phase.ROLLING_BACK, Phase.ROLLED_BACK)
        assert not was_rolled_back or rollout.state.weights[Arm.CANARY] == 0
