"""Why: what the world should look like for a rollout's state, and the two things a backend must be able to do.

``target_of`` is pure; a backend converges to a target and says what it sees, and knows nothing of phases, policies or
evidence. Applying the same target twice changes nothing, so a controller that died may simply do it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from reelway.platform.contracts.events import Arm
from reelway.platform.rollout.state import Phase, RolloutState
from reelway.platform.rollout.traffic.routing import ArmRoute, Routing, ShadowRoute


@dataclass(frozen=True, slots=True)
class TrafficTarget:
    """Which releases run, each as an application of its own, and how routers share out the viewers."""

    routing: Routing
    releases: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TrafficObservation:
    """What a backend saw.

    ``routing`` is what *all* routers act on, None while they differ or could not be asked. ``ready`` are the releases
    whose stages all run and that the routers hold open; ``failed`` those that will not, with the reason.
    """

    routing: Routing | None = None
    releases: tuple[str, ...] = ()
    ready: frozenset[str] = frozenset()
    failed: Mapping[str, str] = field(default_factory=dict)
    gave_up: frozenset[str] = frozenset()
    """Those of ``failed`` that the backend does not try to start any more."""
    detail: str = ""

    def weights(self, state: RolloutState) -> dict[Arm, int] | None:
        """Basis points by arm as ``decide`` wants them: None when unknown or of another rollout.

        Routing between rollouts with everybody on this one's stable release counts as canary 0.
        """
        if self.routing is None:
            return None
        if self.routing.rollout == state.id:
            return {arm: self.routing.weight_of(arm) for arm in (Arm.STABLE, Arm.CANARY, Arm.HOLDOUT)}
        serves = {route.release for route in self.routing.arms if route.weight_bp}
        if serves == {state.stable_release}:
            return {Arm.STABLE: 10_000, Arm.CANARY: 0, Arm.HOLDOUT: 0}
        return None


class TrafficBackend(Protocol):
    """Where traffic is really routed: Serve's REST API here, a RayService or an InferenceService on Kubernetes."""

    def observe(self) -> TrafficObservation:
        """Look. Raises nothing: what cannot be seen is None, with the reason in ``detail``."""
        ...

    def apply(self, target: TrafficTarget) -> None:
        """Write the target. Idempotent; returns when it is accepted, not when it is reached.

        Raises:
            RolloutError: it was not accepted; nothing was changed.
        """
        ...


def target_of(state: RolloutState) -> TrafficTarget:
    """What the world should be for a rollout in this state."""
    routes = (
        ArmRoute(arm=Arm.CANARY, release=state.canary_release, weight_bp=state.canary_bp),
        ArmRoute(arm=Arm.STABLE, release=state.stable_release, weight_bp=state.weights[Arm.STABLE]),
        ArmRoute(arm=Arm.HOLDOUT, release=state.live_release, weight_bp=state.holdout_bp),
    )
    if state.retired:  # the release is the new stable
        live = ArmRoute(arm=Arm.STABLE, release=state.canary_release, weight_bp=state.canary_bp)
        routes = (live, live.model_copy(update={"weight_bp": 0}), routes[2])
    shadow = None
    if state.phase is Phase.SHADOW and state.shadow_bp:
        shadow = ShadowRoute(release=state.canary_release, weight_bp=state.shadow_bp)
    releases = tuple(sorted(state.deployed_releases))
    arms = tuple(route for route in routes if route.weight_bp)
    return TrafficTarget(Routing(salt=state.id, rollout=state.id, arms=arms, shadow=shadow, warm=releases), releases)
