"""Why: what the controller asks for evidence and alerts, whatever answers: Prometheus, a direct scrape, Alertmanager.

The interface only; ``sources`` implements it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from reelway.platform.rollout.alerts import KnownAlert
from reelway.platform.rollout.evidence import EvidenceSnapshot
from reelway.platform.rollout.policy import RolloutPolicy
from reelway.platform.rollout.state import RolloutState


class EvidenceSource(Protocol):
    """Where outcome statistics and guardrails come from."""

    def fetch(self, policy: RolloutPolicy, state: RolloutState, now: float) -> EvidenceSnapshot:
        """Metrics, guardrails and mirrored requests of one rollout; alerts, weights and readiness are not its part.

        Raises nothing: what cannot be heard is ``telemetry_down``, by name and reason.
        """
        ...


class AlertSource(Protocol):
    """Where firing alerts can be looked up, besides being delivered."""

    def poll(self) -> Sequence[KnownAlert]:
        """All alerts with a release label. Raises RolloutError: it could not be asked."""
        ...
