"""The fixture of all variants of the serving benchmark: one release, one online store and the same viewers.

The online store is a Redis that the benchmark starts, or SQLite if the machine has no Redis.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tests.benchmarks.serving_release import make_realistic_release, viewer_row
from tests.support.dimensions import DIMENSIONS
from tests.support.release_files import LANGUAGES, NOW_S
from tests.support.serving.viewer_store import make_store, write_rows

from reelway.platform.contracts import feature_names as names
from reelway.platform.features.hashing import category_codes
from reelway.platform.release.signing import create_keys, load_private_key, sign
from reelway.platform.release.store import ReleaseStore
from reelway.platform.viewer_assertions import ViewerTokenSigner, create_viewer_key, read_viewer_key
from reelway.serving.free_ports import find_free_port
from reelway.serving.release_loader import ReleaseLoader
from reelway.serving.video_table import VideoTable

VIEWERS: Final = 40
"""Number of viewers; few, so that the store can hold the features of all of their candidates."""
SQLITE: Final = "sqlite"
"""The online store without Redis; it has no tables for features of videos."""
NOW: Final = "2024-06-10T06:13:20Z"
AUDIENCE: Final = "reelway"
SECRET: Final = b"the benchmark's secret of tokens"


@dataclass(frozen=True)
class ServingFixture:
    """Folders of one run of the benchmark."""

    path: Path

    @property
    def release_folder(self) -> Path:
        return self.path / "release"

    @property
    def features(self) -> Path:
        return self.path / "features"

    @property
    def viewer_keys(self) -> Path:
        """The public key that viewers' tokens are verified with."""
        return self.path / "viewers-public.pem"

    @property
    def proofs(self) -> Path:
        """The Authorization header of each viewer, a JSON list."""
        return self.path / "proofs.json"

    @property
    def release(self) -> str:
        return str(json.loads((self.path / "facts.json").read_text())["release"])

    def loader(self) -> ReleaseLoader:
        return ReleaseLoader(self.release_folder)

    def viewer_rows(self) -> list[dict[str, Any]]:
        """Returns the row of each viewer, as in the online store."""
        table, rng = self.loader().table(), np.random.default_rng(1)
        return [viewer_row(table, rng) for _ in range(VIEWERS)]


def make_serving_fixture(path: Path, videos: int) -> ServingFixture:
    """Creates release, keys and secrets; ``store_candidates`` writes the videos' features."""
    fixture = ServingFixture(path)
    key = load_private_key(create_keys(path / "keys").private)
    manifest = sign(make_realistic_release(fixture.release_folder, videos), key)
    release = ReleaseStore(str(path / "releases")).write(fixture.release_folder, manifest)
    (path / "token.secret").write_bytes(SECRET)
    viewer_key = path / "viewers.pem"
    create_viewer_key(viewer_key)
    signer = ViewerTokenSigner(read_viewer_key(viewer_key), audience=AUDIENCE, lifetime_s=86_400)
    fixture.proofs.write_text(json.dumps([f"Bearer {signer.sign(viewer)}" for viewer in range(VIEWERS)]))
    (path / "facts.json").write_text(json.dumps({"release": release}))
    return fixture


@contextmanager
def online_store(fixture: ServingFixture) -> Iterator[str]:
    """Runs the online store with all viewers. Yields its address in the format of ``REELWAY_ONLINE_STORE``."""
    with _redis(fixture.path / "redis") as address:
        store = make_store(fixture.features, address)
        rows = dict(enumerate(fixture.viewer_rows()))
        for view in names.VIEWER_VIEWS:
            write_rows(store, view, "viewer_id", rows, NOW_S)
        yield address


def store_candidates(fixture: ServingFixture, rows: NDArray[np.int32], at_s: float, table: VideoTable) -> None:
    """Writes the features of the videos to the online store, as a materialisation does."""
    store = make_store(fixture.features, None)
    values = dict(zip(table.video_id[rows].tolist(), video_rows(table, rows), strict=True))
    for view in ("video_content", "video_engagement", "creator_statistics"):
        write_rows(store, view, "creator_key" if view == "creator_statistics" else "video_id", values, at_s)


def video_rows(table: VideoTable, rows: NDArray[np.int32]) -> list[dict[str, Any]]:
    """Returns feature values of videos by field name, as a store returns them."""
    dense = table.gather(rows, NOW_S).video_dense.astype(np.float64)
    dense_names = names.VIDEO_DENSE
    word_of = dict(zip(category_codes(list(LANGUAGES), DIMENSIONS.category_buckets).tolist(), LANGUAGES, strict=True))
    languages = [word_of[code] for code in table.gather(rows, NOW_S).video_categories[:, 1].tolist()]
    facts = zip(
        table.creator_id[rows].tolist(), table.topic[rows].tolist(), table.uploaded_at_s[rows].tolist(), languages,
        dense.tolist(), strict=True,
    )  # fmt: skip
    return [
        {"creator_id": creator, "topic": topic, "uploaded_at_s": uploaded, "video_language": language}
        | {name: value for name, value in zip(dense_names, values, strict=True) if value == value}
        for creator, topic, uploaded, language, values in facts
    ]


@contextmanager
def _redis(folder: Path) -> Iterator[str]:
    program = shutil.which("redis-server")
    if program is None:
        yield SQLITE
        return
    folder.mkdir(exist_ok=True)
    port = find_free_port("127.0.0.1")
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            _wait_for(port)
            yield f"redis://127.0.0.1:{port}"
        finally:
            process.terminate()


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return
