"""Remote rankers: requested with the traffic, created and removed after it, and never waited for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.rollout.canary_events import RELEASE, STABLE
from tests.support.rollout.controller_environment import ControllerEnvironment

from reelway.platform.cluster.inference_service import RankerState
from reelway.platform.cluster.remote_rankers import MAX_AGE_S, RankerReconciler, RemoteRankerBackend
from reelway.platform.contracts.events import Arm
from reelway.platform.contracts.ids import short_id
from reelway.platform.errors import KubernetesError, RolloutError
from reelway.platform.rollout.control.controller import Controller
from reelway.platform.rollout.state import Phase
from reelway.platform.rollout.traffic.routing import Routing
from reelway.platform.rollout.traffic.target import TrafficObservation, TrafficTarget

OLD, NEW = "a" * 64, "b" * 64
READY = RankerState(True)


@dataclass
class FakeTrafficBackend:
    """Records the applied targets."""

    observation: TrafficObservation
    applied: list[TrafficTarget] = field(default_factory=list)
    fails: bool = False

    def observe(self) -> TrafficObservation:
        return self.observation

    def apply(self, target: TrafficTarget) -> None:
        if self.fails:
            raise RolloutError("not now")
        self.applied.append(target)


@dataclass
class FakeRankerProvisioner:
    """Rankers in memory, without Kubernetes. ``hang`` is called by every method, ``fails`` names a failing one."""

    known: dict[str, RankerState] = field(default_factory=dict)
    fails: str = ""
    hang: Callable[[], object] = lambda: None

    def ensure(self, release: str) -> None:
        self.hang()
        if self.fails == "ensure":
            raise KubernetesError("quota exceeded")
        self.known.setdefault(short_id(release), RankerState(False, "KServe is preparing it"))

    def states(self) -> Mapping[str, RankerState]:
        self.hang()
        if self.fails == "states":
            raise KubernetesError("no answer")
        return dict(self.known)

    def remove(self, release: str) -> None:
        self.hang()
        self.known.pop(release, None)


def observation(**changes: Any) -> TrafficObservation:
    both = TrafficObservation(Routing.single_release(OLD), (OLD, NEW), frozenset({OLD, NEW}))
    return replace(both, **changes)


def target(*releases: str) -> TrafficTarget:
    return TrafficTarget(Routing.single_release(OLD), releases)


def observe(rankers: FakeRankerProvisioner) -> TrafficObservation:
    reconciler = RankerReconciler(rankers)
    reconciler.reconcile()
    return RemoteRankerBackend(FakeTrafficBackend(observation()), reconciler).observe()


def test_release_is_ready_only_with_its_ranker() -> None:
    rankers = FakeRankerProvisioner({OLD[:12]: READY, NEW[:12]: RankerState(False, "0 of 1 pods")})
    observed = observe(rankers)
    assert observed.ready == {OLD}
    assert observed.releases == (OLD, NEW)
    assert observed.routing == Routing.single_release(OLD)
    assert "ranker of bbbbbbbbbbbb: 0 of 1 pods" in observed.detail
    assert observed.failed == {}
    rankers.known[NEW[:12]] = READY
    assert observe(rankers) == observation()


def test_release_without_a_ranker_is_not_running() -> None:
    observed = observe(FakeRankerProvisioner({NEW[:12]: RankerState(False, "image is not there", failed=True)}))
    assert observed.failed == {NEW: "ranker: image is not there"}
    assert observed.releases == (NEW,)
    assert "ranker of aaaaaaaaaaaa: it does not exist" in observed.detail


def test_no_release_is_ready_before_the_rankers_were_read() -> None:
    reconciler = RankerReconciler(FakeRankerProvisioner({OLD[:12]: READY}))
    observed = RemoteRankerBackend(FakeTrafficBackend(observation()), reconciler).observe()
    assert (observed.ready, observed.detail) == (frozenset(), "rankers: their states are not read yet")


def test_no_release_is_ready_on_outdated_states() -> None:
    """Kubernetes is down: the last states count for a while, then no more."""
    now, failures = [0.0], []
    rankers = FakeRankerProvisioner({OLD[:12]: READY, NEW[:12]: READY})
    reconciler = RankerReconciler(rankers, clock=lambda: now[0], on_failure=lambda: failures.append(now[0]))
    backend = RemoteRankerBackend(FakeTrafficBackend(observation()), reconciler)
    reconciler.reconcile()
    rankers.fails = "states"
    now[0] = MAX_AGE_S
    reconciler.reconcile()
    assert backend.observe().ready == {OLD, NEW}
    now[0] = MAX_AGE_S + 1
    reconciler.reconcile()
    observed = backend.observe()
    assert observed.ready == frozenset()
    assert observed.routing == Routing.single_release(OLD)
    assert observed.detail == "rankers: no answer"
    assert failures == [MAX_AGE_S, MAX_AGE_S + 1]


def test_rankers_exist_as_long_as_their_traffic() -> None:
    traffic, rankers = FakeTrafficBackend(observation()), FakeRankerProvisioner({"c" * 12: READY})
    reconciler = RankerReconciler(rankers)
    backend = RemoteRankerBackend(traffic, reconciler)
    reconciler.reconcile()
    assert rankers.known.keys() == {"c" * 12}, "without a target no ranker is removed"
    for releases in ((OLD, NEW), (NEW,)):
        backend.apply(target(*releases))
        reconciler.reconcile()
        assert rankers.known.keys() == {release[:12] for release in releases}
    rankers.known.clear()
    reconciler.reconcile()
    assert rankers.known.keys() == {NEW[:12]}, "a deleted ranker is created again"
    assert traffic.applied == [target(OLD, NEW), target(NEW)]


def test_prepared_releases_have_rankers_beside_those_of_the_traffic() -> None:
    rankers = FakeRankerProvisioner()
    reconciler = RankerReconciler(rankers)
    reconciler.keep_only([NEW])
    reconciler.prepare([OLD])
    reconciler.reconcile()
    assert rankers.known.keys() == {OLD[:12], NEW[:12]}


def test_ranker_stays_while_its_traffic_cannot_be_moved() -> None:
    rankers = FakeRankerProvisioner({OLD[:12]: READY})
    reconciler = RankerReconciler(rankers)
    with pytest.raises(RolloutError, match="not now"):
        RemoteRankerBackend(FakeTrafficBackend(observation(), fails=True), reconciler).apply(target(NEW))
    reconciler.reconcile()
    assert rankers.known.keys() == {OLD[:12], NEW[:12]}


def test_no_ranker_is_written_without_the_lease() -> None:
    def lost() -> None:
        raise RolloutError("the lease is lost")

    rankers = FakeRankerProvisioner({OLD[:12]: READY})
    reconciler = RankerReconciler(rankers, before_write=lost)
    reconciler.keep_only([NEW])
    reconciler.reconcile()
    assert rankers.known.keys() == {OLD[:12]}
    assert reconciler.problem == "the lease is lost; the lease is lost"


@pytest.fixture
def hanging() -> Iterator[FakeRankerProvisioner]:
    """Rankers whose API answers no request until the test ends."""
    release = threading.Event()
    yield FakeRankerProvisioner({short_id(STABLE): READY, short_id(RELEASE): READY}, hang=release.wait)
    release.set()


def stepping(folder: Path, rankers: FakeRankerProvisioner, reconciler: RankerReconciler) -> ControllerEnvironment:
    """A canary at its first step whose rankers were ready until now."""
    hang, rankers.hang = rankers.hang, lambda: None
    world = ControllerEnvironment(folder)
    backend = RemoteRankerBackend(world.backend, reconciler)
    world.controller = Controller(world.store, backend, world.source, world.book, clock=world.clock)
    world.begin()
    for _ in range(4):
        reconciler.reconcile()
        world.tick()
    assert world.state.phase is Phase.STEPPING
    assert world.state.canary_bp > 0
    rankers.hang = hang
    return world


@pytest.mark.parametrize("by", ["alert", "evidence"])
def test_hanging_ranker_api_does_not_delay_a_rollback(tmp_path: Path, hanging: FakeRankerProvisioner, by: str) -> None:
    reconciler, stop = RankerReconciler(hanging), threading.Event()
    world = stepping(tmp_path, hanging, reconciler)
    thread = threading.Thread(target=reconciler.run, args=(stop,), daemon=True)
    thread.start()
    began = time.monotonic()
    if by == "alert":
        world.alert()
        world.controller.react()
    else:
        world.source.kind = "errors"
        world.tick()
    assert time.monotonic() - began < 2
    assert world.traffic.routing.weight_of(Arm.CANARY) == 0
    stop.set()
    reconciler.wake()


@pytest.mark.parametrize("fails", ["states", "ensure"])
def test_failing_ranker_api_does_not_prevent_a_rollback(tmp_path: Path, fails: str) -> None:
    rankers = FakeRankerProvisioner({short_id(STABLE): READY, short_id(RELEASE): READY})
    reconciler = RankerReconciler(rankers)
    world = stepping(tmp_path, rankers, reconciler)
    rankers.fails = fails
    rankers.known.clear()
    reconciler.reconcile()
    assert reconciler.problem
    world.alert()
    assert world.controller.react() is not None
    assert world.traffic.routing.weight_of(Arm.CANARY) == 0
