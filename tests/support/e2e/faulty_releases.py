"""Releases whose ranker fails or is slow for viewers with a row in the feature store.

The faults are those of `reelway release rehearse`, applied to the release fixtures' rankers without a training run. A
feature store with a row per viewer is delivered into the same claim.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.support.cluster.kubectl import Kubectl
from tests.support.e2e.clusters import Cluster
from tests.support.e2e.pods import pod
from tests.support.e2e.release_fixtures import CLAIM, VIDEOS, ReleaseFixtures
from tests.support.release_files import describe_files, make_release_folder, sign_manifest, write_manifest
from tests.support.serving.viewer_store import make_viewer_store

from reelway.pipelines.ranker_faults import fail_known_viewers, slow_down_busy_viewers
from reelway.platform.contracts.feature_names import TRAINING_SERVICE, VIEWER_SERVICE
from reelway.platform.contracts.manifest import RANKER_FILE
from reelway.platform.features.feast_store import open_feature_store, registered_services
from reelway.platform.release.signing import create_keys, load_private_key
from reelway.platform.release.store import ReleaseStore

KNOWN: Final = 400
"""Viewers 0 to KNOWN-1 have a row."""
USUAL_IMPRESSIONS: Final = 20
"""Impressions of most viewers in 30 days."""
BUSY_IMPRESSIONS: Final = 400
"""Impressions of every eighth viewer."""
SLOW_MS: Final = 320.0
"""Above the latency threshold of 250 ms, below the ranking stage's limit of 500 ms."""
FEATURES: Final = "features"


@dataclass
class FaultyReleases:
    """Faulty releases and sound ones. ``fixtures.ids[0]`` is sound; each fault has its own release."""

    fixtures: ReleaseFixtures
    errors: tuple[str, ...]
    slow: tuple[str, ...]
    sound: tuple[str, ...]

    def deliver(self, kubectl: Kubectl) -> None:
        """Copies releases and viewers' rows into the claim of a namespace."""
        self.fixtures.deliver(kubectl)
        with pod(kubectl, "viewers", claim=CLAIM) as name:
            kubectl.run("cp", "--no-preserve", str(self.fixtures.folder / FEATURES), f"{name}:/volume/{FEATURES}")
            kubectl.run("exec", name, "--", "chmod", "-R", "a+rwX", f"/volume/{FEATURES}")


@contextmanager
def faulty_releases(cluster: Cluster, *, errors: int, slow: int, sound: int = 2) -> Iterator[FaultyReleases]:
    """Builds this number of releases per kind, for namespaces that are deleted within the block."""
    with tempfile.TemporaryDirectory(prefix="reelway-e2e-") as path:
        folder = Path(path)
        keys = create_keys(folder / "keys")
        key, store = load_private_key(keys.private), ReleaseStore(str(folder / "releases"))
        faults: list[Callable[[Path], None]] = [*[_sound] * sound, *[fail_known_viewers] * errors, *[_slow] * slow]
        rows = {
            viewer: {"impressions_30d": USUAL_IMPRESSIONS if viewer % 8 else BUSY_IMPRESSIONS}
            for viewer in range(KNOWN)
        }
        (folder / FEATURES).mkdir()
        make_viewer_store(folder / FEATURES, rows, time.time())
        services = registered_services(open_feature_store(folder / FEATURES), (TRAINING_SERVICE, VIEWER_SERVICE))
        ids = [
            _build(folder / f"release-{seed}", seed, fault, key, store, services) for seed, fault in enumerate(faults)
        ]
        fixtures = ReleaseFixtures(cluster, folder, keys, tuple(ids))
        try:
            yield FaultyReleases(
                fixtures, tuple(ids[sound : sound + errors]), tuple(ids[sound + errors :]), tuple(ids[:sound])
            )
        finally:
            for volume in fixtures.volumes:
                cluster.kubectl("default").run("delete", "pv", volume, "--ignore-not-found", "--timeout=60s")


def _build(
    folder: Path,
    seed: int,
    fault: Callable[[Path], None],
    key: Ed25519PrivateKey,
    store: ReleaseStore,
    services: Mapping[str, str],
) -> str:
    required = [{"name": name, "digest": digest} for name, digest in services.items()]
    manifest = make_release_folder(folder, videos=VIDEOS, seed=seed, feature_services=required)
    fault(folder / RANKER_FILE)
    manifest = sign_manifest(manifest.model_copy(update={"files": describe_files(folder)}), key)
    write_manifest(folder, manifest)
    return str(store.write(folder, manifest))


def _sound(_: Path) -> None:
    """Applies no fault."""


def _slow(ranker: Path) -> None:
    slow_down_busy_viewers(ranker, above=(USUAL_IMPRESSIONS + BUSY_IMPRESSIONS) / 2, slow_ms=SLOW_MS)
