"""Upgrades, GitOps and `helm rollback` change values but never the traffic, in mid-rollout and after a promotion.

``releases.initial`` of the values is not the live release here. A chart that wrote it would move all viewers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from tests.support.e2e.disruption_check import expect_no_disruption
from tests.support.e2e.installation import CLIENT, NAME, Installation
from tests.support.e2e.rollouts import HELD, begin, phase, wait_until_phase
from tests.support.e2e.shared_installation import SharedInstallation
from tests.support.e2e.wait_until import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(420)]
UNRELATED: dict[str, Any] = {
    "monitoring": {"dashboards": {"enabled": True}},
    "networkPolicies": {"clients": [CLIENT, {"podSelector": {"matchLabels": {"app": "front"}}}]},
}
"""Values that affect no pod and no option of the service."""
MORE_REPLICAS: dict[str, Any] = {**UNRELATED, "serving": {"deployments": {"ranking": {"replicas": 2}}}}
"""Values that affect the Serve config and no pod."""


@dataclass(frozen=True)
class LiveState:
    """State of the cluster that no rendering may change."""

    serve_config: str
    routing: str
    secret: str
    rollouts: str


@pytest.fixture
def promoted(shared: SharedInstallation) -> str:
    """The live release, which is not the initial one."""
    if shared.live == shared.releases.ids[0]:
        begin(shared.kubectl, "before-upgrade", shared.releases.ids[1], force=True)
        wait_until_phase(shared.kubectl, "before-upgrade", "Promoted")
        shared.live = shared.releases.ids[1]
    return shared.live


def test_upgrade_of_unrelated_values_disturbs_no_request(shared: SharedInstallation, promoted: str) -> None:
    with expect_no_disruption(shared, "helm upgrade"):
        shared.installation.upgrade(UNRELATED)
        _still_on(shared, promoted)
    assert _dashboards(shared.installation)


def test_helm_rollback_restores_values_without_moving_viewers(shared: SharedInstallation, promoted: str) -> None:
    """Revision 1 is older than every rollout of the installation."""
    installation = shared.installation
    with expect_no_disruption(shared, "helm rollback to the first revision"):
        installation.upgrade(UNRELATED)
        assert _dashboards(installation)
        before = _live_state(shared)
        installation.roll_back(1)
        assert _live_state(shared) == before
        _still_on(shared, promoted)
    assert not _dashboards(installation)


def test_changed_options_reach_serve_without_moving_viewers(shared: SharedInstallation) -> None:
    with expect_no_disruption(shared, "helm upgrade of a deployment's replicas"):
        shared.installation.upgrade(MORE_REPLICAS)
        until("two replicas rank", lambda: _ranking_replicas(shared) == 2, 90)
        _still_on(shared, shared.live)


def test_applying_the_chart_in_mid_rollout_moves_no_viewer(shared: SharedInstallation, promoted: str) -> None:
    canary = shared.releases.ids[3]
    with expect_no_disruption(
        shared, "helm template | kubectl apply twice, helm upgrade --reuse-values, in mid-rollout"
    ):
        begin(shared.kubectl, "applied", canary, HELD)
        until(
            "the canary has half of the viewers",
            lambda: phase(shared.kubectl, "applied") in ("Stepping", "Holding"),
            90,
        )
        shared.load.wait_until_answered_by(canary, since=shared.load.now(), within_s=60, count=10)
        before = _live_state(shared)
        _apply_again(shared)
        assert _live_state(shared) == before
        _both_arms_answer(shared, canary, promoted)
    _command(shared, "applied", "promote")
    wait_until_phase(shared.kubectl, "applied", "Promoted")
    shared.live = canary


def test_applying_the_chart_after_a_promotion_moves_no_viewer(shared: SharedInstallation) -> None:
    assert shared.live != shared.releases.ids[0]
    with expect_no_disruption(
        shared, "helm template | kubectl apply twice, helm upgrade --reuse-values, after a promotion"
    ):
        before = _live_state(shared)
        _apply_again(shared)
        assert _live_state(shared) == before
        _still_on(shared, shared.live)


def _apply_again(shared: SharedInstallation) -> None:
    """Applies the values of the last upgrade. Afterwards kubectl co-owns the fields that Helm owns."""
    for _ in range(2):
        shared.installation.apply(MORE_REPLICAS)
    shared.installation.upgrade_reusing_values()


def _live_state(shared: SharedInstallation) -> LiveState:
    kubectl = shared.kubectl
    rollouts = json.loads(kubectl.run("get", "releaserollouts", "-o", "json"))["items"]
    return LiveState(
        serve_config=kubectl.run("get", "rayservice", NAME, "-o", "jsonpath={.spec.serveConfigV2}"),
        routing=json.dumps(shared.installation.routing(), sort_keys=True),
        secret=kubectl.run("get", "secret", f"{NAME}-secrets", "-o", "jsonpath={.metadata.uid} {.data}"),
        rollouts=str(sorted((one["metadata"]["name"], one["status"].get("phase")) for one in rollouts)),
    )


def _both_arms_answer(shared: SharedInstallation, canary: str, stable: str) -> None:
    """Fails unless both arms answer and no other release does."""
    moment = shared.load.now()
    for release in (canary, stable):
        shared.load.wait_until_answered_by(release, since=moment, within_s=30, count=10)
    assert set(shared.load.rows(since=moment)["release"]) <= {canary[:12].encode(), stable[:12].encode(), b""}


def _still_on(shared: SharedInstallation, release: str) -> None:
    """Fails unless only this release answers once KubeRay has observed the newest RayService."""
    observed = "jsonpath={.metadata.generation} {.status.observedGeneration}"
    path = ("get", "rayservice", NAME, "-o", observed)
    until("KubeRay has observed the RayService", lambda: len(set(shared.kubectl.run(*path).split())) == 1, 30)
    moment = shared.load.now()
    shared.load.wait_until_answered_by(release, since=moment, within_s=20, count=40)
    assert set(shared.load.rows(since=moment)["release"]) <= {release[:12].encode(), b""}


def _command(shared: SharedInstallation, rollout: str, verb: str) -> None:
    command = {"id": f"e2e-{verb}", "verb": verb, "actor": "e2e", "force": True}
    change = json.dumps({"spec": {"commands": [command]}})
    shared.kubectl.run("patch", "releaserollout", rollout, "--type=merge", "-p", change)


def _dashboards(installation: Installation) -> bool:
    names = installation.kubectl.run("get", "configmap", "-l", "grafana_dashboard=1", "-o", "name")
    return "configmap/" in names


def _ranking_replicas(shared: SharedInstallation) -> int:
    application = shared.installation.serve_details()["applications"][shared.live]
    return len([each for each in application["deployments"]["Ranking"]["replicas"] if each["state"] == "RUNNING"])
