"""After any fault at any time, every write was recorded before or is marked, and traffic matches the record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from tests.support.rollout.canary_events import RELEASE, STABLE
from tests.support.rollout.controller_environment import ControllerEnvironment, newest, nothing

from reelway.platform.contracts.events import Arm
from reelway.platform.errors import ReelwayError, RolloutError, StorageError
from reelway.platform.rollout.control.sqlite_store import SqliteRolloutStore
from reelway.platform.rollout.control.unrecorded_rollback import can_roll_back
from reelway.platform.rollout.state import Command, Phase
from reelway.platform.rollout.traffic.routing import Routing
from reelway.platform.rollout.traffic.target import TrafficTarget, traffic_target


class Killed(BaseException):
    """Simulates the end of the process."""


FAULTS: dict[str, BaseException] = {
    "killed": Killed(),
    "refused": RolloutError("PUT answered 503"),
    "full": StorageError("disk full"),
}
Event = tuple[str, str, str]

_places = st.sampled_from(["record before", "record after", "apply before", "apply after"])
_faulty = st.tuples(st.just("fault"), _places, st.sampled_from(sorted(FAULTS)))
_event = st.one_of(
    st.tuples(
        st.just("tick"), st.sampled_from(["good", "good", "good", "few", "harm", "nothing", "refused"]), st.just("")
    ),
    _faulty,
    st.tuples(st.sampled_from(["alert", "foreign alert", "hand edit", "blind", "react"]), st.just(""), st.just("")),
    st.tuples(st.just("ask"), st.sampled_from(["pause", "resume", "promote", "rollback"]), st.just("")),
)


class FaultTrial:
    """A world that compares every write with the recorded state."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0
        self.over: set[str] = set()
        self.restart()
        self.world.begin()

    def restart(self) -> None:
        now = self.world.clock.now if hasattr(self, "world") else 10_000.0
        if hasattr(self, "world"):
            self.world.store.close()
        self.world = ControllerEnvironment(self.folder)
        self.world.clock.now = now
        self.heal()

    def heal(self) -> None:
        self.world.store.before = self.world.store.after = self.world.backend.after = nothing
        self.world.backend.before = self.check
        self.world.backend.blind = False

    def check(self, target: TrafficTarget) -> None:
        state = newest(SqliteRolloutStore(self.world.store.path)).state
        if target.routing.rollback is not None:
            # A record can be written although its answer was lost.
            assert can_roll_back(state) or state.phase is Phase.ROLLING_BACK, "a recorded rollback needs no mark"
            assert target.routing.weight_of(Arm.CANARY) == 0
            return
        assert target == traffic_target(state), "written, but not recorded"
        if state.phase in (Phase.ROLLING_BACK, Phase.ROLLED_BACK):
            self.over.add(state.id)
        if state.id in self.over:
            assert target.routing.weight_of(Arm.CANARY) == 0, "a rollback is final"

    def play(self, happens: Event) -> None:
        kind, what, how = happens
        self.number += 1
        world = self.world
        try:
            if kind == "tick":
                world.source.kind = what
                world.tick()
            elif kind == "react":
                world.controller.react()
            elif kind == "fault":
                self.break_(what, FAULTS[how])
                world.tick()
            elif kind == "ask":
                world.store.submit_command("r-1", Command(id=f"c{self.number}", verb=what))  # type: ignore[arg-type]
            elif kind == "alert":
                world.alert()
            elif kind == "foreign alert":
                world.alert(release="f" * 64)
            elif kind == "hand edit":
                world.backend.inner.write(TrafficTarget(Routing.single_release(RELEASE), (RELEASE, STABLE)))
            elif kind == "blind":
                world.backend.blind = True
                world.tick()
        except Killed:
            self.restart()
        except ReelwayError:
            pass
        self.heal()

    def break_(self, method: str, fault: BaseException) -> None:
        def fails(*_: object) -> None:
            raise fault

        def fails_after_the_check(target: TrafficTarget) -> None:
            self.check(target)
            raise fault

        callbacks: dict[str, Callable[[], None]] = {
            "record before": lambda: setattr(self.world.store, "before", fails),
            "record after": lambda: setattr(self.world.store, "after", fails),
            "apply before": lambda: setattr(self.world.backend, "before", fails_after_the_check),
            "apply after": lambda: setattr(self.world.backend, "after", fails),
        }
        callbacks[method]()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(events=st.lists(_event, min_size=4, max_size=20))
def test_traffic_matches_the_record_after_any_fault(
    tmp_path_factory: pytest.TempPathFactory, events: list[Event]
) -> None:
    trial = FaultTrial(tmp_path_factory.mktemp("trial"))
    for happens in events:
        trial.play(happens)
    trial.world.source.kind = "few"
    trial.world.tick(5, after_s=1)  # so short that no new step starts
    state = trial.world.state
    assert trial.world.traffic == traffic_target(state)
    sighting = trial.world.store.last_reconcile(state.id)
    assert sighting is not None
    assert (sighting.traffic["reached"], sighting.traffic["trouble"]) == (True, "")
    event(state.phase.value)
    trial.world.store.close()
