"""A run directory to serve, and a handle of the running service."""

from __future__ import annotations

import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from tests.support.release_files import NOW_S, make_release_folder
from tests.support.serving.viewer_store import make_viewer_store

from reelway.platform.contracts.blend import Blend, RetrievalSettings
from reelway.platform.contracts.feature_names import TRAINING_SERVICE, VIEWER_SERVICE
from reelway.platform.features.feast_store import feature_service_digest, open_feature_store
from reelway.platform.release.signing import create_keys, load_private_key
from reelway.platform.release.store import ReleaseStore
from reelway.platform.tokens import TokenSigner
from reelway.serving.release_loader import ReleaseLoader

KNOWN_VIEWER = 42
READY_S = 120.0


@dataclass
class Running:
    """The service under test."""

    run: Path
    process: subprocess.Popen[bytes]
    url: str
    internal_url: str
    release: str
    other: str
    watched: list[int]
    client: httpx.Client

    @property
    def loader(self) -> ReleaseLoader:
        return ReleaseLoader(self.run / "serving" / "releases" / self.release)

    @property
    def signer(self) -> TokenSigner:
        return TokenSigner((self.run / "keys" / "token.secret").read_bytes())

    def ask(self, viewer: int = KNOWN_VIEWER, count: int = 10, **context: Any) -> dict[str, Any]:
        answer = self.client.post("/v1/recommend", json={"viewer_id": viewer, "count": count, "context": context})
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def metric(self, name: str, path: str = "/metrics", **labels: str) -> float:
        """Returns the sum over all series of this name with these labels."""
        total = 0.0
        for line in self.client.get(self.internal_url + path).text.splitlines():
            sample = re.fullmatch(rf"{name}(?:{{(.*)}})? (\S+)", line)
            if sample and all(f'{key}="{value}"' in (sample[1] or "") for key, value in labels.items()):
                total += float(sample[2])
        return total

    def wait_until_whole(self) -> None:
        deadline = time.monotonic() + READY_S
        while self.ask()["degraded"]:
            assert time.monotonic() < deadline, "a stage did not recover"
            time.sleep(0.1)

    def replica_of(self, deployment: str) -> psutil.Process:
        """Returns the process of a deployment's only replica."""
        (replica,) = self.processes("ray::ServeReplica", f":{deployment}")
        return replica

    def processes(self, *parts: str) -> list[psutil.Process]:
        """Returns the service's processes whose command line contains all of these parts."""
        matching = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                command = " ".join(child.cmdline())
            except psutil.NoSuchProcess:
                continue
            if all(part in command for part in parts):
                matching.append(child)
        return matching


def make_run(run: Path) -> tuple[str, str, list[int]]:
    """Creates a run directory with two signed releases and a feature store with one known viewer."""
    folder = run / "table"
    make_release_folder(folder, videos=300)
    watched = ReleaseLoader(folder).table().video_id[5:15].tolist()
    row = {
        "region": "eu",
        "created_at_s": NOW_S - 1e6,
        "history_videos": watched,
        "history_weights": [1.0] * 10,
        "history_times_s": [NOW_S - 3600.0 * i for i in range(10, 0, -1)],
    }
    make_viewer_store(run / "features", {KNOWN_VIEWER: row}, NOW_S)
    features = open_feature_store(run / "features")
    services = [
        {"name": name, "digest": feature_service_digest(features, name)} for name in (TRAINING_SERVICE, VIEWER_SERVICE)
    ]
    key = load_private_key(create_keys(run / "keys").private)
    blend = Blend(retrieval=RetrievalSettings(candidates=100))
    ids = []
    for seed in range(2):
        folder = run / f"release-{seed}"
        manifest = make_release_folder(
            folder, videos=300, seed=seed, key=key, blend=blend, feature_services=services, now_s=NOW_S - seed
        )
        ids.append(ReleaseStore(str(run / "releases")).write(folder, manifest))
    return ids[0], ids[1], watched
