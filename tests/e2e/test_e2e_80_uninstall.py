"""`helm uninstall` leaves the objects that UPGRADE.md lists, and nothing else."""

from __future__ import annotations

import pytest
from tests.support.cluster.kubectl import Kubectl
from tests.support.e2e.flow import Flow
from tests.support.e2e.installation import NAME
from tests.support.e2e.wait_until import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
SAID = (
    "lease.coordination.k8s.io/reelway-operator",
    "secret/reelway-secrets",
    "releaserollout.reelway.dev/",
    "release.reelway.dev/",
)
"""The operator's Lease, the generated Secret, and resources of users."""
OURS = (
    "persistentvolumeclaim/releases",
    "configmap/reelway-public-keys",
    "pod/load",
    "configmap/load-files",
    "configmap/team-policy",
)
"""Objects of the test harness."""
CLUSTERS = ("configmap/kube-root-ca.crt", "serviceaccount/default")
NOISE = ("events", "events.events.k8s.io", "pods.metrics.k8s.io")


def test_uninstall_leaves_only_documented_objects(flow: Flow) -> None:
    assert any(name.endswith(f"/{NAME}-operator") for name in _objects(flow.kubectl))
    flow.installation.uninstall()
    until("KubeRay's objects are deleted", lambda: not _left(flow), 120, lambda: f"left: {_left(flow)}")
    kept = [name for name in _objects(flow.kubectl) if name.startswith(SAID)]
    assert SAID[0] in kept
    flow.note("objects left by helm uninstall beyond what UPGRADE.md says", 0.0, "objects", "0", True)


def test_ended_rollouts_can_be_deleted_without_an_operator(flow: Flow) -> None:
    """An ended rollout has no finalizer."""
    held = "jsonpath={range .items[*]}{.metadata.name} {.metadata.finalizers}{'\\n'}{end}"
    said = flow.kubectl.run("get", "releaserollouts", "-o", held)
    assert said.strip()
    flow.kubectl.run("delete", "releaserollouts", "--all", "--timeout=30s")
    flow.load.stop()


def _left(flow: Flow) -> list[str]:
    return [name for name in _objects(flow.kubectl) if not name.startswith((*SAID, *OURS, *CLUSTERS))]


def _objects(kubectl: Kubectl) -> list[str]:
    """Names of all objects of the namespace, of every kind that can be listed."""
    kinds = kubectl.run("api-resources", "--namespaced", "--verbs=list", "-o", "name").split()
    asked = ",".join(kind for kind in kinds if kind not in NOISE)
    return [line for line in kubectl.run("get", asked, "-o", "name", "--ignore-not-found").split() if "/" in line]
