"""Uploads for tests: videos of the test releases' dimensions, and an overlay writer that tests step themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from prometheus_client import CollectorRegistry
from tests.support.dimensions import DIMENSIONS
from tests.support.release_files import NOW_S, make_release_folder

from reelway.pipelines.features.stream.overlay_writer import OverlayOptions, OverlayWriter, OverlayWriterMetrics
from reelway.platform.eventlog.catalogue_events import VideoUpsert
from reelway.platform.release.signing import create_keys, load_private_key
from reelway.platform.release.store import ReleaseStore
from reelway.platform.run_directory import RunDirectory


def upload(video_id: int, *, seed: int | None = None, age_s: float = 60.0, **fields: Any) -> VideoUpsert:
    """Returns an upload with random content vectors.

    Args:
        seed: seed of the content; by default the video's id.
        age_s: age of the upload at ``NOW_S``.
        **fields: other fields of the upload.
    """
    rng = np.random.default_rng(video_id if seed is None else seed)
    vectors = {name: rng.standard_normal(width).tolist() for name, width in DIMENSIONS.content.items()}
    values = {
        "video_id": video_id, "creator_id": 5, "uploaded_at": datetime.fromtimestamp(NOW_S - age_s, UTC),
        "duration_ms": 9_000, "topic": 3, "language": "en", "title": f"Upload {video_id}", "version": 1,
    }  # fmt: skip
    return VideoUpsert.model_validate({**values, **vectors, **fields})


def make_run(path: Path, *, releases: int = 1, videos: int = 60, **arguments: Any) -> tuple[RunDirectory, list[Path]]:
    """Writes a run with signed releases, and returns it with the folders of the releases."""
    run = RunDirectory(path)
    run.path.mkdir(parents=True, exist_ok=True)
    key: Ed25519PrivateKey = load_private_key(create_keys(run.keys).private)
    store, folders = ReleaseStore(str(run.release_store)), []
    for seed in range(releases):
        folder = run.path / f"made-{seed}"
        manifest = make_release_folder(folder, videos=videos, seed=seed, key=key, **arguments)
        folders.append(store.fetch(store.write(folder, manifest), run.path / "serving" / "releases"))
    return run, folders


def writer_options(run: RunDirectory) -> OverlayOptions:
    return OverlayOptions(
        events=str(run.path / "events"),
        overlay=str(run.overlay),
        release_store=str(run.release_store),
        release_cache=run.path / "serving" / "releases",
        public_keys=run.keys,
        lists_state=run.path / "stream" / "lists.npz",
    )


@contextmanager
def overlay_writer(run: RunDirectory, registry: CollectorRegistry | None = None) -> Iterator[OverlayWriter]:
    """Yields the overlay writer of a run. A step lists the requested releases."""
    metrics = OverlayWriterMetrics(registry or CollectorRegistry())
    with closing(OverlayWriter(writer_options(run), metrics)) as writer:
        yield writer
