"""`helm install` with images on the node: time until a viewer gets a slate."""

from __future__ import annotations

import pytest
from tests.support.e2e.shared_installation import SharedInstallation

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(420)]
FIRST_SLATE_S = 180.0


def test_first_slate_arrives_within_three_minutes(shared: SharedInstallation) -> None:
    first, began = shared.releases.ids[0], shared.load.now()
    shared.installation.install()
    answered = shared.load.wait_until_answered_by(first, since=began, within_s=2 * FIRST_SLATE_S)
    shared.live = first
    taken = answered - began
    shared.note("helm install -> first slate", taken, "s", f"under {FIRST_SLATE_S:g}", taken < FIRST_SLATE_S)
    shared.installation.wait_until_ready()
    assert taken < FIRST_SLATE_S


def test_helm_test_receives_a_slate(shared: SharedInstallation) -> None:
    output = shared.installation.test()
    assert f"videos of release {shared.live[:12]}" in output


def test_every_pod_runs_at_the_restricted_level(shared: SharedInstallation) -> None:
    """The namespace enforces the level, so a pod that violates it cannot exist."""
    labels = shared.kubectl.run("get", "namespace", shared.kubectl.namespace, "-o", "jsonpath={.metadata.labels}")
    assert '"pod-security.kubernetes.io/enforce":"restricted"' in labels
    pods = shared.installation.pods()
    assert {"serving", "operator"} <= {_component(shared, name) for name in pods}
    shared.note("pods under the restricted level, enforced", float(len(pods)), "pods", "all", True)


def _component(shared: SharedInstallation, pod: str) -> str:
    return shared.kubectl.run("get", "pod", pod, "-o", "jsonpath={.metadata.labels.reelway\\.dev/component}")
