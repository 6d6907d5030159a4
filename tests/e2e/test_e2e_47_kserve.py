"""Rankers as InferenceServices under KServe's own controller: created, kept, killed and deleted with their releases.

This module has its own installation with ``ranker.backend: kserve``. Rollouts fail no request, and slates without a
ranker keep retrieval's order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

import pytest
from tests.support.bench_results import write_report
from tests.support.cluster.kubectl import Kubectl
from tests.support.e2e.clusters import Cluster
from tests.support.e2e.disruption_check import expect_no_disruption
from tests.support.e2e.installation import Installation
from tests.support.e2e.load_pod import constant_load
from tests.support.e2e.release_fixtures import build_release_fixtures
from tests.support.e2e.rollouts import HELD, STEPPED, begin, wait_until_phase
from tests.support.e2e.shared_installation import SharedInstallation
from tests.support.e2e.wait_until import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(420)]
RANKERS: Final = "inferenceservices.serving.kserve.io"
SHORT: Final = 12
VALUES: Final[dict[str, Any]] = {
    "ranker": {
        "backend": "kserve",
        "replicas": 2,
        "resources": {"requests": {"cpu": "50m", "memory": "256Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}},
    }
}
SHORT_RETENTION: Final[dict[str, Any]] = {**STEPPED, "retention_s": 5}
"""Retains the previous release with its ranker for five seconds only."""


@pytest.fixture(scope="module")
def served(cluster: Cluster) -> Iterator[SharedInstallation]:
    resources = cluster.kubectl("default").run("api-resources", "--api-group=serving.kserve.io", "-o", "name")
    if RANKERS not in resources:
        pytest.skip("no KServe in this cluster; `make cluster-kserve` installs its controller on the node")
    with build_release_fixtures(cluster, 3) as releases, cluster.namespace("reelway-e2e-kserve") as kubectl:
        releases.deliver(kubectl)
        installation = Installation(cluster, kubectl, releases, given=VALUES)
        with constant_load(kubectl, installation.url) as load:
            shared = SharedInstallation(installation, load, releases)
            try:
                yield shared
            finally:
                installation.uninstall()
                write_report("e2e_kserve", shared.rows)


def test_inference_service_ranks_the_initial_release(served: SharedInstallation) -> None:
    first, began = served.releases.ids[0], served.load.now()
    served.installation.install()
    served.load.wait_until_answered_by(first, since=began, within_s=360)
    served.installation.wait_until_ready()
    served.live = first
    _wait_until_ranked(served)
    assert _rankers(served.kubectl) == {first[:SHORT]: True}
    pods = _pods(served.kubectl, first)
    assert len(pods) == VALUES["ranker"]["replicas"]
    assert {_requests(served.kubectl, name) for name in pods} == {("50m", "256Mi")}, (
        "KServe's defaults replaced the values"
    )


def test_promotion_creates_a_ranker_before_deleting_the_old_one(served: SharedInstallation) -> None:
    before, good = served.live, served.releases.ids[1]
    with expect_no_disruption(served, "KServe, promotion", "serving"):
        began = served.load.now()
        begin(served.kubectl, "good", good, SHORT_RETENTION)
        wait_until_phase(served.kubectl, "good", "Promoted", within_s=240)
        served.live = good
        until(
            "the previous ranker is deleted", lambda: _rankers(served.kubectl).keys() == {good[:SHORT]}, 90,
            lambda: str(_rankers(served.kubectl)),
        )  # fmt: skip
    rows = served.load.answers(good, since=began)
    _note_degraded(served, "KServe, promotion: slates of the new release without its ranker", rows)
    assert not len(served.load.answers(before, since=served.load.now()))


def test_applying_the_chart_changes_no_inference_service(served: SharedInstallation) -> None:
    """The initial release of the values was retired; its InferenceService must not come back."""
    with expect_no_disruption(
        served, "KServe, helm template | kubectl apply twice, helm upgrade --reuse-values", "serving"
    ):
        before = _identities(served.kubectl)
        for _ in range(2):
            served.installation.apply()
        served.installation.upgrade_reusing_values()
        served.load.wait_until_answered_by(served.live, since=served.load.now(), within_s=20, count=40)
    assert _identities(served.kubectl) == before


def test_rollback_does_not_wait_for_the_ranker(served: SharedInstallation) -> None:
    bad, installation = served.releases.ids[2], served.installation
    with expect_no_disruption(served, "KServe, rollback by webhook", "serving"):
        began = served.load.now()
        begin(served.kubectl, "bad", bad, HELD)
        served.load.wait_until_answered_by(bad, since=began, within_s=180, count=5)
        alerted = served.load.alert(installation.webhook, installation.webhook_token, bad)
        wait_until_phase(served.kubectl, "bad", "RolledBack")
    sent = served.load.answers(bad, since=alerted)["sent"]
    taken = float(sent.max() - alerted) if len(sent) else 0.0
    served.note("KServe: alert sent -> last new request on the release, once", taken, "s", "under 2", taken < 2.0)
    assert taken < 2.0


def test_killed_rankers_fail_no_request(served: SharedInstallation) -> None:
    with expect_no_disruption(served, "KServe, both pods of the ranker killed", "serving"):
        killed = served.load.now()
        pods = _pods(served.kubectl, served.live)
        served.kubectl.run("delete", "pod", *pods, "--grace-period=0", "--force", "--wait=true")
        until("the replacements are ready", lambda: _replacements_ready(served, pods), 120)
        _wait_until_ranked(served)
    rows = served.load.answers(served.live, since=killed)
    _note_degraded(served, "KServe, both pods of the ranker killed: slates without ranking", rows)
    assert rows["degraded"].any(), "no slate was degraded, so the killed pods served no ranker"


def test_uninstall_deletes_the_rankers(served: SharedInstallation) -> None:
    served.kubectl.run("delete", "releaserollouts", "--all", "--timeout=60s")
    served.installation.uninstall()
    listed = ("get", RANKERS, "-o", "name", "--ignore-not-found")
    until("no ranker is left", lambda: not served.kubectl.run(*listed).strip(), 60, lambda: served.kubectl.run(*listed))


def _rankers(kubectl: Kubectl) -> dict[str, bool]:
    """Readiness of every ranker by short release id."""
    services = json.loads(kubectl.run("get", RANKERS, "-o", "json"))["items"]
    return {
        service["metadata"]["labels"]["reelway.dev/release"]: any(
            condition["type"] == "Ready" and condition["status"] == "True"
            for condition in (service.get("status") or {}).get("conditions", ())
        )
        for service in services
    }


def _identities(kubectl: Kubectl) -> dict[str, tuple[str, int]]:
    """Uid and generation of every InferenceService."""
    services = json.loads(kubectl.run("get", RANKERS, "-o", "json"))["items"]
    return {one["metadata"]["name"]: (one["metadata"]["uid"], one["metadata"]["generation"]) for one in services}


def _pods(kubectl: Kubectl, release: str) -> list[str]:
    selector = f"reelway.dev/component=ranker,reelway.dev/release={release[:SHORT]}"
    return kubectl.run("get", "pods", "-l", selector, "-o", "jsonpath={.items[*].metadata.name}").split()


def _requests(kubectl: Kubectl, pod: str) -> tuple[str, str]:
    path = "jsonpath={.spec.containers[?(@.name=='kserve-container')].resources.requests}"
    requests = json.loads(kubectl.run("get", "pod", pod, "-o", path))
    return requests["cpu"], requests["memory"]


def _replacements_ready(shared: SharedInstallation, before: list[str]) -> bool:
    others = set(_pods(shared.kubectl, shared.live)) - set(before)
    ready = "jsonpath={.status.conditions[?(@.type=='Ready')].status}"
    return bool(others) and all(shared.kubectl.run("get", "pod", name, "-o", ready) == "True" for name in others)


def _wait_until_ranked(shared: SharedInstallation) -> None:
    """Waits until the last twenty slates are not degraded."""

    def ranked() -> bool:
        rows = shared.load.answers(shared.live)[-20:]
        return len(rows) == 20 and not rows["degraded"].any()

    until("slates are ranked", ranked, 120, lambda: str(shared.load.answers(shared.live)[-20:]["degraded"]))


def _note_degraded(shared: SharedInstallation, metric: str, rows: Any) -> None:
    shared.note(f"{metric}, of {len(rows)}", float(rows["degraded"].sum()), "slates")
