"""JSON summary of the evidence behind a decision, for ``HistoryEntry.evidence`` and ``LastReconcile.evidence``.

All views of evidence are drawn from this summary. Numbers that are NaN or infinite are null. The keys are a stable
contract:

- ``release``: the canary's id; ``time``: Unix seconds of the evidence; ``age_s``: its age, null if not given;
- ``exposure``: ``{"viewers", "impressions"}`` of the canary since the start of the rollout;
- ``outcomes``: one per (metric, slice) in the policy's order, each with
  ``name``, ``slice``, ``label``, ``finding`` (harm_established, harm_excluded, undecided, insufficient,
  telemetry_down), ``state`` (ok, bad, insufficient, telemetry_down), ``canary`` and ``stable`` (the metric itself),
  ``harm`` (relative to stable, positive is worse), ``low`` and ``high`` (confidence sequence of the harm), ``margin``,
  ``viewers`` (``{"canary", "stable"}``), ``required`` (promotion requires that its harm is excluded),
  ``lower_is_better``, ``sentence``;
- ``guardrails``: one per enabled guardrail, each with ``name``, ``state``, ``sentence``;
- ``suspicions``: one per comparison of the arms' audiences, each with ``name`` (new_viewers, silent_viewers,
  saturated_viewers, idle_viewers), ``suspected``, ``canary`` and ``stable`` (weighted numbers, or shares), ``low`` and
  ``high`` (confidence sequence of their difference), ``sentence``; empty without viewers;
- ``shadow_requests``: mirrored requests that were compared;
- ``weights``: basis points by arm as reported by the routers, null if unknown;
- ``ready``: whether all stages of the canary run, null if unknown.
"""

from __future__ import annotations

import math
from typing import Any

from reelway.platform.rollout.assessment import Assessment, OutcomeVerdict
from reelway.platform.rollout.evidence import EvidenceSnapshot


def summarise_evidence(assessment: Assessment, snapshot: EvidenceSnapshot, now: float | None = None) -> dict[str, Any]:
    """Returns the evidence of one reconcile as JSON, with the keys of the module's docstring.

    Args:
        now: Unix seconds; required for ``age_s``.
    """
    return {
        "release": snapshot.release,
        "time": _number(snapshot.time),
        "age_s": None if now is None else _number(now - snapshot.time),
        "exposure": {"viewers": assessment.canary_viewers, "impressions": assessment.canary_impressions},
        "outcomes": [_outcome(verdict) for verdict in assessment.outcomes],
        "guardrails": [
            {"name": verdict.name, "state": verdict.state.value, "sentence": verdict.sentence}
            for verdict in assessment.guardrails
        ],
        "suspicions": [
            {
                "name": verdict.name,
                "suspected": verdict.suspected,
                "canary": _number(verdict.canary),
                "stable": _number(verdict.stable),
                "low": _number(verdict.low),
                "high": _number(verdict.high),
                "sentence": verdict.sentence,
            }
            for verdict in assessment.suspicions
        ],
        "shadow_requests": snapshot.shadow_requests,
        "weights": None if snapshot.weights is None else {arm.value: bp for arm, bp in snapshot.weights.items()},
        "ready": snapshot.canary_ready,
    }


def _outcome(verdict: OutcomeVerdict) -> dict[str, Any]:
    return {
        "name": verdict.name,
        "slice": verdict.slice_.value,
        "label": verdict.label,
        "finding": verdict.finding,
        "state": verdict.state.value,
        "canary": _number(verdict.canary),
        "stable": _number(verdict.stable),
        "harm": _number(verdict.harm),
        "low": _number(verdict.harm_low),
        "high": _number(verdict.harm_high),
        "margin": verdict.margin,
        "viewers": {"canary": verdict.canary_viewers, "stable": verdict.stable_viewers},
        "required": verdict.required,
        "lower_is_better": verdict.lower_is_better,
        "sentence": verdict.sentence,
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
