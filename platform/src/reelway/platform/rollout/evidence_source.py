"""Interfaces of evidence and alert sources; ``sources`` implements them.

The implementations read Prometheus, the services' metrics directly, or Alertmanager.
"""

from __future__ import annotations

from typing import Protocol

from reelway.platform.rollout.alerts import PolledAlerts, Relevance
from reelway.platform.rollout.evidence import EvidenceSnapshot
from reelway.platform.rollout.policy import RolloutPolicy
from reelway.platform.rollout.state import RolloutState


class EvidenceSource(Protocol):
    """Source of outcome statistics and guardrail readings."""

    def fetch(self, policy: RolloutPolicy, state: RolloutState, now: float) -> EvidenceSnapshot:
        """Returns metrics, guardrails and mirrored requests of one rollout, without alerts, weights and readiness.

        Never raises: unavailable data is ``telemetry_down`` with a reason.
        """
        ...


class AlertSource(Protocol):
    """Source of alerts that can be polled, in addition to the webhook."""

    def poll(self, is_relevant: Relevance) -> PolledAlerts:
        """Returns all relevant alerts, or those before the end of an answer that was cut.

        Raises RolloutError if the source is not reachable.
        """
        ...
