"""A rollback while the API server cannot be reached: by the last holder of the Lease, recorded once afterwards."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from tests.support.cluster.cut_off_operators import LEASE_S, RAY_SERVICE, Replica, Site
from tests.support.cluster.fake_api_server import FakeApiServer
from tests.support.cluster.fake_serve import GOOD, STABLE, FakeServe
from tests.support.cluster.kubectl import Kubectl
from tests.support.cluster.operator_runs import held, operating, over, settings_of, until

from reelway.platform.cluster.kube_api import KubeApi
from reelway.platform.cluster.rollout_operator import RolloutOperator
from reelway.platform.contracts.events import Arm
from reelway.platform.errors import KubernetesError
from reelway.platform.rollout.alerts import KnownAlert
from reelway.platform.rollout.traffic.routing import Routing

NAMES = ("a", "b")


class Replicas:
    """Two replicas, and the rules that hold for whatever they do."""

    def __init__(self) -> None:
        self.site = Site()
        self.replicas = {name: self._replica(name) for name in NAMES}
        self.rolled_back = False
        """Whether viewers were taken off the canary, or a replica has received an alert."""

    def _replica(self, name: str) -> Replica:
        return Replica(self.site, name, self.check_write)

    def restart(self, name: str) -> None:
        """Kills a process: its memory is lost, and nothing else."""
        self.replicas[name] = self._replica(name)

    def check_write(self, writer: Replica, routing: Routing) -> None:
        before, after = self.site.canary_bp, routing.weight_of(Arm.CANARY)
        assert after == 0 or not self.rolled_back, f"{writer.name} gives a canary viewers that was rolled back"
        others_valid = [other.name for other in self.replicas.values() if other is not writer and other.is_valid()]
        if routing.rollback is None:
            assert writer.is_valid(), f"{writer.name} writes without the Lease"
            assert not others_valid
        self.rolled_back |= after == 0 < before

    def round(self) -> None:
        for replica in self.replicas.values():
            replica.renew()
            replica.watch()
            replica.reconcile()
        self.site.clock.now += 2

    def heal(self) -> None:
        """Lets the network recover and one replica manage the rollout."""
        for replica in self.replicas.values():
            replica.api.reachable, replica.api.loses_answers = True, False
            replica.evidence.kind = "few"
        for _ in range(round(2 * LEASE_S)):
            self.round()


class RollbacksWithoutApiServer(RuleBasedStateMachine):
    """Outages, lost answers, kills, alerts and harmful evidence in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.all = Replicas()
        for _ in range(3):
            self.all.round()

    def teardown(self) -> None:
        try:
            self.all.heal()
            site = self.all.site
            if self.all.rolled_back:
                assert site.phase == "rolled_back"
                assert site.actions.count("roll_back") == 1, site.actions
                assert (site.canary_bp, site.serve.routing.rollback) == (0, None)
            assert site.declared == site.serve.routing
        finally:
            self.all.site.close()

    @rule(name=st.sampled_from(NAMES), reachable=st.booleans())
    def network(self, name: str, *, reachable: bool) -> None:
        self.all.replicas[name].api.reachable = reachable

    @rule(name=st.sampled_from(NAMES), lost=st.booleans())
    def answers(self, name: str, *, lost: bool) -> None:
        self.all.replicas[name].api.loses_answers = lost

    @rule(name=st.sampled_from(NAMES))
    def renew(self, name: str) -> None:
        self.all.replicas[name].renew()

    @rule(name=st.sampled_from(NAMES))
    def watch(self, name: str) -> None:
        self.all.replicas[name].watch()

    @rule(name=st.sampled_from(NAMES))
    def reconcile(self, name: str) -> None:
        self.all.replicas[name].reconcile()

    @rule(name=st.sampled_from(NAMES))
    def restart(self, name: str) -> None:
        self.all.restart(name)

    @precondition(lambda self: self.all.site.canary_bp > 0)
    @rule(name=st.sampled_from(NAMES))
    def alert(self, name: str) -> None:
        self.all.replicas[name].alert()

    @rule(name=st.sampled_from(NAMES), kind=st.sampled_from(["few", "good", "harm", "errors"]))
    def evidence(self, name: str, kind: str) -> None:
        self.all.replicas[name].evidence.kind = kind

    @rule(seconds=st.sampled_from([1.0, 3.0, 8.0, 30.0]))
    def time_passes(self, seconds: float) -> None:
        self.all.site.clock.now += seconds

    @rule()
    def everything_runs(self) -> None:
        self.all.round()

    @invariant()
    def rolled_back_at_most_once(self) -> None:
        assert self.all.site.actions.count("roll_back") <= 1


def test_any_order_of_outages_and_kills_records_a_rollback_once() -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        RollbacksWithoutApiServer,
        settings=settings(
            max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


@pytest.fixture
def replicas() -> Iterator[Replicas]:
    both = Replicas()
    yield both
    both.site.close()


def stepping(replicas: Replicas) -> Replica:
    """Runs until the first replica has given the canary viewers."""
    for _ in range(4):
        replicas.round()
    holder = next(one for one in replicas.replicas.values() if one.is_valid())
    assert replicas.site.canary_bp > 0
    return holder


def test_second_replica_records_the_rollback_of_the_cut_off_one(replicas: Replicas) -> None:
    first = stepping(replicas)
    second = next(one for one in replicas.replicas.values() if one is not first)
    first.api.reachable = False
    first.alert()
    assert (replicas.site.canary_bp, replicas.site.phase) == (0, "stepping")
    for _ in range(round(LEASE_S)):
        replicas.round()
    assert (second.is_valid(), first.is_valid()) == (True, False)
    assert replicas.site.phase == "rolled_back"
    assert replicas.site.actions == ["prepare", "step", "roll_back", "complete_rollback"]
    written = len(replicas.site.serve.written)
    first.reconcile()
    first.api.reachable = True
    replicas.heal()
    assert len(replicas.site.serve.written) == written
    assert replicas.site.actions.count("roll_back") == 1


def test_killed_holder_finds_its_own_rollback_in_the_traffic(replicas: Replicas) -> None:
    first = stepping(replicas)
    first.api.reachable = False
    first.alert()
    for name in NAMES:
        replicas.restart(name)
    replicas.heal()
    assert replicas.site.phase == "rolled_back"
    entry = replicas.site.store.history(replicas.site.rollout_id)[-2]
    assert entry.action == "roll_back"
    assert "CanaryErrors" in entry.reason
    assert "when it could not be recorded" in entry.reason


def test_record_whose_answer_was_lost_is_not_repeated(replicas: Replicas) -> None:
    first = stepping(replicas)
    first.api.loses_answers = True
    first.alert()
    assert replicas.site.canary_bp == 0
    replicas.heal()
    assert replicas.site.actions == ["prepare", "step", "roll_back", "complete_rollback"]


# The operator's own threads


def cut(api: KubeApi) -> str:
    """Makes the API server unreachable for one client. Returns what makes it reachable."""
    address, api.server = api.server, "http://127.0.0.1:1"
    return address


def alert() -> KnownAlert:
    labels = (("alertname", "CanaryErrors"), ("release", GOOD))
    return KnownAlert(group_key="g", labels=labels, starts_at=time.time(), resolved=False, summary="errors")


def roll_back_while_cut_off(operator: RolloutOperator, api: KubeApi, serve: FakeServe) -> str:
    """Delivers an alert during an outage that is longer than the Lease. Returns what ends the outage."""
    until(lambda: len(serve.routing.arms) == 2)
    address = cut(api)
    until(lambda: operator.metrics.cut_off._value.get() == 1)
    written = len(serve.written)
    began = time.monotonic()
    with pytest.raises(KubernetesError):  # Alertmanager is told to send it again
        operator.deliver([alert()])
    until(lambda: serve.routing.weight_of(Arm.CANARY) == 0)
    assert time.monotonic() - began < 2
    assert serve.routing.rollback is not None
    assert operator.active
    assert operator.unhealthy_reason() == ""
    time.sleep(1.0)
    assert len(serve.written) == written + 1, "it is written once"
    assert operator.metrics.unrecorded_rollbacks._value.get() == 1
    return address


@pytest.fixture
def server() -> Iterator[FakeApiServer]:
    fake = FakeApiServer()
    yield fake
    fake.close()


def test_operator_rolls_back_during_an_outage_and_records_it_after(
    server: FakeApiServer, serve: FakeServe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "kubeconfig")))
    api = KubeApi()
    server.apply(over(serve, policy=held()))

    def status() -> dict[str, object]:
        return dict(server.objects["one"].get("status") or {})

    with operating(api, settings_of(serve, tmp_path, lease={"duration_s": 1.0})) as operator:
        api.server = roll_back_while_cut_off(operator, api, serve)
        until(lambda: status().get("phase") == "RolledBack")
        until(lambda: operator.metrics.cut_off._value.get() == 0)
        until(lambda: serve.releases == {STABLE})
    history = status()["history"]
    assert isinstance(history, list)
    assert [entry["action"] for entry in history] == ["prepare", "step", "roll_back", "complete_rollback"]
    assert "when it could not be recorded" in history[2]["reason"]
    assert serve.routing.rollback is None


def test_operator_that_was_cut_off_ends_when_another_took_the_lease(
    server: FakeApiServer, serve: FakeServe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(server.write_kubeconfig(tmp_path / "kubeconfig")))
    api, other_api = KubeApi(), KubeApi()
    server.apply(over(serve, policy=held()))
    lease = {"duration_s": 1.0}
    operator, stop = RolloutOperator(api, settings_of(serve, tmp_path, lease=lease)), threading.Event()
    failures: list[Exception] = []

    def run() -> None:
        try:
            operator.run(stop)
        except KubernetesError as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        address = roll_back_while_cut_off(operator, api, serve)
        with operating(other_api, settings_of(serve, tmp_path, lease=lease, identity="operator-1")):
            until(lambda: server.objects["one"]["status"]["phase"] == "RolledBack")
            until(lambda: serve.releases == {STABLE})
            api.server = address
            thread.join(20)
            assert not thread.is_alive()
    finally:
        stop.set()
        thread.join(20)
    assert "the lease was lost" in str(failures[0])
    actions = [entry["action"] for entry in server.objects["one"]["status"]["history"]]
    assert actions == ["prepare", "step", "roll_back", "complete_rollback"]


@pytest.mark.cluster
def test_rollback_during_an_outage_on_a_real_api_server(
    api: KubeApi, kubectl: Kubectl, serve: FakeServe, tmp_path: Path
) -> None:
    kubectl.apply(over(serve, policy=held()))
    with operating(api, settings_of(serve, tmp_path, lease={"duration_s": 2.0})) as operator:
        api.server = roll_back_while_cut_off(operator, api, serve)
        kubectl.run("wait", "--for=condition=RolledBack", "releaserollout/one", "--timeout=30s")
        until(lambda: serve.releases == {STABLE})
    history = kubectl.read("one")["status"]["history"]
    assert [entry["action"] for entry in history] == ["prepare", "step", "roll_back", "complete_rollback"]
    assert "when it could not be recorded" in history[2]["reason"]


def test_declared_routing_keeps_no_mark(replicas: Replicas) -> None:
    first = stepping(replicas)
    first.api.reachable = False
    first.alert()
    first.api.reachable = True
    replicas.heal()
    declared = yaml.safe_load(replicas.site.server.other[RAY_SERVICE]["spec"]["serveConfigV2"])
    assert "rolled back" not in yaml.safe_dump(declared)
