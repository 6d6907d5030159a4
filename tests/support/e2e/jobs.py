"""An installation with jobs and no service, and an ML engineer who may submit them.

The engineer is a ServiceAccount that is bound to the chart's `submitters` Role only. Every command runs with its token,
so that a missing right fails the test.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml
from tests.support.cluster.kubectl import Kubectl
from tests.support.e2e.clusters import Cluster
from tests.support.e2e.installation import Installation
from tests.support.e2e.release_fixtures import ReleaseFixtures
from tests.support.e2e.wait_until import until

ENGINEER: Final = "engineer"
SIGNING: Final = "reelway-signing"
COMMAND_S: Final = 400.0
_SMALL: Final = {"resources": {"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {"cpu": "2", "memory": "3Gi"}}}
_SUBMITTER: Final = {
    "resources": {"requests": {"cpu": "20m", "memory": "128Mi"}, "limits": {"cpu": "1", "memory": "512Mi"}}
}
KINDS: Final = ("dataset", "features", "train", "evaluate", "release")


@dataclass(frozen=True)
class CommandResult:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Engineer:
    """Runs `reelway` with the rights of the chart's `submitters` Role."""

    kubeconfig: Path
    namespace: str

    def reelway(self, *args: str, within_s: float = COMMAND_S) -> CommandResult:
        """Runs one command without a terminal."""
        command = [str(Path(sys.executable).with_name("reelway")), *args]
        environment = {**os.environ, "KUBECONFIG": str(self.kubeconfig), "COLUMNS": "160"}
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=within_s, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return CommandResult(result.returncode, result.stdout, result.stderr)

    def interrupt_when(self, text: str, *command: str, within_s: float = COMMAND_S) -> CommandResult:
        """Runs a command and sends Ctrl-C once it has printed ``text`` to stderr."""
        environment = {**os.environ, "KUBECONFIG": str(self.kubeconfig), "COLUMNS": "160"}
        program = str(Path(sys.executable).with_name("reelway"))
        with tempfile.NamedTemporaryFile("w") as errors:
            process = subprocess.Popen(
                [program, *command], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
                text=True,
            )  # fmt: skip

            def stderr() -> str:
                return Path(errors.name).read_text()

            try:
                until(f"{command} prints {text!r}", lambda: text in stderr(), within_s, stderr)
                process.send_signal(signal.SIGINT)
                out, _ = process.communicate(timeout=60)
            finally:
                process.kill()
            return CommandResult(process.returncode, out, stderr())

    def job(self, name: str) -> dict[str, Any]:
        """Returns a job from `reelway jobs`; empty if it does not exist."""
        listed = json.loads(self.reelway("jobs", "-n", self.namespace, "-o", "json").out)
        return next((dict(job) for job in listed if job["name"] == name), {})

    def submit(self, kind: str, *args: str) -> str:
        """Submits a job that must succeed and returns its output."""
        result = self.reelway("submit", kind, "-n", self.namespace, *args)
        assert result.code == 0, f"submit {kind} ended with {result.code}\n{result.err[-6000:]}"
        return result.out.strip()


def job_values(**more: Any) -> dict[str, Any]:
    """Values of an installation with jobs and without a service."""
    submitters = [{"kind": "ServiceAccount", "name": ENGINEER, "namespace": ""}]
    jobs = dict.fromkeys(KINDS, _SMALL) | {"submitter": _SUBMITTER, "signingSecret": SIGNING}
    jobs["allowedImages"] = ["reelway.local/training:*"]
    return {"serving": {"enabled": False}, "jobs": {**jobs, "submitters": submitters, **more}}


@contextmanager
def install_jobs(cluster: Cluster, kubectl: Kubectl, releases: ReleaseFixtures, **jobs: Any) -> Iterator[Installation]:
    """Installs jobs without a service. ``jobs`` are additional values of ``jobs``."""
    releases.deliver(kubectl)
    kubectl.run("create", "secret", "generic", SIGNING, f"--from-file=signing.pem={releases.keys.private}")
    kubectl.run("create", "serviceaccount", ENGINEER)
    values = job_values(**jobs)
    for subject in values["jobs"]["submitters"]:
        subject["namespace"] = kubectl.namespace
    installation = Installation(cluster, kubectl, releases, given=values)
    installation.install()
    try:
        yield installation
    finally:
        kubectl.run("delete", "rayjobs", "--all", "--wait=false")
        installation.uninstall()


def create_engineer(cluster: Cluster, kubectl: Kubectl, folder: Path) -> Engineer:
    """Writes a kubeconfig with the engineer's token."""
    config = yaml.safe_load(cluster.kubeconfig.read_text())
    token = kubectl.run("create", "token", ENGINEER, "--duration=2h").strip()
    (active,) = (each for each in config["contexts"] if each["name"] == config["current-context"])
    user = {"name": ENGINEER, "user": {"token": token}}
    context = {"name": ENGINEER, "context": {**active["context"], "user": ENGINEER, "namespace": kubectl.namespace}}
    path = folder / "engineer.kubeconfig"
    path.write_text(yaml.safe_dump({**config, "users": [user], "contexts": [context], "current-context": ENGINEER}))
    return Engineer(path, kubectl.namespace)
