"""A good release is promoted under load without a failed request. Its policy is in a ConfigMap."""

from __future__ import annotations

import pytest
import yaml
from tests.support.e2e.disruption_check import expect_no_disruption
from tests.support.e2e.flow import Flow
from tests.support.e2e.rollouts import STEPPED, begin, until_phase

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def test_promotion_fails_no_request(flow: Flow) -> None:
    before, good = flow.live, flow.releases.ids[1]
    flow.kubectl.apply({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "team-policy"},
        "data": {"policy.yaml": yaml.safe_dump(STEPPED)},
    })  # fmt: skip
    with expect_no_disruption(flow, "promotion"):
        begin(flow.kubectl, "good", good, None, policyRef={"name": "team-policy"})
        until_phase(flow.kubectl, "good", "Promoted")
    flow.live = good
    moment = flow.load.now()
    flow.load.until_answered_by(good, since=moment, within_s=10, count=10)
    assert not len(flow.load.answers(before, since=moment))


def test_events_with_the_history_show_every_step(flow: Flow) -> None:
    reasons = [entry["reason"] for entry in flow.kubectl.read("good")["status"]["history"]]
    events = flow.kubectl.run("get", "events", "--field-selector=involvedObject.name=good")
    for word in ("to step 1, 10 %", "to step 2, 50 %"):
        assert any(reason.startswith(word) for reason in reasons)
        assert word in events


def test_serve_config_names_the_promoted_release(flow: Flow) -> None:
    """KubeRay would submit the promoted release again, not the initial one."""
    declared = flow.kubectl.run("get", "rayservice", "reelway", "-o", "jsonpath={.spec.serveConfigV2}")
    assert f"release: {flow.live}" in declared
    assert flow.installation.ray_service_ready()
