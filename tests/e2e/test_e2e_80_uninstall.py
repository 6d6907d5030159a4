"""`helm uninstall` leaves the objects that UPGRADE.md lists, and nothing else."""

from __future__ import annotations

import pytest
from tests.support.cluster.kubectl import Kubectl
from tests.support.e2e.installation import NAME
from tests.support.e2e.shared_installation import SharedInstallation
from tests.support.e2e.wait_until import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
DOCUMENTED = (
    "lease.coordination.k8s.io/reelway-operator",
    "secret/reelway-secrets",
    "releaserollout.reelway.dev/",
    "release.reelway.dev/",
)
"""The operator's Lease, the generated Secret, and resources of users."""
HARNESS_OBJECTS = (
    "persistentvolumeclaim/releases",
    "configmap/reelway-public-keys",
    "pod/load",
    "configmap/load-files",
    "configmap/team-policy",
)
"""Objects of the test harness."""
CLUSTERS = ("configmap/kube-root-ca.crt", "serviceaccount/default")
NOISE = ("events", "events.events.k8s.io", "pods.metrics.k8s.io")


def test_uninstall_leaves_only_documented_objects(shared: SharedInstallation) -> None:
    assert any(name.endswith(f"/{NAME}-operator") for name in _objects(shared.kubectl))
    shared.installation.uninstall()
    until("KubeRay's objects are deleted", lambda: not _left(shared), 120, lambda: f"left: {_left(shared)}")
    documented = [name for name in _objects(shared.kubectl) if name.startswith(DOCUMENTED)]
    assert DOCUMENTED[0] in documented
    shared.note("objects left by helm uninstall beyond those in UPGRADE.md", 0.0, "objects", "0", True)


def test_ended_rollouts_can_be_deleted_without_an_operator(shared: SharedInstallation) -> None:
    """An ended rollout has no finalizer."""
    finalizers = "jsonpath={range .items[*]}{.metadata.name} {.metadata.finalizers}{'\\n'}{end}"
    rollouts = shared.kubectl.run("get", "releaserollouts", "-o", finalizers)
    assert rollouts.strip()
    shared.kubectl.run("delete", "releaserollouts", "--all", "--timeout=30s")
    shared.load.stop()


def _left(shared: SharedInstallation) -> list[str]:
    return [
        name for name in _objects(shared.kubectl) if not name.startswith((*DOCUMENTED, *HARNESS_OBJECTS, *CLUSTERS))
    ]


def _objects(kubectl: Kubectl) -> list[str]:
    """Names of all objects of the namespace, of every kind that can be listed."""
    kinds = kubectl.run("api-resources", "--namespaced", "--verbs=list", "-o", "name").split()
    listed = ",".join(kind for kind in kinds if kind not in NOISE)
    return [line for line in kubectl.run("get", listed, "-o", "name", "--ignore-not-found").split() if "/" in line]
