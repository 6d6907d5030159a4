"""The controller's own metrics."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, generate_latest

from reelway.platform.contracts.events import Arm
from reelway.platform.contracts.ids import short_id
from reelway.platform.rollout.state import Phase, RolloutState
from reelway.platform.supervised_thread import export_failures
from reelway.platform.telemetry import counter, gauge, histogram

_TICK_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class ControllerMetrics:
    """The controller's metrics, in a registry of their own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        export_failures(registry)
        self.phase = gauge("reelway_rollout_phase", "1 for the newest rollout's phase.", ["kind"], registry)
        self.weight = gauge(
            "reelway_rollout_weight_basis_points",
            "Recorded traffic weights of the newest rollout.",
            ["arm", "release"],
            registry,
        )
        self.suspicion = gauge(
            "reelway_rollout_suspicion",
            "1 while the arms' audiences differ, so that viewers may be forged.",
            ["kind"],
            registry,
        )
        self.decisions = counter("reelway_rollout_decisions_total", "Decisions by action.", ["kind"], registry)
        self.writes = counter(
            "reelway_rollout_traffic_writes_total", "Traffic targets written, by outcome.", ["outcome"], registry
        )
        self.failures = counter(
            "reelway_rollout_failures_total",
            "Failures by kind: observe, evidence, apply, poll, alerts (they may be missing), react, tick; of the "
            "operator also serve config, admission, finalizers, rankers.",
            ["kind"], registry,
        )  # fmt: skip
        self.unrecorded_rollbacks = counter(
            "reelway_rollout_unrecorded_rollbacks_total",
            "Rollbacks that were written to the traffic before they could be recorded.", [], registry,
        )  # fmt: skip
        self.cut_off = gauge(
            "reelway_rollout_cut_off",
            "1 while this operator cannot renew its Lease and may only roll back, else 0.", [], registry,
        )  # fmt: skip
        self.webhooks = counter("reelway_rollout_webhooks_total", "Webhook deliveries.", ["outcome"], registry)
        self.tick = histogram(
            "reelway_rollout_tick_seconds", "Duration of one reconcile.", [], registry, _TICK_BUCKETS_S
        )
        self.reaction = histogram(
            "reelway_rollout_reaction_seconds", "From a known firing alert to the accepted rollback.", [], registry,
            _TICK_BUCKETS_S,
        )  # fmt: skip
        self.last_tick = gauge(
            "reelway_rollout_last_tick_timestamp_seconds", "Unix time of the last reconcile.", [], registry
        )

    def set_state(self, state: RolloutState) -> None:
        """Sets the gauges to a rollout's state."""
        for phase in Phase:
            self.phase.labels(phase.value).set(phase is state.phase)
        self.weight.clear()
        releases = {Arm.STABLE: state.stable_release, Arm.CANARY: state.canary_release, Arm.HOLDOUT: state.live_release}
        for arm, points in state.weights.items():
            self.weight.labels(arm.value, short_id(releases[arm])).set(points)

    def set_suspicions(self, suspected: Mapping[str, bool]) -> None:
        """Sets the gauges to the comparisons of the newest evidence; an empty one has no viewers to compare."""
        self.suspicion.clear()
        for name, is_suspected in suspected.items():
            self.suspicion.labels(name).set(is_suspected)

    def render(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
