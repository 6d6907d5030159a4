"""Why: a fault that is found must be a release's own: its ranker fails or is slow, for viewers whom the store knows.

As `reelway release rehearse` makes them, but without a training run: graph surgery on the made releases' rankers. So
that viewers are known, a feature store with a row for each goes into the same claim.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.cluster.conftest import Kubectl
from tests.e2e.clusters import Cluster
from tests.e2e.made_releases import CLAIM, VIDEOS, MadeReleases
from tests.e2e.pods import pod
from tests.release_files import describe_files, make_release_folder, sign_manifest, write_manifest
from tests.serving.viewer_store import make_viewer_store

from reelway.pipelines.ranker_faults import fail_known_viewers, slow_down_busy_viewers
from reelway.platform.contracts.manifest import RANKER_FILE
from reelway.platform.release.signing import create_keys, load_private_key
from reelway.platform.release.store import ReleaseStore

KNOWN: Final = 400
"""Viewers 0..KNOWN-1 have a row."""
SEEN: Final = 20
"""Impressions in 30 days of most viewers."""
SEEN_BY_BUSY: Final = 400
"""Of every eighth."""
SLOW_MS: Final = 320.0
"""Beyond the 250 ms that are allowed, within the ranking stage's 500."""
FEATURES: Final = "features"


@dataclass
class FaultyReleases:
    """``made.ids[0]`` is sound. Each faulty one is another release: an alert about one is not about the next."""

    made: MadeReleases
    errors: tuple[str, ...]
    slow: tuple[str, ...]
    sound: tuple[str, ...]

    def deliver(self, kubectl: Kubectl) -> None:
        """Releases and viewers' rows, into the claim of a namespace."""
        self.made.deliver(kubectl)
        with pod(kubectl, "viewers", claim=CLAIM) as name:
            kubectl.run("cp", "--no-preserve", str(self.made.folder / FEATURES), f"{name}:/volume/{FEATURES}")
            kubectl.run("exec", name, "--", "chmod", "-R", "a+rwX", f"/volume/{FEATURES}")


@contextmanager
def faulty_releases(cluster: Cluster, *, errors: int, slow: int, sound: int = 2) -> Iterator[FaultyReleases]:
    """So many of each kind on this machine, to be delivered into namespaces that end before this block does."""
    with tempfile.TemporaryDirectory(prefix="reelway-e2e-") as place:
        folder = Path(place)
        keys = create_keys(folder / "keys")
        key, store = load_private_key(keys.private), ReleaseStore(str(folder / "releases"))
        makers: list[Callable[[Path], None]] = [*[_sound] * sound, *[fail_known_viewers] * errors, *[_slow] * slow]
        ids = [_made(folder / f"made-{seed}", seed, maker, key, store) for seed, maker in enumerate(makers)]
        rows = {viewer: {"impressions_30d": SEEN if viewer % 8 else SEEN_BY_BUSY} for viewer in range(KNOWN)}
        (folder / FEATURES).mkdir()
        make_viewer_store(folder / FEATURES, rows, time.time())
        made = MadeReleases(cluster, folder, keys, tuple(ids))
        try:
            yield FaultyReleases(
                made, tuple(ids[sound : sound + errors]), tuple(ids[sound + errors :]), tuple(ids[:sound])
            )
        finally:
            for volume in made.volumes:
                cluster.kubectl("default").run("delete", "pv", volume, "--ignore-not-found", "--timeout=60s")


def _made(folder: Path, seed: int, fault: Callable[[Path], None], key: Ed25519PrivateKey, store: ReleaseStore) -> str:
    manifest = make_release_folder(folder, videos=VIDEOS, seed=seed)
    fault(folder / RANKER_FILE)
    manifest = sign_manifest(manifest.model_copy(update={"files": describe_files(folder)}), key)
    write_manifest(folder, manifest)
    return str(store.write(folder, manifest))


def _sound(_: Path) -> None:
    """Nothing is wrong with it."""


def _slow(ranker: Path) -> None:
    slow_down_busy_viewers(ranker, above=(SEEN + SEEN_BY_BUSY) / 2, slow_ms=SLOW_MS)
