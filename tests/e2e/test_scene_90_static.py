"""The same where no operator may be installed: plain pods, Serve's REST API, the same controller."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.e2e.clusters import Cluster
from tests.e2e.conftest import Flow
from tests.e2e.installation import NAME, Installation
from tests.e2e.load_pod import constant_load
from tests.e2e.made_releases import made_releases
from tests.e2e.rollouts import HELD, begin, until_phase
from tests.e2e.watched import unnoticed

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(420)]
BACKEND = {"serve": {"api": f"http://{NAME}-head:8265", "url": f"http://{NAME}-router:8000"}}


@pytest.fixture(scope="module")
def static(cluster: Cluster) -> Iterator[Flow]:
    with made_releases(cluster, 3) as releases, cluster.namespace("reelway-e2e-static") as kubectl:
        releases.deliver(kubectl)
        installation = Installation(cluster, kubectl, releases, mode="static")
        with constant_load(kubectl, installation.url) as load:
            flow = Flow(installation, load, releases)
            try:
                yield flow
            finally:
                installation.uninstall()


def test_plain_pods_give_a_slate_after_helm_install(static: Flow) -> None:
    began = static.load.now()
    static.installation.install()
    static.load.until_answered_by(static.releases.ids[0], since=began, within_s=360)
    static.installation.until_ready()
    static.live = static.releases.ids[0]
    assert "videos of release" in static.installation.test()


def test_a_good_release_is_promoted_without_kuberay(static: Flow) -> None:
    with unnoticed(static, "static mode, promotion"):
        begin(static.kubectl, "good", static.releases.ids[1], backend=BACKEND)
        until_phase(static.kubectl, "good", "Promoted")
    static.live = static.releases.ids[1]


def test_an_alert_takes_a_release_back_without_kuberay(static: Flow) -> None:
    bad, installation = static.releases.ids[2], static.installation
    with unnoticed(static, "static mode, rollback by webhook"):
        began = static.load.now()
        begin(static.kubectl, "bad", bad, HELD, backend=BACKEND)
        static.load.until_answered_by(bad, since=began, within_s=120, count=5)
        static.load.alert(installation.webhook, installation.webhook_token, bad)
        until_phase(static.kubectl, "bad", "RolledBack")


def test_a_killed_head_comes_back_on_the_release_that_is_live(static: Flow) -> None:
    """Its keeper starts what Helm knows of; the operator brings back what is recorded."""
    killed = static.load.now()
    static.kubectl.run("delete", "pod", f"{NAME}-head-0", "--grace-period=0", "--force", "--wait=true")
    back = static.load.until_answered_by(static.live, since=killed + 1, within_s=240) - killed
    static.installation.until_ready()
    until_phase(static.kubectl, "bad", "RolledBack")
    assert back > 0


def test_nothing_of_it_is_left_after_uninstall(static: Flow) -> None:
    static.kubectl.run("delete", "releaserollouts", "--all", "--timeout=60s")
    static.installation.uninstall()
    kinds = "deployments,statefulsets,services,configmaps,secrets,roles,rolebindings,networkpolicies"
    named = f"app.kubernetes.io/instance={NAME}"
    assert not static.kubectl.run("get", kinds, "-l", named, "-o", "name", "--ignore-not-found").strip()
