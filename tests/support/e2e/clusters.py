"""The cluster of the scenes: the node of `make cluster`, or the one that KUBECONFIG names."""

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

from tests.support.cluster.kubectl import NODE, ROOT, Kubectl, release_all
from tests.support.e2e.wait_until import until

CHART: Final = ROOT / "charts" / "reelway"
ENFORCED: Final = "pod-security.kubernetes.io/enforce=restricted"
GONE_S: Final = 120.0


@dataclass(frozen=True)
class Cluster:
    """A kubeconfig with programs. ``own`` marks the node of this repository, whose files and logs are readable."""

    kubeconfig: Path
    own: bool
    live: list[Kubectl] = field(default_factory=list)
    """Namespaces that ``namespace`` created and has not deleted yet."""
    leaving: list[str] = field(default_factory=list)
    """Namespaces that are being deleted; see ``until_left``."""

    def kubectl(self, namespace: str) -> Kubectl:
        """kubectl for a namespace."""
        return Kubectl(program("kubectl"), self.kubeconfig, namespace)

    def helm(self, namespace: str, *words: str, within_s: float = 180) -> str:
        """Runs helm and returns its output. A failure raises AssertionError with its message."""
        command = [program("helm"), "--kubeconfig", str(self.kubeconfig), "--namespace", namespace, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=within_s, check=False)
        assert done.returncode == 0, f"helm {' '.join(words)}: {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

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
            given = [f"{key}={value}" for key, value in (labels or {}).items()]
            kubectl.run("label", "namespace", name, ENFORCED, "reelway.dev/e2e=true", *given)
            yield kubectl
        finally:
            self.live.remove(kubectl)
            self.leaving.append(name)
            persistently(lambda: release_all(kubectl))
            persistently(lambda: kubectl.run("delete", "namespace", name, "--wait=false", "--ignore-not-found"))
            persistently(lambda: kubectl.run("delete", "pvc", "--all", "--timeout=60s"))

    def until_left(self) -> None:
        """Waits until all deleted namespaces are gone."""
        while self.leaving:
            persistently(functools.partial(self._until_gone, self.leaving[-1]))
            self.leaving.pop()

    def _until_gone(self, name: str) -> None:
        listed = ("get", "namespace", name, "--ignore-not-found", "-o", "name")
        until(f"namespace {name} is gone", lambda: not self.kubectl("default").run(*listed).strip(), GONE_S)


def persistently(clean: Callable[[], object]) -> None:
    """Repeats a clean-up until it succeeds, so that a slow API server leaves no objects behind.

    Raises:
        AssertionError: if it fails for ``GONE_S`` seconds.
    """
    deadline = time.monotonic() + GONE_S
    while True:
        try:
            clean()
            return
        except (AssertionError, subprocess.TimeoutExpired):
            if time.monotonic() > deadline:
                raise
        time.sleep(1)


def program(name: str) -> str:
    """Path of a program on the PATH, else of the node's."""
    found = shutil.which(name) or str(NODE / "bin" / name)
    assert Path(found).exists(), f"no {name} on the PATH or in {NODE / 'bin'}; `make cluster` builds it"
    return found


def chosen() -> Cluster | None:
    """The cluster to use; None if there is none."""
    named, own = os.environ.get("KUBECONFIG"), NODE / "state" / "admin.kubeconfig"
    if named and os.environ.get("REELWAY_CLUSTER_TESTS") and Path(named).resolve() != own.resolve():
        return Cluster(Path(named), own=False)
    return Cluster(own, own=True) if own.exists() else None
