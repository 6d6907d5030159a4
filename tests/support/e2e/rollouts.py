"""Creates ReleaseRollouts and waits for their phases."""

from __future__ import annotations

from typing import Any, Final

from tests.support.cluster.kubectl import Kubectl
from tests.support.cluster.rollout_manifests import rollout
from tests.support.e2e.wait_until import until

STEPPED: Final[dict[str, Any]] = {
    "name": "e2e",
    "steps": [
        {"weight_percent": weight, "hold_s": 2, "minimum_viewers": 5, "minimum_impressions": 5} for weight in (10, 50)
    ],
    # Latency depends on the shared machine, and parity has other tests.
    "guardrails": {"p99_ms": None, "parity_mismatches": None, "error_ratio": {"maximum": 0.5}},
    "outcomes": [{"name": "long_watch_rate", "margin": 0.25, "minimum_viewers": 50}],
    "cooldown_s": 0,
    "retention_s": 3600,
}  # fmt: skip
"""Policy with two quick steps; the previous release stays warm."""
HELD: Final[dict[str, Any]] = {**STEPPED, "steps": [{"weight_percent": 50, "hold_s": 3600}]}
"""Policy that stays at its first step, 50 %."""
STEP_S: Final = 120.0


def begin(kubectl: Kubectl, name: str, release: str, policy: dict[str, Any] | None = STEPPED, **spec: Any) -> None:
    """Creates a ReleaseRollout over the RayService or over ``backend``. Pass policy None with ``policyRef``."""
    kubectl.apply(rollout(name, release, policy=policy, **spec))


def status(kubectl: Kubectl, name: str) -> dict[str, Any]:
    """Status of a rollout."""
    return dict(kubectl.read(name).get("status") or {})


def phase(kubectl: Kubectl, name: str) -> str:
    """Phase of a rollout; empty before the operator has observed it."""
    return str(status(kubectl, name).get("phase", ""))


def wait_until_phase(kubectl: Kubectl, name: str, *phases: str, within_s: float = STEP_S) -> float:
    """Waits for a phase with the traffic as recorded. Returns the seconds waited."""

    def holds() -> bool:
        current = status(kubectl, name)
        ready = any(each["type"] == "Ready" and each["status"] == "True" for each in current.get("conditions", ()))
        return current.get("phase") in phases and ready

    def state() -> str:
        now = status(kubectl, name)
        return f"{now.get('phase')}: {now.get('reason')}; {now.get('waitsFor')}; {now.get('conditions')}"

    return until(f"rollout {name} is {' or '.join(phases)}", holds, within_s, state)
