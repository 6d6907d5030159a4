"""KServe's controller on the node, with its webhooks for InferenceServices.

The controller is a process of the node, like the KubeRay operator. Its webhooks have a certificate of the node's CA, so
that the cluster needs no certificate issuer. ``down`` stops it with the node.
"""

from __future__ import annotations

import base64
import json
import shutil
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from build import KSERVE, build_tools, module_folder
from layout import HERE, NODE_IP, NodePaths
from node import Node, NodeError
from pki import issue_certificate
from processes import ProcessTable

_MODULE: Final = "github.com/kserve/kserve"
_PROCESS: Final = "kserve"
_NAMESPACE: Final = "kserve"
_WEBHOOKS_PORT: Final = 9543
_HEALTH_ADDRESS: Final = "127.0.0.1:8387"
_DEADLINE_S: Final = 180.0


def install_kserve(node: Node, layout: NodePaths, say: Callable[[str], None]) -> None:
    """Starts the controller on a running node, unless it runs.

    Raises:
        NodeError: if it is not ready in time; the message contains the end of its log.
    """
    build_tools(layout, say, KSERVE)
    began = time.monotonic()
    crds = _crds()
    node.kubectl("apply", "--server-side", "--force-conflicts", *crds)
    node.kubectl("wait", "--for=condition=Established", "--timeout=60s", *crds)
    node.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(HERE / "kserve.yaml"))
    processes = ProcessTable(layout)
    processes.start(
        _PROCESS,
        [
            str(layout.bin / "kserve-manager"),
            "--metrics-addr=127.0.0.1:8386",
            f"--health-probe-addr={_HEALTH_ADDRESS}",
            f"--webhook-port={_WEBHOOKS_PORT}",
        ],
        # The controller reads the webhooks' certificate from a folder below TMPDIR.
        {"KUBECONFIG": str(layout.admin_kubeconfig), "POD_NAMESPACE": _NAMESPACE, "TMPDIR": str(_certificate(layout))},
    )
    _wait(processes)
    authority = base64.b64encode((layout.pki / "ca.crt").read_bytes()).decode()
    _apply(node, *webhooks(f"https://{NODE_IP}:{_WEBHOOKS_PORT}", authority))
    say(f"KServe's controller is ready after {time.monotonic() - began:.0f} s")


def remove_kserve(node: Node, layout: NodePaths) -> None:
    """Removes the webhooks, the controller and its CRDs, with every InferenceService on the node."""
    for document in webhooks("https://none", ""):
        node.kubectl("delete", "--ignore-not-found", document["kind"], document["metadata"]["name"])
    node.kubectl("delete", "--ignore-not-found", *_crds())  # while the controller runs, which removes finalizers
    ProcessTable(layout).stop(_PROCESS)
    node.kubectl("delete", "--ignore-not-found", "-f", str(HERE / "kserve.yaml"))


def webhooks(url: str, authority: str) -> list[dict[str, Any]]:
    """Returns the webhook configurations of KServe's defaulter and validator of InferenceServices at this URL."""
    path = "serving-kserve-io-v1beta1-inferenceservice"
    return [
        {
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": kind,
            "metadata": {"name": "inferenceservice.serving.kserve.io"},
            "webhooks": [
                {
                    "name": f"inferenceservice.kserve-webhook-server.{name}",
                    "clientConfig": {"url": f"{url}/{verb}-{path}", "caBundle": authority},
                    "rules": [
                        {
                            "apiGroups": ["serving.kserve.io"],
                            "apiVersions": ["v1beta1"],
                            "operations": ["CREATE", "UPDATE"],
                            "resources": ["inferenceservices"],
                        }
                    ],
                    "failurePolicy": "Fail",
                    "sideEffects": "None",
                    "admissionReviewVersions": ["v1", "v1beta1"],
                }
            ],
        }
        for kind, verb, name in (
            ("MutatingWebhookConfiguration", "mutate", "defaulter"),
            ("ValidatingWebhookConfiguration", "validate", "validator"),
        )
    ]


def _crds() -> list[str]:
    """Returns the CRDs that the controller watches, as arguments of kubectl."""
    folder = module_folder("kserve", _MODULE) / "charts" / "kserve-crd-minimal" / "templates"
    kinds = ("inferenceservices", "servingruntimes", "clusterservingruntimes", "trainedmodels", "inferencegraphs")
    return [argument for kind in kinds for argument in ("-f", str(folder / f"serving.kserve.io_{kind}.yaml"))]


def _certificate(layout: NodePaths) -> Path:
    """Writes the webhooks' certificate and returns the folder to use as TMPDIR."""
    issue_certificate(layout.pki, "kserve-webhook", "kserve-webhook", hosts=[NODE_IP])
    place = layout.state / "kserve"
    folder = place / "k8s-webhook-server" / "serving-certs"
    folder.mkdir(parents=True, exist_ok=True)
    for ending in ("crt", "key"):
        shutil.copy(layout.pki / f"kserve-webhook.{ending}", folder / f"tls.{ending}")
    return place


def _apply(node: Node, *documents: dict[str, Any]) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"apiVersion": "v1", "kind": "List", "items": documents}, file)
        file.flush()
        node.kubectl("apply", "--server-side", "--force-conflicts", "-f", file.name)


def _wait(processes: ProcessTable) -> None:
    deadline = time.monotonic() + _DEADLINE_S
    while True:
        if not processes.running(_PROCESS):
            raise NodeError(f"KServe's controller ended:\n{processes.log_tail(_PROCESS)}")
        try:
            with urllib.request.urlopen(f"http://{_HEALTH_ADDRESS}/readyz", timeout=2):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                log_lines = processes.log_tail(_PROCESS)
                raise NodeError(
                    f"KServe's controller is not ready within {_DEADLINE_S:g} s: {error}\n{log_lines}"
                ) from error
        time.sleep(0.2)
