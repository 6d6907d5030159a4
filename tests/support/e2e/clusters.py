"""The cluster of the end-to-end tests: the node of `make cluster`, or the one that KUBECONFIG names."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.support.cluster.kubectl import NODE, ROOT, Kubectl, remove_finalizers
from tests.support.e2e.wait_until import until

CHART: Final = ROOT / "charts" / "reelway"
ENFORCED: Final = "pod-security.kubernetes.io/enforce=restricted"
DELETION_TIMEOUT_S: Final = 120.0


@dataclass(frozen=True)
class Cluster:
    """A kubeconfig with programs. ``own`` marks the node of this repository, whose files and logs are readable."""

    kubeconfig: Path
    own: bool
    live: list[Kubectl] = field(default_factory=list)
    """Namespaces that ``namespace`` created and has not deleted yet."""
    deleting: list[str] = field(default_factory=list)
    """Namespaces that are being deleted; see ``wait_until_deleted``."""

    def kubectl(self, namespace: str) -> Kubectl:
        """kubectl for a namespace."""
        return Kubectl(program("kubectl"), self.kubeconfig, namespace)

    def helm(self, namespace: str, *args: str, within_s: float = 180) -> str:
        """Runs helm and returns its output. A failure raises AssertionError with its message."""
        command = [program("helm"), "--kubeconfig", str(self.kubeconfig), "--namespace", namespace, *args]
        result = subprocess.run(command, capture_output=True, text=True, timeout=within_s, check=False)
        assert result.returncode == 0, f"helm {' '.join(args)}: {result.returncode}: {result.stdout}{result.stderr}"
        return result.stdout

    def audit_log(self) -> Path | None:
        """The API server's audit log; None if it is not readable."""
        path = NODE / "state" / "logs" / "audit.log"
        return path if self.own and path.exists() else None

    @contextmanager
    def namespace(self, prefix: str, labels: Mapping[str, str] | None = None) -> Iterator[Kubectl]:
        """Creates a namespace with the restricted level of Pod Security and deletes it afterwards.

        Kubernetes starts to empty a deleted namespace after 5 s. The block waits only for its claims, whose volumes
        belong to the caller.
        """
        name = f"{prefix}-{uuid.uuid4().hex[:6]}"
        kubectl = self.kubectl(name)
        kubectl.run("create", "namespace", name)
        self.live.append(kubectl)
        try:
            assignments = [f"{key}={value}" for key, value in (labels or {}).items()]
            kubectl.run("label", "namespace", name, ENFORCED, "reelway.dev/e2e=true", *assignments)
            yield kubectl
        finally:
            self.live.remove(kubectl)
            self.deleting.append(name)
            retry_cleanup(lambda: remove_finalizers(kubectl))
            retry_cleanup(lambda: kubectl.run("delete", "namespace", name, "--wait=false", "--ignore-not-found"))
            retry_cleanup(lambda: kubectl.run("delete", "pvc", "--all", "--timeout=60s"))

    def wait_until_deleted(self) -> None:
        """Waits until all deleted namespaces no longer exist."""
        while self.deleting:
            retry_cleanup(functools.partial(self._wait_until_deleted, self.deleting[-1]))
            self.deleting.pop()

    def _wait_until_deleted(self, name: str) -> None:
        listed = ("get", "namespace", name, "--ignore-not-found", "-o", "name")
        until(
            f"namespace {name} is deleted", lambda: not self.kubectl("default").run(*listed).strip(), DELETION_TIMEOUT_S
        )


def retry_cleanup(clean: Callable[[], object]) -> None:
    """Repeats a clean-up until it succeeds, so that a slow API server leaves no objects behind.

    Raises:
        AssertionError: if it fails for ``DELETION_TIMEOUT_S`` seconds.
    """
    deadline = time.monotonic() + DELETION_TIMEOUT_S
    while True:
        try:
            clean()
            return
        except (AssertionError, subprocess.TimeoutExpired):
            if time.monotonic() > deadline:
                raise
        time.sleep(1)


def program(name: str) -> str:
    """Returns the path of a program: from the PATH, or the one built for the node."""
    path = shutil.which(name) or str(NODE / "bin" / name)
    assert Path(path).exists(), f"no {name} on the PATH or in {NODE / 'bin'}; `make cluster` builds it"
    return path


def find_cluster() -> Cluster | None:
    """Returns the cluster to use; None if there is none."""
    external, own = os.environ.get("KUBECONFIG"), NODE / "state" / "admin.kubeconfig"
    if external and os.environ.get("REELWAY_CLUSTER_TESTS") and Path(external).resolve() != own.resolve():
        return Cluster(Path(external), own=False)
    return Cluster(own, own=True) if own.exists() else None
