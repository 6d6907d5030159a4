"""Collects events, pods, logs and KubeRay's status of a namespace after a failure."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

from tests.support.cluster.kubectl import Kubectl

LINES = 40


def account(kubectl: Kubectl) -> str:
    """A report on one namespace. Parts that cannot be read are replaced by the error."""
    parts = [
        ("pods", lambda: kubectl.run("get", "pods", "-o", "wide")),
        ("events", lambda: _last(kubectl.run("get", "events", "--sort-by=.lastTimestamp"), LINES)),
        ("RayService and RayJobs", lambda: _ray(kubectl)),
        ("rollouts", lambda: kubectl.run("get", "releaserollouts", "-o", "wide")),
        *((f"pod {name}", lambda name=name: _pod(kubectl, name)) for name in _pods(kubectl)),
    ]
    return "\n\n".join(f"== {kubectl.namespace}: {title}\n{_tried(part)}" for title, part in parts)


def _pods(kubectl: Kubectl) -> list[str]:
    said = _tried(lambda: kubectl.run("get", "pods", "-o", "name"))
    return [line.removeprefix("pod/") for line in said.split() if line.startswith("pod/")]


def _pod(kubectl: Kubectl, name: str) -> str:
    logs = kubectl.run("logs", name, "--all-containers", "--prefix", f"--tail={LINES}")
    pod = json.loads(kubectl.run("get", "pod", name, "-o", "json"))
    restarted = sum(one["restartCount"] for one in pod["status"].get("containerStatuses", ()))
    before = kubectl.run("logs", name, "--all-containers", "--prefix", "--previous") if restarted else ""
    states = {one["name"]: one["state"] for one in pod["status"].get("containerStatuses", ())}
    conditions = [c for c in pod["status"].get("conditions", ()) if c["status"] != "True"]
    told = f"containers {json.dumps(states)}\nnot so: {json.dumps(conditions)}\n{logs}"
    return f"{told}\n-- before its restart\n{_last(before, LINES)}" if before else told


def _ray(kubectl: Kubectl) -> str:
    found = json.loads(kubectl.run("get", "rayservices,rayclusters,rayjobs", "-o", "json"))["items"]
    shown = [f"{one['kind']} {one['metadata']['name']}: {json.dumps(one.get('status', {}), indent=1)}" for one in found]
    return "\n".join(shown) or "none"


def _tried(part: Callable[[], str]) -> str:
    try:
        return part().rstrip()
    except (AssertionError, subprocess.TimeoutExpired) as error:
        return f"(not to be had: {error})"


def _last(text: str, lines: int) -> str:
    return "\n".join(text.splitlines()[-lines:])
