"""Simulated rollouts that lose their telemetry for five minutes, through the real ``decide`` and ``advance``.

``snapshot_of`` converts one rollout of the array code into evidence for the real code.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from tests.support.rollout.canary_population import Population
from tests.support.rollout.canary_simulation import (
    GROUPS,
    PROMOTED,
    ROLLED_BACK,
    RUNNING,
    ArmSums,
    Scenario,
    Simulation,
    reconcile_times,
)

from reelway.platform.contracts.events import Arm
from reelway.platform.rollout.decision import Action, advance, decide, start_state
from reelway.platform.rollout.evidence import (
    ArmStatistics,
    EvidenceSnapshot,
    EvidenceState,
    GuardrailReading,
    MetricEvidence,
)
from reelway.platform.rollout.policy import RolloutPolicy
from reelway.platform.rollout.state import Phase, RolloutState
from reelway.platform.rollout.suspicion import Audience, GroupWeights

_OK = EvidenceState.OK
_HEALTHY = {
    "error_ratio": GuardrailReading(_OK, 0, 10_000), "empty_slate_ratio": GuardrailReading(_OK, 0, 10_000),
    "p99_ms": GuardrailReading(_OK, trials=10_000, value=60.0), "parity_mismatches": GuardrailReading(_OK, 0, 1_000),
}  # fmt: skip


def statistics_of(arm: ArmSums, rollout: int) -> list[ArmStatistics]:
    """Returns the statistics of one arm of one rollout, one entry per test of the policy."""
    columns = [column[rollout] for column in (*arm.of_tests(), *arm.idle_of_tests()[3:])]
    impressions = float(arm.impressions[rollout])
    return [
        ArmStatistics(float(v[0]), impressions, *(float(s) for s in v[1:])) for v in zip(*columns, strict=True)
    ]  # fmt: skip


def snapshot_of(simulation: Simulation, rollout: int, now: float) -> EvidenceSnapshot:
    """Returns the evidence about this rollout at a time."""
    tests = simulation.scenario.policy.tests
    stable, canary = (statistics_of(arm, rollout) for arm in (simulation.stable, simulation.canary))
    metrics = {(metric.name, part): MetricEvidence(_OK, stable[i], canary[i]) for i, (metric, part) in enumerate(tests)}
    audiences = {
        arm: _audience_of(sums, rollout)
        for arm, sums in ((Arm.STABLE, simulation.stable), (Arm.CANARY, simulation.canary))
    }
    return EvidenceSnapshot(now, "c", metrics, _HEALTHY, canary_ready=True, audiences=audiences)  # type: ignore[arg-type]


def _audience_of(arm: ArmSums, rollout: int) -> Audience:
    every = arm.audience()
    groups = {
        name: GroupWeights(*(float(sums[rollout]) for sums in getattr(every, name)))
        for name in ("all", *GROUPS, "evidence", "idle")
    }  # type: ignore[index]
    return Audience(float(arm.arrived[rollout]), **groups)


def begin(policy: RolloutPolicy, step: int, held_s: float, now: float) -> RolloutState:
    """Returns the state of a rollout that has been at ``step`` for ``held_s``."""
    fresh = start_state(policy, rollout_id="r", canary_release="c", stable_release="s", now=now)
    points = policy.steps[step].weight_bp
    return fresh.model_copy(
        update={"phase": Phase.STEPPING, "step": step, "canary_bp": points, "phase_s": held_s, "tick_at": now}
    )


def play_outages(policy: RolloutPolicy, same: Population, rollouts: int) -> tuple[int, int, int, int]:
    """Counts promotions, rollbacks, rollouts whose weights changed, and rollouts that held during the outage.

    Half of the rollouts are A/A, and half have a release with a 10 % lower long-watch rate. Missing telemetry must
    neither promote nor roll back either of them.
    """
    rng = np.random.default_rng(11)
    worse = Population(3, {"long_watch_rate": 0.9})
    counts = np.zeros(4, dtype=int)
    for population, share in ((same, rollouts - rollouts // 2), (worse, rollouts // 2)):
        done = 0
        while done < share:
            until = int(rng.integers(3, 70))
            scenario = Scenario(
                policy, same, population, 3_000 if population is same else 300, reconcile_times(60, 60 * until, 60, 0)
            )
            simulation = Simulation(scenario, 40, rng).run()
            for rollout in np.flatnonzero(simulation.outcome == RUNNING)[: share - done]:
                counts += _outage(policy, simulation, int(rollout), 60.0 * until)
                done += 1
    return int(counts[0]), int(counts[1]), int(counts[2]), int(counts[3])


def _outage(policy: RolloutPolicy, simulation: Simulation, rollout: int, now: float) -> np.ndarray:
    """Plays five minutes of reconciles, 10 s apart, with no evidence, empty evidence or one stale snapshot."""
    state = begin(policy, int(simulation.step[rollout]), float(simulation.held_s[rollout]), now)
    before, old = state.weights, snapshot_of(simulation, rollout, now - policy.evidence_max_age_s - 1)
    stale_metrics = {key: MetricEvidence(_OK, metric.stable, metric.stable) for key, metric in old.metrics.items()}
    stale = replace(old, metrics=stale_metrics)
    promoted = rolled_back = moved = held = 0
    for tick in range(1, 31):
        evidence = (None, EvidenceSnapshot(now + 10 * tick, "c"), stale)[rollout % 3]
        decision = decide(policy, state, evidence, now + 10 * tick)
        state = advance(state, decision, policy, now + 10 * tick)
        promoted += decision.action in (Action.PROMOTE, Action.STEP)
        rolled_back += decision.action is Action.ROLL_BACK
        moved |= state.weights != before
        held |= decision.action is Action.HOLD and "telemetry down" in decision.reason
    return np.array([promoted, rolled_back, int(moved), int(held)])


def play_both(simulation: Simulation, chosen: list[int]) -> list[tuple[int, int, int]]:
    """Runs the real code beside the array code. Returns differences as (rollout, reconcile, array code's outcome)."""
    policy = simulation.scenario.policy
    states = {rollout: begin(policy, 0, 0.0, 0.0) for rollout in chosen}
    differences: list[tuple[int, int, int]] = []

    def compare(index: int, arrays: Simulation) -> None:
        now = float(arrays.scenario.reconciles_s[index])
        for rollout, state in states.items():
            if state.phase in (Phase.PROMOTING, Phase.ROLLING_BACK, Phase.PAUSED):
                continue
            decision = decide(policy, state, snapshot_of(arrays, rollout, now), now)
            states[rollout] = after = advance(state, decision, policy, now)
            expected = {PROMOTED: Phase.PROMOTING, ROLLED_BACK: Phase.ROLLING_BACK}.get(int(arrays.outcome[rollout]))
            if (expected is not None and after.phase is not expected) or (
                arrays.outcome[rollout] == RUNNING
                and (after.step != arrays.step[rollout] or after.phase not in (Phase.STEPPING, Phase.HOLDING))
            ):
                differences.append((rollout, index, int(arrays.outcome[rollout])))

    simulation.scenario.on_reconcile = compare
    simulation.run()
    return differences
