"""Paths and addresses of the node. It uses one folder and one bridge."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).resolve().parent
NODE: Final = "reelway-node"
BRIDGE: Final = "reelway0"
NODE_IP: Final = "10.88.0.1"
"""The address of the bridge, which does not depend on the machine's network."""
POD_CIDR: Final = "10.88.0.0/24"
POD_RANGE: Final = ("10.88.0.10", "10.88.0.250")
SERVICE_CIDR: Final = "10.96.0.0/16"
API_SERVICE_IP: Final = "10.96.0.1"
DNS_SERVICE_IP: Final = "10.96.0.10"
API_PORT: Final = 6443
ETCD_PORT: Final = 2379
DOMAIN: Final = "cluster.local"
PAUSE_IMAGE: Final = "reelway.local/pause:1"


@dataclass(frozen=True)
class NodePaths:
    """Paths in the node's folder."""

    root: Path

    @property
    def bin(self) -> Path:
        """Built programs. ``down`` keeps them."""
        return self.root / "bin"

    @property
    def state(self) -> Path:
        """Everything that ``down`` removes."""
        return self.root / "state"

    @property
    def pki(self) -> Path:
        return self.state / "pki"

    @property
    def etc(self) -> Path:
        return self.state / "etc"

    @property
    def logs(self) -> Path:
        return self.state / "logs"

    @property
    def processes(self) -> Path:
        return self.state / "processes.json"

    @property
    def containerd_socket(self) -> Path:
        return self.state / "run" / "containerd.sock"

    @property
    def admin_kubeconfig(self) -> Path:
        return self.state / "admin.kubeconfig"

    def kubeconfig(self, component: str) -> Path:
        return self.etc / f"{component}.kubeconfig"


def default_layout() -> NodePaths:
    """Paths under ``$REELWAY_CLUSTER_DIR``, by default ``.cluster`` in the repository."""
    named = os.environ.get("REELWAY_CLUSTER_DIR")
    return NodePaths((Path(named) if named else HERE.parent.parent / ".cluster").resolve())
