"""Why: scenes make ReleaseRollouts and wait for what becomes of them; how both is written stands here once."""

from __future__ import annotations

from typing import Any, Final

from tests.cluster.conftest import Kubectl
from tests.cluster.made_rollout import rollout
from tests.e2e.waiting import until

STEPPED: Final[dict[str, Any]] = {
    "name": "e2e",
    "steps": [
        {"weight_percent": weight, "hold_s": 2, "minimum_viewers": 5, "minimum_impressions": 5} for weight in (10, 50)
    ],
    # Latency is the shared machine's here, late stages are too, and parity is another scene's.
    "guardrails": {"p99_ms": None, "parity_mismatches": None, "error_ratio": {"maximum": 0.5}},
    "outcomes": [{"name": "long_watch_rate", "margin": 0.25, "minimum_viewers": 50}],
    "cooldown_s": 0,
    "retention_s": 3600,
}  # fmt: skip
"""Two quick steps; the release before stays warm."""
HELD: Final[dict[str, Any]] = {**STEPPED, "steps": [{"weight_percent": 50, "hold_s": 3600}]}
"""Stays at its first step."""
STEP_S: Final = 120.0


def begin(kubectl: Kubectl, name: str, release: str, policy: dict[str, Any] | None = STEPPED, **spec: Any) -> None:
    """Make a ReleaseRollout over the RayService, or over ``backend``; with ``policyRef`` there is no policy."""
    kubectl.apply(rollout(name, release, policy=policy, **spec))


def status(kubectl: Kubectl, name: str) -> dict[str, Any]:
    """What the operator wrote."""
    return dict(kubectl.read(name).get("status") or {})


def phase(kubectl: Kubectl, name: str) -> str:
    """Of a rollout; empty before the operator has seen it."""
    return str(status(kubectl, name).get("phase", ""))


def until_phase(kubectl: Kubectl, name: str, *wanted: str, within_s: float = STEP_S) -> float:
    """Wait for a phase, and for the traffic to be as recorded. Returns the seconds that it took."""

    def holds() -> bool:
        seen = status(kubectl, name)
        ready = any(one["type"] == "Ready" and one["status"] == "True" for one in seen.get("conditions", ()))
        return seen.get("phase") in wanted and ready

    def told() -> str:
        seen = status(kubectl, name)
        return f"{seen.get('phase')}: {seen.get('reason')}; {seen.get('waitsFor')}; {seen.get('conditions')}"

    return until(f"rollout {name} is {' or '.join(wanted)}", holds, within_s, told)
