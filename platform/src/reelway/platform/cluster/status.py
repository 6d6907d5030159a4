"""Derives the readable fields of a ReleaseRollout's status from the recorded state: phase, weight, verdict, conditions.

Pure functions. ``kubectl get`` prints these fields, and ``kubectl wait`` waits for the conditions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from reelway.platform.cluster.resources import (
    ALERTS_LIMIT,
    HISTORY_LIMIT,
    MAX_ENTRIES_WITH_EVIDENCE,
    Condition,
    EvidenceSummary,
    ReleaseRolloutStatus,
    RolloutResource,
)
from reelway.platform.contracts.ids import short_id
from reelway.platform.rollout.alerts import RELEASE_LABEL, KnownAlert, names_release
from reelway.platform.rollout.records import HistoryEntry, LastReconcile
from reelway.platform.rollout.state import Phase, RolloutState

WAITING: Final = "Waiting"
REFUSED: Final = "Refused"
_WORST_FIRST: Final = ("bad", "telemetry_down", "insufficient", "ok")
_COMPARED_TRAFFIC_KEYS: Final = ("reached", "trouble", "detail", "failed", "ready", "releases", "routing")
_DECISIVE: Final = frozenset({"promote", "roll_back"})


def with_derived_fields(resource: RolloutResource, status: ReleaseRolloutStatus, now: float) -> ReleaseRolloutStatus:
    """Returns ``status`` with all fields that follow from its state, policy, history and last reconcile."""
    state, policy, last_reconcile = status.state, status.policy, status.last_reconcile
    assert state is not None, "a started rollout has a state"
    assert policy is not None, "a started rollout has a policy"
    evidence = _evidence(status)
    return status.model_copy(
        update={
            "observed_generation": resource.generation,
            "phase": phase_word(state.phase),
            "release": short_id(state.canary_release),
            "step": f"{state.step + 1} of {len(policy.steps)}",
            "weight": f"{state.canary_bp / 100:g} %",
            "weights": {arm.value: points for arm, points in state.weights.items()},
            "verdict": _verdict(evidence),
            "reason": state.reason,
            "waits_for": _waits_for(state, last_reconcile),
            "evidence": _summary(evidence),
            "conditions": _with_transition_times(
                status.conditions, _conditions(state, last_reconcile), resource.generation, now
            ),
            "history": _truncated_history(status.history),
        }
    )


def not_started(resource: RolloutResource, phase: str, reason: str, now: float) -> ReleaseRolloutStatus:
    """Returns the status of a rollout that waits or was refused."""
    progressing = ("Progressing", "False", phase, reason)
    conditions = _with_transition_times(resource.status.conditions, (progressing,), resource.generation, now)
    return ReleaseRolloutStatus(
        observed_generation=resource.generation,
        version=resource.status.version,
        phase=phase,
        release=short_id(resource.spec.release),
        reason=reason,
        conditions=conditions,
    )


def phase_word(phase: Phase) -> str:
    """Returns the phase in Kubernetes' spelling: ``rolled_back`` -> ``RolledBack``."""
    return phase.value.title().replace("_", "")


_INACTIVE_PHASES: Final = frozenset({phase_word(Phase.PROMOTED), phase_word(Phase.ROLLED_BACK), REFUSED})


def may_move_traffic(resource: RolloutResource) -> bool:
    """Returns whether a rollout has started and is not at rest.

    A promoted rollout leaves rest again if a person rolls it back while its previous release is still running.
    """
    status = resource.status
    return status.state is not None and not status.superseded_by and status.phase not in _INACTIVE_PHASES


def _waits_for(state: RolloutState, last_reconcile: LastReconcile | None) -> str:
    waits = last_reconcile is not None and state.active and last_reconcile.action in ("wait", "hold")
    return last_reconcile.reason if last_reconcile is not None and waits else ""


def _conditions(state: RolloutState, last_reconcile: LastReconcile | None) -> tuple[tuple[str, str, str, str], ...]:
    phase = phase_word(state.phase)
    moves = state.active and state.phase is not Phase.PAUSED
    ready, reason, detail = "Unknown", "NotReconciled", "the traffic has not been observed yet"
    if last_reconcile is not None:
        reached = bool(last_reconcile.traffic.get("reached"))
        ready, reason = ("True", "TrafficAsRecorded") if reached else ("False", "TrafficNotYetAsRecorded")
        detail = str(last_reconcile.traffic.get("trouble") or last_reconcile.traffic.get("detail") or "")
    return (
        ("Ready", ready, reason, detail),
        ("Progressing", _condition_status(moves), phase, state.reason),
        ("Promoted", _condition_status(state.phase is Phase.PROMOTED), phase, state.reason),
        ("RolledBack", _condition_status(state.phase is Phase.ROLLED_BACK), phase, state.reason),
    )


def _with_transition_times(
    previous: Sequence[Condition], conditions: Sequence[tuple[str, str, str, str]], generation: int, now: float
) -> tuple[Condition, ...]:
    """Returns the conditions; a condition whose status did not change keeps its transition time."""
    known = {condition.type: condition for condition in previous}
    result = []
    for kind, status, reason, message in conditions:
        old = known.get(kind)
        since = old.last_transition_time if old and old.status == status else format_time(now)
        result.append(Condition.model_validate({
            "type": kind, "status": status, "reason": reason, "message": message, "last_transition_time": since,
            "observed_generation": generation,
        }))  # fmt: skip
    return tuple(result)


def format_time(now: float) -> str:
    """Formats Unix seconds as Kubernetes does (RFC 3339, UTC)."""
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _evidence(status: ReleaseRolloutStatus) -> Mapping[str, Any]:
    """Returns the evidence of the final decision; before it, that of the last reconcile."""
    state = status.state
    if state is not None and (not state.active or state.phase in (Phase.PROMOTING, Phase.ROLLING_BACK)):
        for entry in reversed(status.history):
            if entry.action in _DECISIVE and entry.evidence:
                return entry.evidence
    return status.last_reconcile.evidence if status.last_reconcile else {}


def _verdict(evidence: Mapping[str, Any]) -> str:
    parts = [*evidence.get("guardrails", ()), *evidence.get("outcomes", ())]
    states = {str(part.get("state")) for part in parts}
    return next((verdict for verdict in _WORST_FIRST if verdict in states), "")


def _summary(evidence: Mapping[str, Any]) -> EvidenceSummary | None:
    if not evidence:
        return None
    exposure = evidence.get("exposure", {})
    return EvidenceSummary(
        viewers=exposure.get("viewers", 0),
        impressions=exposure.get("impressions", 0),
        age_s=evidence.get("age_s"),
        outcomes=tuple(str(part.get("sentence", "")) for part in evidence.get("outcomes", ())),
        guardrails=tuple(str(part.get("sentence", "")) for part in evidence.get("guardrails", ())),
    )


def _truncated_history(history: Sequence[HistoryEntry]) -> tuple[HistoryEntry, ...]:
    """Returns the newest entries. Older ones lose their evidence, except those that ended the ramp."""
    newest = list(history[-HISTORY_LIMIT:])
    older = newest[:-MAX_ENTRIES_WITH_EVIDENCE]
    return tuple(
        entry if entry.action in _DECISIVE or not entry.evidence else entry.model_copy(update={"evidence": {}})
        for entry in older
    ) + tuple(newest[-MAX_ENTRIES_WITH_EVIDENCE:])


def relevant_alerts(alerts: Iterable[KnownAlert], state: RolloutState | None) -> tuple[KnownAlert, ...]:
    """Returns the alerts to store in the status of a rollout: those received during it that name its release."""
    if state is None:
        return ()
    relevant = [
        alert
        for alert in alerts
        if alert.rollout == state.id
        and (alert.is_omission or names_release(dict(alert.labels).get(RELEASE_LABEL, ""), state.canary_release))
    ]
    newest_last = sorted(
        relevant, key=lambda alert: (alert.is_omission, alert.starts_at, alert.group_key, alert.labels)
    )
    return tuple(newest_last[-ALERTS_LIMIT:])


def same_outcome(one: LastReconcile, other: LastReconcile | None) -> bool:
    """Returns whether two reconciles had the same outcome, so that the second need not be written at once."""
    if other is None or one.action != other.action:
        return False
    return all(one.traffic.get(key) == other.traffic.get(key) for key in _COMPARED_TRAFFIC_KEYS)


def _condition_status(value: bool) -> str:
    return "True" if value else "False"
