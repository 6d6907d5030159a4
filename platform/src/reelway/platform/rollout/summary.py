"""Why: what a decision was made on has to be readable later, by people and programs that were not there.

One shape for ``HistoryEntry.evidence`` and ``Sighting.evidence``; whatever draws evidence draws it from this and not
from the assessment. Refuses to judge: every word and number in it was judged before. Everything is JSON as it stands;
what has no number (NaN, infinite) is null.

Keys, which stay:

- ``release``: the canary's id; ``time``: of the evidence, Unix seconds; ``age_s``: how old it was, null when not asked;
- ``exposure``: ``{"viewers", "impressions"}`` of the canary since the rollout began;
- ``outcomes``: one per (metric, slice) in the policy's order, each with
  ``name``, ``slice``, ``label``, ``finding`` (harm_established, harm_excluded, undecided, insufficient,
  telemetry_down), ``state`` (ok, bad, insufficient, telemetry_down), ``canary`` and ``stable`` (the metric itself),
  ``harm`` (relative to stable, positive is worse), ``low`` and ``high`` (bounds of the harm that hold at any time),
  ``margin``, ``viewers`` (``{"canary", "stable"}``), ``required`` (its harm must be excluded before promotion),
  ``lower_is_better``, ``sentence``;
- ``guardrails``: one per guardrail that is on, each with ``name``, ``state``, ``sentence``;
- ``shadow_requests``: mirrored requests that were compared;
- ``weights``: basis points by arm as the routers report them, null when they could not be asked;
- ``ready``: whether the canary's stages all run, null when nobody knows.
"""

from __future__ import annotations

import math
from typing import Any

from reelway.platform.rollout.assessment import Assessment, OutcomeVerdict
from reelway.platform.rollout.evidence import EvidenceSnapshot


def summary_of(assessment: Assessment, snapshot: EvidenceSnapshot, now: float | None = None) -> dict[str, Any]:
    """The evidence of one look as JSON; the keys are in the module's docstring.

    Args:
        now: Unix seconds; gives ``age_s``.
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
        "shadow_requests": snapshot.shadow_requests,
        "weights": None if snapshot.weights is None else {arm.value: bp for arm, bp in snapshot.weights.items()},
        "ready": snapshot.canary_ready,
    }


def _outcome(verdict: OutcomeVerdict) -> dict[str, Any]:
    return {
        "name": verdict.name,
        "slice": verdict.part.value,
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
