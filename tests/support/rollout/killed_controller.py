"""A controller that kills its own process at the n-th point of a scenario, for ``test_controller_killed``.

Points lie before and after every record and every write of traffic, and between the two writes of a reaction.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from tests.support.rollout.controller_environment import QUICK, ControllerEnvironment

from reelway.platform.rollout.state import Command, Phase, RolloutState

TICKS = 60
POLICY = QUICK.model_copy(update={"retention_s": 60.0})
Story = Callable[[ControllerEnvironment], None]


def promotion(world: ControllerEnvironment) -> None:
    """A good release is promoted and retired."""
    world.source.kind = "good"


def harm(world: ControllerEnvironment) -> None:
    """A release is harmful at its second step."""
    world.source.kind = "harm" if world.state.step >= 1 else "good"


def alert(world: ControllerEnvironment) -> None:
    """An alert fires at the second step and rolls back without a reconcile."""
    world.source.kind = "good"
    if world.state.step >= 1:
        world.alert(starts_at=20_000)


def command(world: ControllerEnvironment) -> None:
    """A person rolls back a promoted release."""
    world.source.kind = "good"
    if world.state.phase is Phase.PROMOTED:
        world.store.submit_command(world.state.id, Command(id="back", verb="rollback", actor="ada"))


STORIES: dict[str, Story] = {story.__name__: story for story in (promotion, harm, alert, command)}


class KillPoints:
    """Counts points, kills the process at the requested one, and reports passed points to the parent."""

    def __init__(self, path: Path, die_at: int) -> None:
        self.path, self.die_at, self.passed = path, die_at, 0

    def __call__(self, *_: object) -> None:
        self.passed += 1
        self.path.write_text(str(self.passed))
        if self.passed == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)


def play(folder: Path, story: str, die_at: int) -> None:
    """Starts or resumes the scenario until it ends or the process is killed. ``die_at`` 0: no kill."""
    world = ControllerEnvironment(folder, POLICY)
    if world.store.latest() is None:
        world.begin()
    world.clock.now = world.state.tick_at
    points = KillPoints(folder / "points", die_at)
    world.store.before = world.store.after = points
    world.backend.before = world.backend.after = points
    for _ in range(TICKS):
        STORIES[story](world)
        world.tick()
        if over(world.state):
            world.tick()
            world.store.close()
            return
    raise AssertionError(f"{story} has not ended after {TICKS} reconciles: {world.state}")


def over(state: RolloutState) -> bool:
    return state.phase is Phase.ROLLED_BACK or state.retired
