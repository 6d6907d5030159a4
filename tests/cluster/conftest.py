"""Fixtures for a real API server: that of `make cluster`, or that of KUBECONFIG if REELWAY_CLUSTER_TESTS is set."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.cluster.fake_serve import FakeServe
from tests.support.cluster.kubectl import NODE, ROOT, Kubectl, remove_finalizers
from tests.support.cluster.ray_service_resource import CRD, declare

from reelway.platform.cluster.kube_api import KubeApi


@pytest.fixture(scope="session")
def kubeconfig() -> Path:
    own = NODE / "state" / "admin.kubeconfig"
    if own.exists():
        return own
    named = os.environ.get("KUBECONFIG")
    if named and os.environ.get("REELWAY_CLUSTER_TESTS"):
        return Path(named)
    pytest.skip("no cluster: bring one up with `make cluster`, or set KUBECONFIG and REELWAY_CLUSTER_TESTS=1")


@pytest.fixture(scope="session")
def installed(kubeconfig: Path) -> Path:
    """Installs the chart's CRDs."""
    admin = Kubectl(_kubectl(), kubeconfig, "default")
    try:
        admin.run("get", "--raw", "/readyz", "--request-timeout=5s")
    except AssertionError as error:
        pytest.skip(f"the cluster of {kubeconfig} does not answer: {error}")
    admin.run(
        "apply", "--server-side", "--force-conflicts", "--validate=strict", "-f", str(ROOT / "charts/reelway/crds")
    )
    crds = ("crd/releaserollouts.reelway.dev", "crd/releases.reelway.dev")
    admin.run("wait", "--for=condition=Established", *crds, "--timeout=20s")
    return kubeconfig


@pytest.fixture
def kubectl(installed: Path) -> Iterator[Kubectl]:
    """Kubectl for a new namespace."""
    name = f"reelway-test-{uuid.uuid4().hex[:8]}"
    admin = Kubectl(_kubectl(), installed, name)
    admin.run("create", "namespace", name)
    try:
        yield admin
    finally:
        remove_finalizers(admin)
        admin.run("delete", "namespace", name, "--wait=false")


@pytest.fixture
def api(kubectl: Kubectl, monkeypatch: pytest.MonkeyPatch) -> KubeApi:
    monkeypatch.setenv("KUBECONFIG", str(kubectl.kubeconfig))
    return KubeApi(kubectl.namespace)


@pytest.fixture
def serve() -> Iterator[FakeServe]:
    fake_serve = FakeServe()
    yield fake_serve
    fake_serve.close()


def _kubectl() -> str:
    program = shutil.which("kubectl") or str(NODE / "bin" / "kubectl")
    if not Path(program).exists():
        pytest.skip("no kubectl on the PATH or in .cluster/bin")
    return program


@pytest.fixture
def kube(kubectl: Kubectl, serve: FakeServe) -> Iterator[Kubectl]:
    """A cluster with the RayService CRD and one RayService that declares what Serve runs. No KubeRay reconciles it."""
    known = "rayservices.ray.io" in kubectl.run("get", "crds", "-o", "name")
    if not known:
        kubectl.apply(CRD)
        kubectl.run("wait", "--for=condition=Established", "crd/rayservices.ray.io", "--timeout=20s")
    declare(kubectl, serve.document)
    yield kubectl
    kubectl.run("delete", "rayservices", "--all")
    if not known:
        kubectl.run("delete", "crd", "rayservices.ray.io")
