"""Traffic target of a rollout state, and the interface of traffic backends.

``traffic_target`` is a pure function. A backend applies a target and reports the observed traffic. Applying a target is
idempotent, so a restarted controller can repeat it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from reelway.platform.contracts.events import Arm
from reelway.platform.rollout.state import Phase, RolloutState
from reelway.platform.rollout.traffic.routing import ArmRoute, RollbackMark, Routing, ShadowRoute


@dataclass(frozen=True, slots=True)
class TrafficTarget:
    """The releases that run, each as its own Serve application, and the routing of viewers."""

    routing: Routing
    releases: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TrafficObservation:
    """Traffic observed by a backend.

    ``routing`` is the routing in effect on *all* routers; None while they differ or do not respond. ``ready`` contains
    the releases whose stages all run and that the routers have open, ``failed`` those that do not start, with a reason.
    """

    routing: Routing | None = None
    releases: tuple[str, ...] = ()
    ready: frozenset[str] = frozenset()
    failed: Mapping[str, str] = field(default_factory=dict)
    failed_permanently: frozenset[str] = frozenset()
    """The releases of ``failed`` that the backend no longer tries to start."""
    detail: str = ""
    configured: Routing | None = None
    """The routing in the configuration, whether or not a router has applied it; None if it is unknown."""

    def weights(self, state: RolloutState) -> dict[Arm, int] | None:
        """Returns basis points by arm; None if the routing is unknown or belongs to another rollout.

        A routing with all traffic on this rollout's stable release counts as canary weight 0, whatever its rollout id.
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
    """Applies traffic: Ray Serve's REST API in local mode, a RayService on Kubernetes."""

    def observe(self) -> TrafficObservation:
        """Returns the observed traffic. Never raises: unknown fields are None, with the reason in ``detail``."""
        ...

    def apply(self, target: TrafficTarget) -> None:
        """Writes the target. Idempotent; returns when the target is accepted, before it is in effect.

        Raises:
            RolloutError: if the target was not accepted; nothing was changed.
        """
        ...


def marked(target: TrafficTarget, mark: RollbackMark) -> TrafficTarget:
    """Returns the target of a rollback with the mark that it is not recorded."""
    return replace(target, routing=target.routing.model_copy(update={"rollback": mark}))


def traffic_target(state: RolloutState) -> TrafficTarget:
    """Returns the traffic target for a rollout state."""
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
    return TrafficTarget(Routing(salt=state.salt, rollout=state.id, arms=arms, shadow=shadow, warm=releases), releases)
