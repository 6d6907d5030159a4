"""Collects events, pods, logs and KubeRay's status of a namespace after a failure."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

from tests.support.cluster.kubectl import Kubectl

LINES = 40


def describe_namespace(kubectl: Kubectl) -> str:
    """Returns a report on a namespace. A part that cannot be read is replaced by the error."""
    parts = [
        ("pods", lambda: kubectl.run("get", "pods", "-o", "wide")),
        ("events", lambda: _last(kubectl.run("get", "events", "--sort-by=.lastTimestamp"), LINES)),
        ("RayService and RayJobs", lambda: _ray(kubectl)),
        ("rollouts", lambda: kubectl.run("get", "releaserollouts", "-o", "wide")),
        *((f"pod {name}", lambda name=name: _pod(kubectl, name)) for name in _pods(kubectl)),
    ]
    return "\n\n".join(f"== {kubectl.namespace}: {title}\n{_or_error(part)}" for title, part in parts)


def _pods(kubectl: Kubectl) -> list[str]:
    listed = _or_error(lambda: kubectl.run("get", "pods", "-o", "name"))
    return [line.removeprefix("pod/") for line in listed.split() if line.startswith("pod/")]


def _pod(kubectl: Kubectl, name: str) -> str:
    logs = kubectl.run("logs", name, "--all-containers", "--prefix", f"--tail={LINES}")
    pod = json.loads(kubectl.run("get", "pod", name, "-o", "json"))
    restarted = sum(one["restartCount"] for one in pod["status"].get("containerStatuses", ()))
    before = kubectl.run("logs", name, "--all-containers", "--prefix", "--previous") if restarted else ""
    states = {one["name"]: one["state"] for one in pod["status"].get("containerStatuses", ())}
    conditions = [c for c in pod["status"].get("conditions", ()) if c["status"] != "True"]
    report = f"containers {json.dumps(states)}\nconditions not met: {json.dumps(conditions)}\n{logs}"
    return f"{report}\n-- log before the restart\n{_last(before, LINES)}" if before else report


def _ray(kubectl: Kubectl) -> str:
    resources = json.loads(kubectl.run("get", "rayservices,rayclusters,rayjobs", "-o", "json"))["items"]
    return "\n".join(_status(resource) for resource in resources) or "none"


def _status(resource: dict[str, Any]) -> str:
    status = json.dumps(resource.get("status", {}), indent=1)
    return f"{resource['kind']} {resource['metadata']['name']}: {status}"


def _or_error(part: Callable[[], str]) -> str:
    try:
        return part().rstrip()
    except (AssertionError, subprocess.TimeoutExpired) as error:
        return f"(not available: {error})"


def _last(text: str, lines: int) -> str:
    return "\n".join(text.splitlines()[-lines:])
