"""Status report of a rollout: the JSON output of ``status`` and the input of every view.

Built from the stored rollout, its history and its last reconcile; the service is not queried. Weights are basis
points, durations are seconds and times are Unix times. The views convert them for display.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel, ConfigDict, Field

from reelway.platform.cli.rollout.location import ControllerStatus, ServingRecord
from reelway.platform.cli.rollout.wait import RolloutExitCode, exit_code_for
from reelway.platform.rollout.policy import Step
from reelway.platform.rollout.state import Command, Phase

if TYPE_CHECKING:
    from reelway.platform.rollout.records import HistoryEntry, LastReconcile, Rollout

ENDED_PHASES: Final = frozenset({Phase.PROMOTING, Phase.PROMOTED, Phase.ROLLING_BACK, Phase.ROLLED_BACK})
"""Phases in which the report shows the evidence of the decision instead of the last reconcile."""


class _Report(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class OutcomeReport(_Report):
    """One metric on one slice, with the keys of ``rollout.summary``."""

    name: str
    slice: str
    label: str
    finding: str
    state: str
    canary: float | None
    stable: float | None
    harm: float | None
    low: float | None
    high: float | None
    margin: float
    viewers: dict[str, int]
    required: bool
    lower_is_better: bool
    sentence: str


class GuardrailReport(_Report):
    """One guardrail, with the keys of ``rollout.summary``."""

    name: str
    state: str
    sentence: str


class SuspicionReport(_Report):
    """One comparison of the arms' audiences, with the keys of ``rollout.summary``."""

    name: str
    suspected: bool
    canary: float | None
    stable: float | None
    low: float | None
    high: float | None
    sentence: str


class EvidenceReport(_Report):
    """Evidence of one decision or reconcile, with the keys of ``rollout.summary``."""

    release: str
    time: float | None
    age_s: float | None
    exposure: dict[str, int]
    outcomes: tuple[OutcomeReport, ...]
    guardrails: tuple[GuardrailReport, ...]
    suspicions: tuple[SuspicionReport, ...]
    shadow_requests: int
    weights: dict[str, int] | None
    ready: bool | None

    @property
    def breached(self) -> bool:
        return any(guardrail.state == "bad" for guardrail in self.guardrails)

    @property
    def has_outcome_data(self) -> bool:
        """Whether any outcome metric has data. False if an alert rolled back before the evidence was read."""
        return any(outcome.finding != "telemetry_down" for outcome in self.outcomes)


class RolloutReport(_Report):
    """One rollout. ``result`` names ``exit_code``. ``step`` counts from 1; 0 is before the first step."""

    id: str
    phase: str
    result: str
    exit_code: int
    active: bool
    canary_release: str
    stable_release: str
    live_release: str
    policy: str
    step: int
    steps: tuple[Step, ...]
    shadowed: bool = Field(description="whether the policy mirrors requests before the first step")
    weights: dict[str, int]
    shadow_bp: int
    started_at: float
    changed_at: float
    phase_s: float
    warm_for_s: float | None = Field(
        description="after a promotion: seconds in which a rollback to the previous release is still possible"
    )
    forced: bool
    retired: bool
    reason: str
    waits_for: str
    command: Command | None = Field(description="pending command, not yet accepted by the controller")
    evidence: EvidenceReport | None
    evidence_entry: int | None = Field(
        description="number of the history entry with this evidence; null if the evidence is of the last reconcile"
    )
    evidence_age_s: float | None
    traffic: dict[str, Any]


class StatusReport(_Report):
    """``reelway rollout status -o json``."""

    run: str
    time: float
    serving: ServingRecord | None
    controller: ControllerStatus
    rollout: RolloutReport | None


def build_rollout_report(
    rollout: Rollout, last_reconcile: LastReconcile | None, history: Sequence[HistoryEntry], now: float
) -> RolloutReport:
    """Returns the report of one rollout at the time ``now``."""
    state, policy = rollout.state, rollout.policy
    deciding = _deciding(history) if state.phase in ENDED_PHASES else None
    observed = deciding or last_reconcile
    evidence = EvidenceReport.model_validate(observed.evidence) if observed is not None and observed.evidence else None
    evidence_at = evidence.time if evidence is not None else None
    waits = last_reconcile is not None and state.active and last_reconcile.action in ("wait", "hold")
    warm = state.phase is Phase.PROMOTED and not state.retired
    return RolloutReport(
        id=state.id,
        phase=state.phase.value,
        result=exit_code_for(state).description,
        exit_code=int(exit_code_for(state)),
        active=state.active,
        canary_release=state.canary_release,
        stable_release=state.stable_release,
        live_release=state.live_release,
        policy=policy.name,
        step=state.step + 1,
        steps=policy.steps,
        shadowed=policy.shadow is not None,
        weights={arm.value: weight for arm, weight in state.weights.items()},
        shadow_bp=state.shadow_bp,
        started_at=state.started_at,
        changed_at=state.changed_at,
        phase_s=state.phase_s,
        warm_for_s=max(0.0, policy.retention_s - state.phase_s) if warm else None,
        forced=state.forced,
        retired=state.retired,
        reason=state.reason,
        waits_for=last_reconcile.reason if last_reconcile is not None and waits else "",
        command=state.command,
        evidence=evidence,
        evidence_entry=deciding.number if deciding else None,
        evidence_age_s=None if evidence_at is None else max(0.0, now - evidence_at),
        traffic=dict(last_reconcile.traffic) if last_reconcile is not None else {},
    )


def _deciding(history: Sequence[HistoryEntry]) -> HistoryEntry | None:
    """Returns the latest entry that ended the ramp."""
    return next((entry for entry in reversed(history) if entry.action in ("promote", "roll_back")), None)


def exit_code_of(report: StatusReport) -> int:
    """Returns the exit code for ``--exit-code``; 9 if there is no rollout."""
    return report.rollout.exit_code if report.rollout else int(RolloutExitCode.REFUSED)
