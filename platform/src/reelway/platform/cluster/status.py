"""Why: a status has to be read at a glance and waited for by ``kubectl``; all of that is drawn from what is recorded.

Pure. Draws phase, weight, verdict, sentences and conditions; refuses to judge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from reelway.platform.cluster.resources import (
    EVIDENCE_LIMIT,
    HISTORY_LIMIT,
    Condition,
    EvidenceSummary,
    ReleaseRolloutStatus,
    Resource,
)
from reelway.platform.rollout.records import HistoryEntry, Sighting
from reelway.platform.rollout.series import SHORT_RELEASE
from reelway.platform.rollout.state import Phase, RolloutState

WAITING: Final = "Waiting"
REFUSED: Final = "Refused"
_WORST_FIRST: Final = ("bad", "telemetry_down", "insufficient", "ok")
_DECISIVE: Final = frozenset({"promote", "roll_back"})


def drawn(resource: Resource, status: ReleaseRolloutStatus, now: float) -> ReleaseRolloutStatus:
    """``status`` with everything that follows from its state, policy, history and sighting drawn anew."""
    state, policy, sighting = status.state, status.policy, status.sighting
    assert state is not None, "a rollout that has begun"
    assert policy is not None, "it is judged by one"
    evidence = _evidence(status)
    return status.model_copy(
        update={
            "observed_generation": resource.generation,
            "phase": phase_word(state.phase),
            "release": state.canary_release[:SHORT_RELEASE],
            "step": f"{state.step + 1} of {len(policy.steps)}",
            "weight": f"{state.canary_bp / 100:g} %",
            "weights": {arm.value: points for arm, points in state.weights.items()},
            "verdict": _verdict(evidence),
            "reason": state.reason,
            "waits_for": sighting.reason if sighting and state.active and sighting.action in ("wait", "hold") else "",
            "evidence": _summary(evidence),
            "conditions": _since(status.conditions, _conditions(state, sighting), resource.generation, now),
            "history": _bounded(status.history),
        }
    )


def not_begun(resource: Resource, phase: str, reason: str, now: float) -> ReleaseRolloutStatus:
    """The status of a rollout that waits for its turn or was refused."""
    progressing = ("Progressing", "False", phase, reason)
    conditions = _since(resource.status.conditions, (progressing,), resource.generation, now)
    return ReleaseRolloutStatus(
        observed_generation=resource.generation,
        version=resource.status.version,
        phase=phase,
        release=resource.spec.release[:SHORT_RELEASE],
        reason=reason,
        conditions=conditions,
    )


def phase_word(phase: Phase) -> str:
    """``rolled_back`` -> ``RolledBack``."""
    return phase.value.title().replace("_", "")


_AT_REST: Final = frozenset({phase_word(Phase.PROMOTED), phase_word(Phase.ROLLED_BACK), REFUSED})


def may_move_traffic(status: Mapping[str, Any]) -> bool:
    """Whether a rollout may move anybody, by its status as the API server has it.

    One that is promoted may again, when its old release is still warm and it is taken back: its phase then is another.
    """
    return not status.get("supersededBy") and status.get("phase") not in _AT_REST


def _conditions(state: RolloutState, sighting: Sighting | None) -> tuple[tuple[str, str, str, str], ...]:
    word = phase_word(state.phase)
    moves = state.active and state.phase is not Phase.PAUSED
    ready, why, detail = "Unknown", "NotLooked", "nobody has looked at the traffic yet"
    if sighting is not None:
        reached = bool(sighting.traffic.get("reached"))
        ready, why = ("True", "TrafficAsRecorded") if reached else ("False", "TrafficNotYetAsRecorded")
        detail = str(sighting.traffic.get("trouble") or sighting.traffic.get("detail") or "")
    return (
        ("Ready", ready, why, detail),
        ("Progressing", _truth(moves), word, state.reason),
        ("Promoted", _truth(state.phase is Phase.PROMOTED), word, state.reason),
        ("RolledBack", _truth(state.phase is Phase.ROLLED_BACK), word, state.reason),
    )


def _since(
    before: Sequence[Condition], wanted: Sequence[tuple[str, str, str, str]], generation: int, now: float
) -> tuple[Condition, ...]:
    """Conditions that remember when they last changed."""
    known = {condition.type: condition for condition in before}
    made = []
    for kind, status, reason, message in wanted:
        old = known.get(kind)
        since = old.last_transition_time if old and old.status == status else stamp(now)
        made.append(Condition.model_validate({
            "type": kind, "status": status, "reason": reason, "message": message, "last_transition_time": since,
            "observed_generation": generation,
        }))  # fmt: skip
    return tuple(made)


def stamp(now: float) -> str:
    """Unix seconds as Kubernetes writes a time."""
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _evidence(status: ReleaseRolloutStatus) -> Mapping[str, Any]:
    """What the end was decided on; before the end, what the last look found."""
    state = status.state
    if state is not None and (not state.active or state.phase in (Phase.PROMOTING, Phase.ROLLING_BACK)):
        for entry in reversed(status.history):
            if entry.action in _DECISIVE and entry.evidence:
                return entry.evidence
    return status.sighting.evidence if status.sighting else {}


def _verdict(evidence: Mapping[str, Any]) -> str:
    parts = [*evidence.get("guardrails", ()), *evidence.get("outcomes", ())]
    states = {str(part.get("state")) for part in parts}
    return next((word for word in _WORST_FIRST if word in states), "")


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


def _bounded(history: Sequence[HistoryEntry]) -> tuple[HistoryEntry, ...]:
    """The newest entries; older ones without the evidence, but for those that ended the ramp."""
    kept = list(history[-HISTORY_LIMIT:])
    older = kept[:-EVIDENCE_LIMIT]
    return tuple(
        entry if entry.action in _DECISIVE or not entry.evidence else entry.model_copy(update={"evidence": {}})
        for entry in older
    ) + tuple(kept[-EVIDENCE_LIMIT:])


def _truth(value: bool) -> str:
    return "True" if value else "False"
