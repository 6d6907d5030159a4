"""Upgrades, GitOps and `helm rollback` change values but never the traffic, in mid-rollout and after a promotion.

``releases.initial`` of the values is not the live release here. A chart that wrote it would move all viewers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from tests.support.e2e.disruption_check import expect_no_disruption
from tests.support.e2e.flow import Flow
from tests.support.e2e.installation import CLIENT, NAME, Installation
from tests.support.e2e.rollouts import HELD, begin, phase, until_phase
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
def promoted(flow: Flow) -> str:
    """The live release, which is not the initial one."""
    if flow.live == flow.releases.ids[0]:
        begin(flow.kubectl, "before-upgrade", flow.releases.ids[1], force=True)
        until_phase(flow.kubectl, "before-upgrade", "Promoted")
        flow.live = flow.releases.ids[1]
    return flow.live


def test_upgrade_of_unrelated_values_disturbs_no_request(flow: Flow, promoted: str) -> None:
    with expect_no_disruption(flow, "helm upgrade"):
        flow.installation.upgrade(UNRELATED)
        _still_on(flow, promoted)
    assert _dashboards(flow.installation)


def test_helm_rollback_restores_values_without_moving_viewers(flow: Flow, promoted: str) -> None:
    """Revision 1 is older than every rollout of the flow."""
    installation = flow.installation
    with expect_no_disruption(flow, "helm rollback to the first revision"):
        installation.upgrade(UNRELATED)
        assert _dashboards(installation)
        before = _live_state(flow)
        installation.roll_back(1)
        assert _live_state(flow) == before
        _still_on(flow, promoted)
    assert not _dashboards(installation)


def test_changed_options_reach_serve_without_moving_viewers(flow: Flow) -> None:
    with expect_no_disruption(flow, "helm upgrade of a deployment's replicas"):
        flow.installation.upgrade(MORE_REPLICAS)
        until("two replicas rank", lambda: _ranking_replicas(flow) == 2, 90)
        _still_on(flow, flow.live)


def test_applying_the_chart_in_mid_rollout_moves_no_viewer(flow: Flow, promoted: str) -> None:
    canary = flow.releases.ids[3]
    with expect_no_disruption(flow, "helm template | kubectl apply twice, helm upgrade --reuse-values, in mid-rollout"):
        begin(flow.kubectl, "applied", canary, HELD)
        until(
            "the canary has half of the viewers", lambda: phase(flow.kubectl, "applied") in ("Stepping", "Holding"), 90
        )
        flow.load.until_answered_by(canary, since=flow.load.now(), within_s=60, count=10)
        before = _live_state(flow)
        _apply_in_every_way(flow)
        assert _live_state(flow) == before
        _shares(flow, canary, promoted)
    _command(flow, "applied", "promote")
    until_phase(flow.kubectl, "applied", "Promoted")
    flow.live = canary


def test_applying_the_chart_after_a_promotion_moves_no_viewer(flow: Flow) -> None:
    assert flow.live != flow.releases.ids[0]
    with expect_no_disruption(
        flow, "helm template | kubectl apply twice, helm upgrade --reuse-values, after a promotion"
    ):
        before = _live_state(flow)
        _apply_in_every_way(flow)
        assert _live_state(flow) == before
        _still_on(flow, flow.live)


def _apply_in_every_way(flow: Flow) -> None:
    """The values are those of the last upgrade. From here on kubectl co-owns the fields that Helm owns."""
    for _ in range(2):
        flow.installation.apply(MORE_REPLICAS)
    flow.installation.upgrade_reusing_values()


def _live_state(flow: Flow) -> LiveState:
    kubectl = flow.kubectl
    rollouts = json.loads(kubectl.run("get", "releaserollouts", "-o", "json"))["items"]
    return LiveState(
        serve_config=kubectl.run("get", "rayservice", NAME, "-o", "jsonpath={.spec.serveConfigV2}"),
        routing=json.dumps(flow.installation.routing(), sort_keys=True),
        secret=kubectl.run("get", "secret", f"{NAME}-secrets", "-o", "jsonpath={.metadata.uid} {.data}"),
        rollouts=str(sorted((one["metadata"]["name"], one["status"].get("phase")) for one in rollouts)),
    )


def _shares(flow: Flow, canary: str, stable: str) -> None:
    """Both arms keep answering, and no other release does."""
    moment = flow.load.now()
    for release in (canary, stable):
        flow.load.until_answered_by(release, since=moment, within_s=30, count=10)
    assert set(flow.load.rows(since=moment)["release"]) <= {canary[:12].encode(), stable[:12].encode(), b""}


def _still_on(flow: Flow, release: str) -> None:
    """After KubeRay has seen the newest RayService, only this release answers."""
    observed = "jsonpath={.metadata.generation} {.status.observedGeneration}"
    path = ("get", "rayservice", NAME, "-o", observed)
    until("KubeRay has observed the RayService", lambda: len(set(flow.kubectl.run(*path).split())) == 1, 30)
    moment = flow.load.now()
    flow.load.until_answered_by(release, since=moment, within_s=20, count=40)
    assert set(flow.load.rows(since=moment)["release"]) <= {release[:12].encode(), b""}


def _command(flow: Flow, rollout: str, verb: str) -> None:
    command = {"id": f"e2e-{verb}", "verb": verb, "actor": "e2e", "force": True}
    change = json.dumps({"spec": {"commands": [command]}})
    flow.kubectl.run("patch", "releaserollout", rollout, "--type=merge", "-p", change)


def _dashboards(installation: Installation) -> bool:
    found = installation.kubectl.run("get", "configmap", "-l", "grafana_dashboard=1", "-o", "name")
    return "configmap/" in found


def _ranking_replicas(flow: Flow) -> int:
    application = flow.installation.serve_details()["applications"][flow.live]
    return len([one for one in application["deployments"]["Ranking"]["replicas"] if one["state"] == "RUNNING"])
