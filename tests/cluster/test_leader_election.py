"""The Lease's deadline bounds attempts and traffic writes; the API server is a fake, and time is virtual."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.cluster.fake_api_server import FakeApiServer
from tests.support.cluster.fake_serve import GOOD, STABLE, FakeServe, document

from reelway.platform.cluster.kube_api import KubeApi, KubeObject
from reelway.platform.cluster.leader_election import LeaderElector
from reelway.platform.cluster.ray_service import RayServiceBackend
from reelway.platform.errors import KubernetesError, RolloutError
from reelway.platform.rollout.state import Phase, RolloutState
from reelway.platform.rollout.traffic.routing import Routing
from reelway.platform.rollout.traffic.serve_config import find_routing
from reelway.platform.rollout.traffic.serve_rest import ServeAddress, ServeRestBackend
from reelway.platform.rollout.traffic.target import traffic_target

DURATION_S = 10.0
DEADLINE_S = 7.0
"""A holder stops this long after its last renewal."""
RAY_SERVICE = "/apis/ray.io/v1/namespaces/test/rayservices/reelway"
CANARY = traffic_target(
    RolloutState(
        id="r-1", salt="s", stable_release=STABLE, canary_release=GOOD, phase=Phase.STEPPING, canary_bp=1000,
        started_at=0, changed_at=0, tick_at=0,
    )
)  # fmt: skip


class VirtualTime(threading.Event):
    """A clock, and a stop event whose waits advance it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self._due = float("inf")

    def __call__(self) -> float:
        return self.now

    def wait(self, timeout: float | None = None) -> bool:
        self.now += timeout or 0.0
        if self.now >= self._due:
            self._due = float("inf")
            self._call()
        return self.is_set()

    def later(self, after_s: float, call: Callable[[], object]) -> None:
        """Calls ``call`` in a wait that ends ``after_s`` seconds from now or later."""
        self._due, self._call = self.now + after_s, call


class HangingApi(KubeApi):
    """An API server that creates the Lease and answers no later request in time."""

    def __init__(self, clock: VirtualTime) -> None:
        self._clock = clock
        self.timeouts_s: list[float] = []
        self.hangs = False

    def get(self, path: str, *, timeout_s: float | None = None) -> KubeObject | None:
        if self.hangs:
            self._hang(path, timeout_s)
        return None

    def create(self, path: str, document: Mapping[str, Any], *, timeout_s: float | None = None) -> KubeObject:
        del path, timeout_s
        return dict(document)

    def _hang(self, path: str, timeout_s: float | None) -> None:
        assert timeout_s is not None
        self.timeouts_s.append(timeout_s)
        self._clock.now += timeout_s
        raise KubernetesError(f"GET {path}: timed out")


@pytest.fixture
def server() -> Iterator[FakeApiServer]:
    fake = FakeApiServer()
    yield fake
    fake.close()


@pytest.fixture
def api(server: FakeApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KubeApi:
    monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "kubeconfig")))
    return KubeApi()


@pytest.fixture
def serve() -> Iterator[FakeServe]:
    fake = FakeServe()
    yield fake
    fake.close()


def test_hanging_api_server_ends_the_lease_at_its_deadline() -> None:
    clock = VirtualTime()
    api = HangingApi(clock)
    elector = LeaderElector(api, "it", "a", duration_s=DURATION_S, clock=clock)
    assert elector.try_acquire_or_renew()
    api.hangs = True
    lost: list[float] = []
    changes: list[tuple[bool, float]] = []

    def cut_off(now: bool) -> None:
        changes.append((now, clock()))
        if len(changes) == 1:
            assert len(api.timeouts_s) >= 2, "one hanging request must leave time for another attempt"
            with pytest.raises(RolloutError, match="traffic not written: lease it"):
                elector.require_valid()
        elector.require_last_holder()
        clock.set() if not now else clock.later(20.0, lambda: setattr(api, "hangs", False))

    elector.renew_until(clock, lambda: lost.append(clock()), cut_off)
    assert lost == []
    assert changes[0][0] is True
    assert changes[0][1] == pytest.approx(DEADLINE_S, abs=0.2)
    assert changes[1][0] is False
    elector.require_valid()


@pytest.mark.parametrize("released", [False, True])
def test_holder_that_was_cut_off_ends_if_another_has_held_the_lease(api: KubeApi, *, released: bool) -> None:
    clock = VirtualTime()
    first = LeaderElector(api, "it", "a", duration_s=DURATION_S, clock=clock)
    second = LeaderElector(api, "it", "b", duration_s=DURATION_S, clock=clock)
    assert first.try_acquire_or_renew()
    assert not second.try_acquire_or_renew()
    clock.now = DURATION_S + 1
    first.require_last_holder()
    assert second.try_acquire_or_renew()
    if released:
        second.release()
    lost: list[float] = []
    first.renew_until(clock, lambda: lost.append(clock()))
    assert len(lost) == 1
    with pytest.raises(RolloutError, match="a is not the last holder of lease"):
        first.require_last_holder()


def test_lease_is_valid_until_its_deadline(api: KubeApi) -> None:
    clock = VirtualTime()
    elector = LeaderElector(api, "it", "a", duration_s=DURATION_S, clock=clock)
    with pytest.raises(RolloutError, match="lease it is no longer held by a"):
        elector.require_valid()
    assert elector.try_acquire_or_renew()
    clock.now = DEADLINE_S - 0.1
    elector.require_valid()
    assert elector.try_acquire_or_renew()
    clock.now = 2 * DEADLINE_S - 0.2
    elector.require_valid()
    clock.now = 2 * DEADLINE_S
    with pytest.raises(RolloutError, match="traffic not written: lease it"):
        elector.require_valid()


def test_lease_that_another_replica_took_is_invalid_at_once(api: KubeApi) -> None:
    clock = VirtualTime()
    first = LeaderElector(api, "it", "a", duration_s=DURATION_S, clock=clock)
    second = LeaderElector(api, "it", "b", duration_s=DURATION_S, clock=clock)
    assert first.try_acquire_or_renew()
    assert not second.try_acquire_or_renew()
    clock.now = DURATION_S + 1
    assert second.try_acquire_or_renew()
    assert not first.try_acquire_or_renew()
    with pytest.raises(RolloutError, match="no longer held by a"):
        first.require_valid()
    second.require_valid()
    second.release()
    with pytest.raises(RolloutError, match="no longer held by b"):
        second.require_valid()


@pytest.mark.parametrize("lost_before", ["Serve", "RayService"])
def test_no_traffic_is_written_without_the_lease(
    api: KubeApi, server: FakeApiServer, serve: FakeServe, lost_before: str
) -> None:
    """The Lease is checked before each write, not once at the beginning of ``apply``."""
    clock = VirtualTime()
    elector = LeaderElector(api, "it", "a", duration_s=DURATION_S, clock=clock)
    assert elector.try_acquire_or_renew()
    before = document(Routing.single_release(STABLE))
    server.put(RAY_SERVICE, {"metadata": {"name": "reelway"}, "spec": {"serveConfigV2": yaml.safe_dump(before)}})
    address = ServeAddress(serve.url, serve.url)
    rest = ServeRestBackend(address, before_write=elector.require_valid)
    backend = RayServiceBackend(api, "reelway", rest, before_write=elector.require_valid)
    backend.observe()
    if lost_before == "Serve":
        clock.now = DEADLINE_S
    else:
        serve.before_taking = lambda: setattr(clock, "now", DEADLINE_S)
    with pytest.raises(RolloutError, match="traffic not written: lease it"):
        backend.apply(CANARY)
    assert len(serve.written) == (0 if lost_before == "Serve" else 1)
    declared = yaml.safe_load(server.other[RAY_SERVICE]["spec"]["serveConfigV2"])
    assert find_routing(declared) == find_routing(before)
    assert elector.try_acquire_or_renew()
    backend.apply(CANARY)
    assert serve.routing == CANARY.routing
    backend.close()
