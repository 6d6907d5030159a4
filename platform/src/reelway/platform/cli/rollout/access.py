"""Why: what every command asks of a place: its rollouts, and whether somebody looks after them, for both kinds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reelway.platform.cli.rollout.place import (
    SILENT_AFTER_S,
    ClusterPlace,
    ControllerSight,
    Place,
    controller_record,
    lives,
)
from reelway.platform.errors import RolloutError

if TYPE_CHECKING:
    from reelway.platform.rollout.records import Rollout, RolloutStore, Sighting


def open_store(run: Place) -> RolloutStore:
    """The rollouts of a place.

    Raises:
        ConfigError: there is no way to the cluster.
    """
    if isinstance(run, ClusterPlace):
        from reelway.platform.cli.rollout.cluster import cluster_store

        return cluster_store(run)
    from reelway.platform.rollout.control.sqlite_store import SqliteRolloutStore

    return SqliteRolloutStore(run.path / "rollout" / "state.db")


def rollout_of(store: RolloutStore, rollout_id: str | None) -> Rollout:
    """The rollout by id or its unique beginning, the newest one when no id is given.

    Raises:
        RolloutError: there is none, or several begin so.
    """
    if rollout_id is not None:
        return store.get(rollout_id)
    latest = store.latest()
    if latest is None:
        raise RolloutError("there has been no rollout here; begin one with `reelway rollout start RELEASE`")
    return latest


def controller_sight(run: Place, rollout: Rollout | None, sighting: Sighting | None, now: float) -> ControllerSight:
    """Whether somebody looks after the rollout. ``problem`` says why not, in words for a person."""
    if isinstance(run, ClusterPlace):
        from reelway.platform.cli.rollout.cluster import operator_sight

        return operator_sight(rollout, sighting, now)
    record = controller_record(run)
    looked_at = sighting.time if sighting else None
    began_at = rollout.state.started_at if rollout else now
    silent_s = max(0.0, now - (looked_at if looked_at is not None else began_at)) if rollout else None
    problem = ""
    if record is None:
        problem = "no controller runs for this run"
    elif not lives(record.pid):
        problem = f"the controller (process {record.pid}) is gone"
    elif rollout is not None and rollout.state.active and silent_s is not None and silent_s > SILENT_AFTER_S:
        problem = f"the controller (process {record.pid}) has not looked for {silent_s:.0f} s"
    return ControllerSight(
        running=record is not None and lives(record.pid),
        url=record.url if record else None,
        pid=record.pid if record else None,
        last_look_at=looked_at,
        silent_s=silent_s,
        problem=problem,
    )


def start_the_controller(run: Place) -> str:
    """What to do about a silent controller."""
    if isinstance(run, ClusterPlace):
        return "nothing moves until `reelway operator` runs there; look at its pod"
    return f"nothing moves until `reelway rollout controller --run {run.path}` runs"
