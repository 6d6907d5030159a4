"""`helm upgrade` and `helm rollback` while a promoted release is live: values change, traffic does not.

`releases.initial` is another release than the live one here, so that a Helm which wrote it would be seen.
"""

from __future__ import annotations

from typing import Any

import pytest
from tests.e2e.conftest import Flow
from tests.e2e.installation import CLIENT, NAME, Installation
from tests.e2e.rollouts import begin, phase, until_phase
from tests.e2e.waiting import until
from tests.e2e.watched import unnoticed

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
BESIDE: dict[str, Any] = {
    "monitoring": {"dashboards": {"enabled": True}},
    "networkPolicies": {"clients": [CLIENT, {"podSelector": {"matchLabels": {"app": "front"}}}]},
}
"""What touches no pod."""
MORE: dict[str, Any] = {**BESIDE, "serving": {"deployments": {"ranking": {"replicas": 2}}}}
"""What changes the document, and no pod either."""


@pytest.fixture
def other(flow: Flow) -> str:
    """The release that is live is not the first one."""
    if flow.live == flow.releases.ids[0]:
        begin(flow.kubectl, "before-upgrade", flow.releases.ids[1], force=True)
        until_phase(flow.kubectl, "before-upgrade", "Promoted")
        flow.live = flow.releases.ids[1]
    return flow.live


def test_an_upgrade_of_values_that_touch_no_pod_is_not_noticed(flow: Flow, other: str) -> None:
    with unnoticed(flow, "helm upgrade"):
        flow.installation.upgrade(BESIDE)
        _still_on(flow, other)
    assert flow.kubectl.run("get", "configmap", "-l", "grafana_dashboard=1", "-o", "name").strip()


def test_an_upgrade_in_the_middle_of_a_rollout_leaves_the_weights(flow: Flow, other: str) -> None:
    with unnoticed(flow, "helm upgrade in a rollout"):
        begin(flow.kubectl, "upgraded", flow.releases.ids[3])
        until("the rollout has begun", lambda: phase(flow.kubectl, "upgraded") in ("Stepping", "Holding"), 90)
        flow.installation.upgrade({})
        until_phase(flow.kubectl, "upgraded", "Promoted")
    assert other != flow.releases.ids[3]
    flow.live = flow.releases.ids[3]
    _still_on(flow, flow.live)


def test_helm_rollback_goes_back_in_values_and_not_in_traffic(flow: Flow) -> None:
    installation = flow.installation
    with unnoticed(flow, "helm rollback"):
        installation.upgrade({})
        plain = installation.revision()
        installation.upgrade(BESIDE)
        assert _dashboards(installation)
        installation.roll_back(plain)
        _still_on(flow, flow.live)
    assert not _dashboards(installation)


def test_helm_rollback_past_a_rollout_is_refused_before_it_moves_anybody(flow: Flow) -> None:
    """The manifest of that time names another release; the operator owns the field, and Helm says so."""
    with unnoticed(flow, "helm rollback that is refused"):
        with pytest.raises(AssertionError, match="conflict"):
            flow.installation.roll_back(1)
        _still_on(flow, flow.live)


def test_an_upgrade_that_changes_the_document_keeps_the_release_that_is_live(flow: Flow) -> None:
    with unnoticed(flow, "helm upgrade of a deployment's replicas"):
        flow.installation.upgrade(MORE, "--force-conflicts")
        until("two replicas rank", lambda: _replicas(flow) == 2, 90)
        _still_on(flow, flow.live)


def _still_on(flow: Flow, release: str) -> None:
    """KubeRay has had time to act upon the declaration, and everybody is where they were."""
    observed = "jsonpath={.metadata.generation} {.status.observedGeneration}"
    path = ("get", "rayservice", NAME, "-o", observed)
    until("KubeRay has seen the declaration", lambda: len(set(flow.kubectl.run(*path).split())) == 1, 30)
    moment = flow.load.now()
    flow.load.until_answered_by(release, since=moment, within_s=20, count=40)
    assert set(flow.load.rows(since=moment)["release"]) <= {release[:12].encode(), b""}


def _dashboards(installation: Installation) -> bool:
    said = installation.kubectl.run("get", "configmap", "-l", "grafana_dashboard=1", "-o", "name")
    return "configmap/" in said


def _replicas(flow: Flow) -> int:
    application = flow.installation.serve_details()["applications"][flow.live]
    return len([one for one in application["deployments"]["Ranking"]["replicas"] if one["state"] == "RUNNING"])
