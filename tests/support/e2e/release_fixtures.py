"""Small signed releases without training, delivered into a claim.

Serving (``releases.store.pvc.existingClaim``) and jobs that write releases use the same claim. On the node of `make
cluster` it is a folder of this machine; elsewhere the cluster's default storage class provides it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.support.cluster.kubectl import Kubectl
from tests.support.e2e.clusters import Cluster, retry_cleanup
from tests.support.e2e.pods import pod
from tests.support.release_files import make_release_folder

from reelway.platform.release.signing import KeyPair, create_keys, load_private_key
from reelway.platform.release.store import ReleaseStore

CLAIM: Final = "releases"
KEYS: Final = "reelway-public-keys"
"""ConfigMap with the trusted keys, named as in infra/environments/dev.yaml."""
VIDEOS: Final = 2_000
_SIZE: Final = "2Gi"


@dataclass
class ReleaseFixtures:
    """Releases on this machine. ``ids`` are in build order; ``keys.private`` signs further trusted releases."""

    cluster: Cluster
    folder: Path
    keys: KeyPair
    ids: tuple[str, ...]
    volumes: list[str] = field(default_factory=list)

    def deliver(self, kubectl: Kubectl) -> None:
        """Copies the releases into a namespace's claim ``CLAIM`` and the public key into its ConfigMap ``KEYS``."""
        kubectl.run("create", "configmap", KEYS, f"--from-file={self.keys.public}")
        claim: dict[str, Any] = {
            "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": CLAIM},
            "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": _SIZE}}},
        }  # fmt: skip
        if self.cluster.own:
            claim["spec"] |= {"storageClassName": "", "volumeName": self._volume(kubectl)}
        kubectl.apply(claim)
        with pod(kubectl, "delivery", claim=CLAIM) as name:
            kubectl.run("cp", "--no-preserve", str(self.folder / "releases"), f"{name}:/volume/releases")
            kubectl.run("exec", name, "--", "chmod", "-R", "a+rX", "/volume/releases")

    def _volume(self, kubectl: Kubectl) -> str:
        name, path = f"{kubectl.namespace}-{CLAIM}", self.folder / "volumes" / kubectl.namespace
        path.mkdir(parents=True)
        path.chmod(0o777)  # pods write with a user id that does not exist on this machine
        self.volumes.append(name)
        kubectl.apply({
            "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name},
            "spec": {
                "accessModes": ["ReadWriteMany"], "capacity": {"storage": _SIZE}, "storageClassName": "",
                "persistentVolumeReclaimPolicy": "Retain", "hostPath": {"path": str(path), "type": "Directory"},
                "claimRef": {"namespace": kubectl.namespace, "name": CLAIM},
            },
        })  # fmt: skip
        return name


@contextmanager
def build_release_fixtures(cluster: Cluster, count: int, videos: int = VIDEOS) -> Iterator[ReleaseFixtures]:
    """Builds ``count`` releases for namespaces that are deleted within the block."""
    with tempfile.TemporaryDirectory(prefix="reelway-e2e-") as path:
        folder = Path(path)
        keys = create_keys(folder / "keys")
        key, store = load_private_key(keys.private), ReleaseStore(str(folder / "releases"))
        folders = [folder / f"release-{seed}" for seed in range(count)]
        ids = tuple(
            store.write(release, make_release_folder(release, videos=videos, seed=seed, key=key))
            for seed, release in enumerate(folders)
        )
        releases = ReleaseFixtures(cluster, folder, keys, ids)
        try:
            yield releases
        finally:
            for volume in releases.volumes:
                delete = ("delete", "pv", volume, "--ignore-not-found", "--timeout=60s")
                retry_cleanup(lambda delete=delete: cluster.kubectl("default").run(*delete))
