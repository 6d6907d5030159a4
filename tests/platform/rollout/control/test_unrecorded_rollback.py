"""A rollback that cannot be recorded: written to the traffic with a mark, and recorded once later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.support.rollout.controller_environment import (
    ControllerEnvironment,
    disk_full,
    moves,
    nothing,
    stepping,
)

from reelway.platform.contracts.events import Arm
from reelway.platform.errors import StorageError
from reelway.platform.rollout.alerts import KnownAlert
from reelway.platform.rollout.control import controller
from reelway.platform.rollout.decision import Action, decide_on
from reelway.platform.rollout.state import Phase
from reelway.platform.rollout.traffic.routing import RollbackMark
from reelway.platform.rollout.traffic.target import traffic_target


@pytest.fixture
def world(tmp_path: Path) -> ControllerEnvironment:
    return ControllerEnvironment(tmp_path)


def replace_resolved(alert: KnownAlert) -> KnownAlert:
    return alert.model_copy(update={"resolved": True})


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("cause", ["harm", "alert"])
def test_rollback_without_a_record_is_written_and_recorded_once(
    world: ControllerEnvironment, cause: str, *, restarts: bool
) -> None:
    stepping(world).source.kind = "harm" if cause == "harm" else "few"
    world.store.before = disk_full
    if cause == "alert":
        world.alert()
    for _ in range(3):
        with pytest.raises(StorageError):
            world.tick()
    routing = world.traffic.routing
    assert (routing.weight_of(Arm.CANARY), routing.rollback is not None) == (0, True)
    assert (world.state.phase, moves(world.store.history())) == (Phase.STEPPING, ["prepare", "step"])
    world.source.kind = "good"
    world.book.deliver([replace_resolved(alert) for alert in world.store.alerts().values()])
    if restarts:
        world.restart()
    world.store.before = nothing
    assert world.tick(3) == ["roll_back", "complete_rollback", "wait"]
    assert moves(world.store.history()) == ["prepare", "step", "roll_back", "complete_rollback"]
    assert "rolled back at 1970-01-01 02:48:10 UTC, when it could not be recorded" in world.store.history()[2].reason
    assert world.traffic == traffic_target(world.state)


@pytest.mark.parametrize("decided", [False, True])
def test_step_does_not_overwrite_an_unrecorded_rollback(
    world: ControllerEnvironment, monkeypatch: pytest.MonkeyPatch, *, decided: bool
) -> None:
    """An alert arrives before or after the decision of a reconcile; its record fails, the one after it would not."""
    stepping(world)

    def roll_back_unrecorded() -> None:
        world.store.before = disk_full
        world.alert()
        with pytest.raises(StorageError):
            world.controller.react()
        world.store.before = nothing

    fetch = world.source.fetch

    def fetch_slowly(*arguments: Any) -> Any:
        if not decided and world.state.phase is Phase.STEPPING:
            roll_back_unrecorded()
        return fetch(*arguments)

    def decide_slowly(*arguments: Any) -> Any:
        decision = decide_on(*arguments)
        if decided and decision.action is Action.STEP:
            roll_back_unrecorded()
        return decision

    world.source.fetch = fetch_slowly  # type: ignore[method-assign]
    monkeypatch.setattr(controller, "decide_on", decide_slowly)
    assert world.tick() == (["-"] if decided else ["roll_back"])
    assert world.traffic.routing.weight_of(Arm.CANARY) == 0
    world.tick(2)
    assert moves(world.store.history()) == ["prepare", "step", "roll_back", "complete_rollback"]


def test_unrecorded_rollback_is_written_again_over_the_old_traffic(world: ControllerEnvironment) -> None:
    """KubeRay submits the declared configuration to a new head."""
    old = stepping(world).traffic
    world.source.kind, world.store.before = "harm", disk_full
    for _ in range(2):
        with pytest.raises(StorageError):
            world.tick()
        assert world.traffic.routing.rollback is not None
        world.backend.inner.write(old)


@pytest.mark.parametrize("foreign", ["another rollout", "another weight"])
def test_unrecorded_rollback_stops_when_another_controller_writes(world: ControllerEnvironment, foreign: str) -> None:
    stepping(world).source.kind = "harm"
    world.store.before = disk_full
    for _ in range(2):
        with pytest.raises(StorageError):
            world.tick()
    changed = {"id": "r-2"} if foreign == "another rollout" else {"canary_bp": 5_000}
    other = traffic_target(world.state.model_copy(update=changed))
    world.backend.inner.write(other)
    for _ in range(2):
        with pytest.raises(StorageError):
            world.tick()
        assert world.traffic == other


def test_mark_is_not_possible_with_viewers_on_the_canary(world: ControllerEnvironment) -> None:
    routing = stepping(world).traffic.routing
    with pytest.raises(ValueError, match="rollback is set and the canary has 100 basis points, expected 0"):
        type(routing)(**{**dict(routing), "rollback": RollbackMark(reason="x", decided_at=1)})
