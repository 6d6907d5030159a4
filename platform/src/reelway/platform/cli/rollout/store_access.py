"""Access to the rollout store and the controller's status, for run directories and for clusters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reelway.platform.cli.rollout.location import (
    CONTROLLER_TIMEOUT_S,
    ClusterNamespace,
    ControllerStatus,
    RolloutLocation,
    controller_record,
    process_alive,
)
from reelway.platform.errors import RolloutError

if TYPE_CHECKING:
    from reelway.platform.rollout.records import LastReconcile, Rollout, RolloutStore


def open_store(run: RolloutLocation) -> RolloutStore:
    """Opens the rollout store of a run directory or a namespace.

    Raises:
        ConfigError: if the cluster is not reachable.
    """
    if isinstance(run, ClusterNamespace):
        from reelway.platform.cli.rollout.cluster import cluster_store

        return cluster_store(run)
    from reelway.platform.rollout.control.sqlite_store import SqliteRolloutStore

    return SqliteRolloutStore(run.path / "rollout" / "state.db")


def find_rollout(store: RolloutStore, rollout_id: str | None) -> Rollout:
    """Returns the rollout with this id or unique id prefix; without an id, the latest one.

    Raises:
        RolloutError: if there is no such rollout or the prefix is ambiguous.
    """
    if rollout_id is not None:
        return store.get(rollout_id)
    latest = store.latest()
    if latest is None:
        raise RolloutError("no rollout exists; start one with `reelway rollout start RELEASE`")
    return latest


def controller_status(
    run: RolloutLocation, rollout: Rollout | None, last_reconcile: LastReconcile | None, now: float
) -> ControllerStatus:
    """Returns whether a controller reconciles the rollout. ``problem`` is the reason if none does."""
    if isinstance(run, ClusterNamespace):
        from reelway.platform.cli.rollout.cluster import operator_status

        return operator_status(rollout, last_reconcile, now)
    record = controller_record(run)
    reconciled_at = last_reconcile.time if last_reconcile else None
    started_at = rollout.state.started_at if rollout else now
    silent_s = max(0.0, now - (reconciled_at if reconciled_at is not None else started_at)) if rollout else None
    problem = ""
    if record is None:
        problem = "no controller is running for this run"
    elif not process_alive(record.pid):
        problem = f"the controller (process {record.pid}) has exited"
    elif rollout is not None and rollout.state.active and silent_s is not None and silent_s > CONTROLLER_TIMEOUT_S:
        problem = f"the controller (process {record.pid}) has not reconciled for {silent_s:.0f} s"
    return ControllerStatus(
        running=record is not None and process_alive(record.pid),
        url=record.url if record else None,
        pid=record.pid if record else None,
        last_reconcile_at=reconciled_at,
        seconds_since_reconcile=silent_s,
        problem=problem,
    )


def controller_start_hint(run: RolloutLocation) -> str:
    """Returns how to get an unresponsive controller running."""
    if isinstance(run, ClusterNamespace):
        return "rollouts do not advance until `reelway operator` runs in the namespace; check its pod"
    return f"rollouts do not advance until `reelway rollout controller --run {run.path}` runs"
