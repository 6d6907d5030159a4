"""A good release is promoted under load without a failed request. Its policy is in a ConfigMap."""

from __future__ import annotations

import pytest
import yaml
from tests.support.e2e.disruption_check import expect_no_disruption
from tests.support.e2e.rollouts import STEPPED, begin, wait_until_phase
from tests.support.e2e.shared_installation import SharedInstallation

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def test_promotion_fails_no_request(shared: SharedInstallation) -> None:
    before, good = shared.live, shared.releases.ids[1]
    shared.kubectl.apply({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "team-policy"},
        "data": {"policy.yaml": yaml.safe_dump(STEPPED)},
    })  # fmt: skip
    with expect_no_disruption(shared, "promotion"):
        begin(shared.kubectl, "good", good, None, policyRef={"name": "team-policy"})
        wait_until_phase(shared.kubectl, "good", "Promoted")
    shared.live = good
    moment = shared.load.now()
    shared.load.wait_until_answered_by(good, since=moment, within_s=10, count=10)
    assert not len(shared.load.answers(before, since=moment))


def test_events_with_the_history_show_every_step(shared: SharedInstallation) -> None:
    reasons = [entry["reason"] for entry in shared.kubectl.read("good")["status"]["history"]]
    events = shared.kubectl.run("get", "events", "--field-selector=involvedObject.name=good")
    for word in ("to step 1, 10 %", "to step 2, 50 %"):
        assert any(reason.startswith(word) for reason in reasons)
        assert word in events


def test_serve_config_names_the_promoted_release(shared: SharedInstallation) -> None:
    """KubeRay would submit the promoted release again, not the initial one."""
    declared = shared.kubectl.run("get", "rayservice", "reelway", "-o", "jsonpath={.spec.serveConfigV2}")
    assert f"release: {shared.live}" in declared
    assert shared.installation.ray_service_ready()
