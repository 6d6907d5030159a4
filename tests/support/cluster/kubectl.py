"""Runs kubectl against the API server that the cluster tests use."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]


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


def remove_finalizers(kubectl: Kubectl) -> None:
    """Removes all finalizers, so that the namespace can be deleted without an operator."""
    for name in kubectl.run("get", "releaserollouts", "-o", "name").split():
        if name.startswith("releaserollout"):
            kubectl.run("patch", name, "--type=merge", "-p", '{"metadata":{"finalizers":null}}')
