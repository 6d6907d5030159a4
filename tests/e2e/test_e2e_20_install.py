"""`helm install` with images on the node: time until a viewer gets a slate."""

from __future__ import annotations

import pytest
from tests.support.e2e.flow import Flow

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(420)]
FIRST_SLATE_S = 180.0


def test_first_slate_arrives_within_three_minutes(flow: Flow) -> None:
    first, began = flow.releases.ids[0], flow.load.now()
    flow.installation.install()
    answered = flow.load.until_answered_by(first, since=began, within_s=2 * FIRST_SLATE_S)
    flow.live = first
    taken = answered - began
    flow.note("helm install -> first slate", taken, "s", f"under {FIRST_SLATE_S:g}", taken < FIRST_SLATE_S)
    flow.installation.until_ready()
    assert taken < FIRST_SLATE_S


def test_helm_test_receives_a_slate(flow: Flow) -> None:
    said = flow.installation.test()
    assert f"videos of release {flow.live[:12]}" in said


def test_every_pod_runs_at_the_restricted_level(flow: Flow) -> None:
    """The namespace enforces the level, so that no other pod could exist."""
    labels = flow.kubectl.run("get", "namespace", flow.kubectl.namespace, "-o", "jsonpath={.metadata.labels}")
    assert '"pod-security.kubernetes.io/enforce":"restricted"' in labels
    pods = flow.installation.pods()
    assert {"serving", "operator"} <= {_component(flow, name) for name in pods}
    flow.note("pods under the restricted level, enforced", float(len(pods)), "pods", "all", True)


def _component(flow: Flow, pod: str) -> str:
    return flow.kubectl.run("get", "pod", pod, "-o", "jsonpath={.metadata.labels.reelway\\.dev/component}")
