"""Fixtures for a real API server: that of `make cluster`, or that of KUBECONFIG if REELWAY_CLUSTER_TESTS is set."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.fake_serve import FakeServe

from reelway.platform.cluster.kube_api import KubeApi

ROOT = Path(__file__).parents[2]
NODE = Path(os.environ.get("REELWAY_CLUSTER_DIR", ROOT / ".cluster"))


class Kubectl:
    """Runs kubectl. ``run`` returns stdout, and stderr as well if another exit code than 0 is expected."""

    def __init__(self, program: str, kubeconfig: Path, namespace: str) -> None:
        self.program, self.kubeconfig, self.namespace = program, kubeconfig, namespace

    def run(self, *words: str, stdin: str | None = None, code: int = 0) -> str:
        command = [self.program, "--kubeconfig", str(self.kubeconfig), "--namespace", self.namespace, *words]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=90, check=False)
        assert done.returncode == code, f"{words}: {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout if code == 0 else done.stdout + done.stderr

    def apply(self, document: Mapping[str, Any], *, code: int = 0) -> str:
        return self.run("apply", "--server-side", "--validate=strict", "-f", "-", stdin=json.dumps(document), code=code)

    def read(self, name: str) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(self.run("get", "releaserollout", name, "-o", "json"))
        return loaded


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
        release_all(admin)
        admin.run("delete", "namespace", name, "--wait=false")


@pytest.fixture
def api(kubectl: Kubectl, monkeypatch: pytest.MonkeyPatch) -> KubeApi:
    monkeypatch.setenv("KUBECONFIG", str(kubectl.kubeconfig))
    return KubeApi(kubectl.namespace)


@pytest.fixture
def serve() -> Iterator[FakeServe]:
    made = FakeServe()
    yield made
    made.close()


def release_all(kubectl: Kubectl) -> None:
    """Removes all finalizers, so that the namespace can be deleted without an operator."""
    for name in kubectl.run("get", "releaserollouts", "-o", "name").split():
        if name.startswith("releaserollout"):
            kubectl.run("patch", name, "--type=merge", "-p", '{"metadata":{"finalizers":null}}')


def _kubectl() -> str:
    program = shutil.which("kubectl") or str(NODE / "bin" / "kubectl")
    if not Path(program).exists():
        pytest.skip("no kubectl on the PATH or in .cluster/bin")
    return program
