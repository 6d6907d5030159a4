"""Prometheus and Alertmanager on the node, run by the Prometheus operator.

The operator is a process of the node, like the KubeRay operator. The servers are pods of ``monitoring.yaml``. ``down``
stops them with the node.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from build import MONITORING, build_tools, module_folder
from layout import HERE, NodePaths
from node import Node, NodeError
from processes import ProcessTable

_MODULE: Final = "github.com/prometheus-operator/prometheus-operator"
_IMAGE: Final = "reelway.local/monitoring:node"
_NAMESPACE: Final = "monitoring"
_PROCESS: Final = "prometheus-operator"
_ADDRESS: Final = "127.0.0.1:8385"
_DEADLINE_S: Final = 120.0


def install_monitoring(node: Node, paths: NodePaths, say: Callable[[str], None]) -> None:
    """Starts the servers on a running node, unless they run.

    Raises:
        NodeError: if the servers are not ready in time; the message contains events and the end of the operator's log.
    """
    build_tools(paths, say, MONITORING)
    began = time.monotonic()
    crds = module_folder("prometheus-operator", _MODULE) / "example" / "prometheus-operator-crd"
    node.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(crds))
    node.kubectl("wait", "--for=condition=Established", "--timeout=120s", "-f", str(crds))
    processes = ProcessTable(paths)
    processes.start(
        _PROCESS,
        [
            str(paths.bin / "prometheus-operator"),
            f"--web.listen-address={_ADDRESS}",
            f"--prometheus-config-reloader={_IMAGE}",
            "--config-reloader-cpu-request=10m",
            "--config-reloader-memory-request=24Mi",
            "--config-reloader-memory-limit=64Mi",
            "--kubelet-endpoints=false",
        ],
        {"KUBECONFIG": str(paths.admin_kubeconfig)},
    )
    node.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(HERE / "monitoring.yaml"))
    _wait(node, processes)
    say(f"Prometheus and Alertmanager are ready after {time.monotonic() - began:.0f} s: Services of {_NAMESPACE}")


def remove_monitoring(node: Node, paths: NodePaths) -> None:
    """Removes the servers, the operator and its CRDs, with every monitor and rule on the node."""
    node.kubectl("delete", "--ignore-not-found", "--wait", "-f", str(HERE / "monitoring.yaml"))
    ProcessTable(paths).stop(_PROCESS)
    crds = module_folder("prometheus-operator", _MODULE) / "example" / "prometheus-operator-crd"
    node.kubectl("delete", "--ignore-not-found", "-f", str(crds))


def _wait(node: Node, processes: ProcessTable) -> None:
    """Waits until their operator reports both servers available."""
    deadline = time.monotonic() + _DEADLINE_S
    for kind in ("prometheus", "alertmanager"):
        while True:
            if not processes.running(_PROCESS):
                raise NodeError(f"the Prometheus operator ended:\n{processes.log_tail(_PROCESS)}")
            try:
                node.kubectl("wait", f"{kind}/node", "-n", _NAMESPACE, "--for=condition=Available", "--timeout=2s")
                break
            except NodeError as error:
                if time.monotonic() > deadline:
                    events = node.kubectl("get", "events", "-n", _NAMESPACE, "--sort-by=.lastTimestamp")
                    raise NodeError(
                        f"{kind}: not ready within {_DEADLINE_S:g} s; is {_IMAGE} on the node (`python infra/images "
                        f"node monitoring`, `python infra/cluster load`)?\n{error}\n{events[-2000:]}\n"
                        f"{processes.log_tail(_PROCESS)}"
                    ) from error
