"""A Kafka broker in a pod, for the event log."""

from __future__ import annotations

import os
from typing import Any, Final

from tests.support.cluster.kubectl import Kubectl
from tests.support.e2e.pods import LABEL, START_TIMEOUT_S, pod_document

IMAGE: Final = "REELWAY_E2E_KAFKA_IMAGE"
"""Environment variable with the image for a cluster other than the node of `make cluster`."""
PORT: Final = 9092


def image() -> str:
    """Reference of the image."""
    return os.environ.get(IMAGE, "reelway.local/kafka:node")


def apply_kafka(kubectl: Kubectl, name: str) -> None:
    """Creates a pod with a Service and waits until it is ready. Both are deleted with the namespace.

    The broker creates a topic when a client first uses it.
    """
    pod = pod_document(name, ["/usr/bin/kafka", name])
    pod["metadata"]["labels"] = {**LABEL, "app": name}
    container: dict[str, Any] = pod["spec"]["containers"][0]
    container |= {
        "image": image(),
        "readinessProbe": {"tcpSocket": {"port": PORT}},
        "resources": {"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {"cpu": "1", "memory": "768Mi"}},
    }
    kubectl.apply({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
        "spec": {"selector": {"app": name}, "ports": [{"port": PORT, "targetPort": PORT}]},
    })  # fmt: skip
    kubectl.apply(pod)
    kubectl.run("wait", "--for=condition=Ready", f"pod/{name}", f"--timeout={START_TIMEOUT_S:g}s")
