"""A Redis in a pod, for the state of Ray's head."""

from __future__ import annotations

import os
from typing import Any, Final

from tests.support.cluster.kubectl import Kubectl
from tests.support.e2e.pods import LABEL, START_TIMEOUT_S, pod_document

IMAGE: Final = "REELWAY_E2E_REDIS_IMAGE"
"""Environment variable with the image for a cluster other than the node of `make cluster`."""
PORT: Final = 6379


def image() -> str:
    """Reference of the image."""
    return os.environ.get(IMAGE, "reelway.local/redis:node")


def apply_redis(kubectl: Kubectl, name: str, secret: str) -> None:
    """Creates a pod with a Service and waits until it is ready. Both are deleted with the namespace."""
    pod = pod_document(name, ["/bin/sh", "-c", 'exec redis-server --save "" --dir /tmp --requirepass "$PASSWORD"'])
    pod["metadata"]["labels"] = {**LABEL, "app": name}
    container: dict[str, Any] = pod["spec"]["containers"][0]
    password = {"name": "PASSWORD", "valueFrom": {"secretKeyRef": {"name": secret, "key": "redis-password"}}}
    container |= {"image": image(), "env": [password], "readinessProbe": {"tcpSocket": {"port": PORT}}}
    kubectl.apply(pod)
    kubectl.apply({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
        "spec": {"selector": {"app": name}, "ports": [{"port": PORT, "targetPort": PORT}]},
    })  # fmt: skip
    kubectl.run("wait", "--for=condition=Ready", f"pod/{name}", f"--timeout={START_TIMEOUT_S:g}s")
