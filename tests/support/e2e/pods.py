"""Client pods inside the cluster, under the restricted level like all others.

They run the operator's image, which has Python, httpx and NumPy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import yaml
from tests.support.cluster.kubectl import ROOT, Kubectl
from tests.support.e2e.clusters import CHART, Cluster
from tests.support.e2e.wait_until import until

DEV_VALUES: Final = ROOT / "infra" / "environments" / "dev.yaml"
MORE_VALUES: Final = "REELWAY_E2E_VALUES"
"""Environment variable with a values file for a cluster other than the node, for example with its registry."""
LABEL: Final = {"reelway.dev/e2e": "client"}
"""Label of these pods, which network policies admit."""
START_TIMEOUT_S: Final = 60.0


def values_files() -> list[Path]:
    """Values files of every installation."""
    more = os.environ.get(MORE_VALUES)
    return [DEV_VALUES, *([Path(more)] if more else [])]


def image(of: str = "operator") -> str:
    """Reference of an image, from the values of the installations."""
    reference: dict[str, Any] = {"tag": yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]}
    registry = ""
    for path in values_files():
        values = yaml.safe_load(path.read_text()).get("image", {})
        registry = values.get("registry", registry)
        reference |= values.get(of, {})
    return f"{registry}/{reference['repository']}:{reference['tag']}"


def check_images(cluster: Cluster, required: set[str]) -> None:
    """Fails if the node of `make cluster`, which pulls no images, lacks one a minute after it was loaded.

    The kubelet reports new images late.
    """

    def missing() -> list[str]:
        nodes = json.loads(cluster.kubectl("default").run("get", "nodes", "-o", "json"))["items"]
        loaded = {name for node in nodes for entry in node["status"]["images"] for name in entry["names"] or ()}
        return sorted(required - loaded)

    until(
        "the node has the images", lambda: not missing(), 60,
        lambda: f"it lacks {missing()}; run `make cluster-load-images cluster-load-servers`",
    )  # fmt: skip


def pod_document(
    name: str, command: Sequence[str], *, files: str = "", claim: str = "", of: str = "operator"
) -> dict[str, Any]:
    """A pod with one container, a ConfigMap ``files`` under /files and a claim ``claim`` under /volume."""
    volumes: list[dict[str, Any]] = [{"name": "tmp", "emptyDir": {}}]
    mounts = [{"name": "tmp", "mountPath": "/tmp"}]
    if files:
        volumes.append({"name": "files", "configMap": {"name": files}})
        mounts.append({"name": "files", "mountPath": "/files"})
    if claim:
        volumes.append({"name": "volume", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": "volume", "mountPath": "/volume"})
    container = {
        "name": name, "image": image(of), "imagePullPolicy": "Never" if "local" in image(of) else "IfNotPresent",
        "command": list(command), "volumeMounts": mounts,
        "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"cpu": "1", "memory": "384Mi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        },
    }  # fmt: skip
    return {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": LABEL},
        "spec": {
            "containers": [container], "volumes": volumes, "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1, "automountServiceAccountToken": False, "enableServiceLinks": False,
            "securityContext": {
                "runAsNonRoot": True, "runAsUser": 10001, "runAsGroup": 10001, "fsGroup": 10001,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
        },
    }  # fmt: skip


@contextmanager
def pod(
    kubectl: Kubectl,
    name: str,
    command: Sequence[str] = ("sleep", "infinity"),
    files: Mapping[str, Path] | None = None,
    **more: str,
) -> Iterator[str]:
    """Runs a pod with ``files`` under /files and deletes it afterwards."""
    if files:
        given = [f"--from-file={key}={path}" for key, path in files.items()]
        kubectl.run("create", "configmap", f"{name}-files", *given)
        more["files"] = f"{name}-files"
    kubectl.apply(pod_document(name, command, **more))
    try:
        kubectl.run("wait", "--for=condition=Ready", f"pod/{name}", f"--timeout={START_TIMEOUT_S:g}s")
        yield name
    finally:
        kubectl.run("delete", "pod", name, "--wait=true", "--ignore-not-found", "--timeout=60s")
        if files:
            kubectl.run("delete", "configmap", f"{name}-files", "--ignore-not-found")
