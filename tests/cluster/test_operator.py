"""The operator on a real API server with a fake Serve: progress, refusals, deletion, alerts, leader election, kills."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from tests.support.cluster.fake_serve import BAD, GOOD, STABLE, FakeServe
from tests.support.cluster.kubectl import Kubectl
from tests.support.cluster.operator_runs import TOKEN, held, operating, over, settings_of, until
from tests.support.cluster.rollout_manifests import QUICK, rollout
from tests.support.rollout.webhook_requests import payload

from reelway.platform.cluster.kube_api import KubeApi
from reelway.platform.cluster.leader_election import LeaderElector
from reelway.platform.cluster.rollout_operator import RolloutOperator
from reelway.platform.cluster.status import format_time
from reelway.platform.errors import KubernetesError
from reelway.platform.rollout.control.webhook import ALERTS_PATH, serve_in_thread

pytestmark = pytest.mark.cluster


def phase(kubectl: Kubectl, name: str = "one") -> str:
    return str(kubectl.read(name).get("status", {}).get("phase", ""))


def test_good_release_is_promoted_with_its_reasons_visible(
    api: KubeApi, kubectl: Kubectl, serve: FakeServe, tmp_path: Path
) -> None:
    kubectl.apply(over(serve, note="try it"))
    with operating(api, settings_of(serve, tmp_path)):
        kubectl.run("wait", "--for=condition=Promoted", "releaserollout/one", "--timeout=60s")
        until(lambda: "CompletePromotion" in kubectl.run("get", "events"))
        status = kubectl.read("one")["status"]
        table = kubectl.run("get", "releaserollouts").splitlines()
        events = kubectl.run("get", "events", "-o", "custom-columns=R:.reason,M:.message")
        until(lambda: "finalizers" not in kubectl.read("one")["metadata"])
    kubectl.run("delete", "releaserollout", "one", "--timeout=10s")  # the operator has stopped
    assert serve.routing.arms[0].release == GOOD
    assert table[0].split() == ["NAME", "PHASE", "STEP", "WEIGHT", "RELEASE", "VERDICT", "AGE", "REASON"]
    assert table[1].split()[:8] == ["one", "Promoted", "2", "of", "2", "100", "%", GOOD[:12]]
    assert [one["action"] for one in status["history"]] == ["prepare", "step", "step", "promote", "complete_promotion"]
    for entry in status["history"]:
        assert entry["reason"][:200] in events
    assert "long_watch_rate" in status["evidence"]["outcomes"][0]
    assert status["evidence"]["viewers"] > 50
    assert status["policy"]["guardrails"]["firing_alerts"] == {"maximum": 0}


def test_bad_release_is_rolled_back_until_a_forced_retry(
    api: KubeApi, kubectl: Kubectl, serve: FakeServe, tmp_path: Path
) -> None:
    kubectl.apply(over(serve, release=BAD))
    with operating(api, settings_of(serve, tmp_path)):
        kubectl.run("wait", "--for=condition=RolledBack", "releaserollout/one", "--timeout=60s")
        until(lambda: serve.releases == {STABLE})
        kubectl.apply(over(serve, "two", BAD))
        until(lambda: phase(kubectl, "two") == "Refused")
        assert "was rolled back" in kubectl.read("two")["status"]["reason"]
        kubectl.apply(over(serve, "three", BAD, force=True))
        kubectl.run("wait", "--for=condition=RolledBack", "releaserollout/three", "--timeout=60s")
        until(lambda: serve.releases == {STABLE})
        # Deleting rollouts at rest moves no traffic.
        written = len(serve.written)
        kubectl.run("delete", "releaserollout", "one", "two", "three", "--timeout=30s")
        time.sleep(0.5)
        assert len(serve.written) == written
    warned = kubectl.run("get", "events", "--field-selector", "type=Warning", "-o", "custom-columns=R:.reason")
    assert {"RollBack", "Refused"} <= set(warned.split())


def test_deleted_rollout_never_reactivates_an_older_one(
    api: KubeApi, kubectl: Kubectl, serve: FakeServe, tmp_path: Path
) -> None:
    kubectl.apply(over(serve, "one", GOOD))
    with operating(api, settings_of(serve, tmp_path)):
        kubectl.run("wait", "--for=condition=Promoted", "releaserollout/one", "--timeout=60s")
        kubectl.apply(over(serve, "two", STABLE, stableRelease=GOOD))
        kubectl.run("wait", "--for=condition=Promoted", "releaserollout/two", "--timeout=60s")
        written = len(serve.written)
        kubectl.run("delete", "releaserollout", "two", "--timeout=30s")
        time.sleep(0.5)
        assert len(serve.written) == written
        assert serve.routing.arms[0].release == STABLE


def test_second_rollout_waits_with_the_reason(api: KubeApi, kubectl: Kubectl, serve: FakeServe, tmp_path: Path) -> None:
    kubectl.apply(over(serve, policy=held()))
    with operating(api, settings_of(serve, tmp_path)):
        until(lambda: serve.routing.rollout != "")
        kubectl.apply(over(serve, "two", BAD))
        until(lambda: phase(kubectl, "two") == "Waiting")
        assert "is in progress; this one starts after it ends" in kubectl.read("two")["status"]["reason"]
        command = [{"id": "1", "verb": "rollback", "actor": "ada", "note": "not today"}]
        kubectl.apply(over(serve, policy=held(), commands=command))
        kubectl.run("wait", "--for=condition=RolledBack", "releaserollout/one", "--timeout=30s")
        assert "rolled back by ada: not today" in kubectl.read("one")["status"]["reason"]
        until(lambda: phase(kubectl, "two") not in ("Waiting", ""))
        assert kubectl.read("one")["status"]["supersededBy"].startswith("two-")


def test_rollout_deleted_midway_is_removed_once_on_stable(
    api: KubeApi, kubectl: Kubectl, serve: FakeServe, tmp_path: Path
) -> None:
    kubectl.apply(over(serve, policy=held()))
    with operating(api, settings_of(serve, tmp_path)):
        until(lambda: len(serve.routing.arms) == 2)
        assert kubectl.read("one")["metadata"]["finalizers"] == ["reelway.dev/traffic-on-stable"]
        kubectl.run("delete", "releaserollout", "one", "--timeout=30s")
    assert [route.release for route in serve.routing.arms] == [STABLE]


def test_status_says_why_a_rollout_does_not_start(
    api: KubeApi, kubectl: Kubectl, serve: FakeServe, tmp_path: Path
) -> None:
    wrong = {**QUICK, "outcomes": [{"name": "long_watch_rate", "margin": 0.1, "tuned_for": 0.05}]}
    kubectl.apply(over(serve, "live", STABLE))
    kubectl.apply(over(serve, "over", GOOD, stableRelease=BAD))
    kubectl.apply(over(serve, "wrong", policy=wrong))
    kubectl.apply(over(serve, "later", policy=None, policyRef={"name": "mine"}))
    kubectl.apply({**rollout("elsewhere", backend={"serve": {"api": "http://evil.example", "url": "http://x"}})})
    with operating(api, settings_of(serve, tmp_path)):
        until(lambda: all(phase(kubectl, name) for name in ("live", "over", "wrong", "later", "elsewhere")))
        statuses = {
            name: (phase(kubectl, name), kubectl.read(name)["status"]["reason"])
            for name in ("live", "over", "wrong", "later", "elsewhere")
        }
        assert "is already live" in statuses["live"][1]
        assert "spec.stableRelease is cccccccccccc, but aaaaaaaaaaaa is live" in statuses["over"][1]
        assert "tuned_for 0.05 is not beyond the margin" in statuses["wrong"][1]
        assert "has no ConfigMap mine with the key policy.yaml" in statuses["later"][1]
        assert "host 'evil.example' is neither a Service of namespace" in statuses["elsewhere"][1]
        assert [statuses[name][0] for name in statuses] == ["Refused", "Refused", "Refused", "Waiting", "Refused"]
        assert not serve.written
        kubectl.run("create", "configmap", "mine", "--from-literal=policy.yaml=" + str(held()).replace("None", "null"))
        until(lambda: phase(kubectl, "later") == "Stepping")


def test_alert_rolls_back_only_with_the_right_token(
    api: KubeApi, kubectl: Kubectl, serve: FakeServe, tmp_path: Path
) -> None:
    from reelway.platform.cluster.operator_http import operator_application

    kubectl.apply(over(serve, policy=held()))
    with operating(api, settings_of(serve, tmp_path)) as operator:
        until(lambda: len(serve.routing.arms) == 2)
        application = operator_application(operator, TOKEN, operator.metrics)
        with serve_in_thread(application, "127.0.0.1", 0) as url, httpx.Client(base_url=url) as client:
            body = payload(release=GOOD, starts_at=format_time(time.time() + 1))
            assert client.post(ALERTS_PATH, json=body).status_code == 401
            right = {"Authorization": f"Bearer {TOKEN}"}
            began = time.monotonic()
            assert client.post(ALERTS_PATH, json=body, headers=right).json()["changed"]
            until(lambda: len(serve.routing.arms) == 1)
            assert time.monotonic() - began < 2
            assert client.get("/healthz").status_code == 200
            assert client.get("/readyz").json() == {"status": "active"}
            assert "reelway_rollout_decisions_total" in client.get("/metrics").text
        kubectl.run("wait", "--for=condition=RolledBack", "releaserollout/one", "--timeout=30s")


def test_standby_operator_rejects_alerts(api: KubeApi, serve: FakeServe, tmp_path: Path) -> None:
    with pytest.raises(KubernetesError, match="is on standby"):
        RolloutOperator(api, settings_of(serve, tmp_path)).deliver([])


def test_lease_has_one_holder_at_a_time(api: KubeApi) -> None:
    now = [0.0]
    first = LeaderElector(api, "it", "a", clock=lambda: now[0])
    second = LeaderElector(api, "it", "b", clock=lambda: now[0])
    assert first.try_acquire_or_renew()
    assert not second.try_acquire_or_renew()
    now[0] += 9
    assert first.try_acquire_or_renew()
    now[0] += 9
    assert not second.try_acquire_or_renew()  # its record changed 9 s ago by the local clock
    now[0] += 11
    assert second.try_acquire_or_renew()
    assert not first.try_acquire_or_renew()
    second.release()
    assert first.try_acquire_or_renew()
    document = api.get("coordination.k8s.io/v1/leases/it")
    assert document is not None
    assert document["spec"]["leaseTransitions"] == 3


def test_operator_exits_when_it_loses_the_lease(api: KubeApi, serve: FakeServe, tmp_path: Path) -> None:
    operator, stop = RolloutOperator(api, settings_of(serve, tmp_path, lease={"duration_s": 1.0})), threading.Event()
    failures: list[Exception] = []

    def run() -> None:
        try:
            operator.run(stop)
        except KubernetesError as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: operator.active)
    LeaderElector(api, "reelway-operator", "operator-0").release()
    thief = LeaderElector(api, "reelway-operator", "thief")
    until(thief.try_acquire_or_renew)
    thread.join(20)
    assert "the lease was lost" in str(failures[0])


class Forked:
    """A process that forks operators on request."""

    def __init__(self, api: KubeApi, serve: FakeServe, tmp_path: Path) -> None:
        (tmp_path / "token").write_text(TOKEN)
        command = [
            sys.executable,
            "-m",
            "tests.support.cluster.forked_operator",
            api.namespace,
            str(tmp_path / "token"),
            serve.url,
        ]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def begin(self) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return int(self._answer())

    def end(self, pid: int, number: int) -> int:
        os.kill(pid, number)
        return int(self._answer())

    def close(self) -> None:
        self._process.communicate(timeout=20)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


@pytest.mark.slow
@pytest.mark.parametrize(("release", "condition"), [(GOOD, "Promoted"), (BAD, "RolledBack")])
def test_operator_killed_at_ten_random_points_converges(
    api: KubeApi, kubectl: Kubectl, serve: FakeServe, tmp_path: Path, release: str, condition: str
) -> None:
    forked, chance = Forked(api, serve, tmp_path), random.Random(release)
    kubectl.apply(over(serve, release=release))
    try:
        for _ in range(10):
            pid = forked.begin()
            time.sleep(chance.uniform(0.1, 1.2))
            assert forked.end(pid, signal.SIGKILL) == -signal.SIGKILL
        pid = forked.begin()
        kubectl.run("wait", f"--for=condition={condition}", "releaserollout/one", "--timeout=60s")
        began = time.monotonic()
        assert forked.end(pid, signal.SIGTERM) == 0
        assert time.monotonic() - began < 5
    finally:
        forked.close()
    weights = [sum(a.weight_bp for a in told.arms if a.release == release) for _, told in serve.written]
    if release == GOOD:
        assert weights == sorted(weights)
        assert weights[-1] == 10_000
    else:
        peak = weights.index(max(weights))
        assert weights[-1] == 0
        assert weights[peak:] == sorted(weights[peak:], reverse=True)
        assert serve.releases == {STABLE}
    history = [one["action"] for one in kubectl.read("one")["status"]["history"]]
    assert len([one for one in history if one in ("promote", "roll_back")]) == 1
