"""A small run on this machine, simulated and trained, with two signed releases. The feature stream continues it.

The releases and the files of the run are copied into one claim. Viewers' rows are not: the run's online store is the
installation's Redis, which begins empty, so every viewer is unknown until the stream has read what the viewer did.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from tests.support.cluster.kubectl import Kubectl
from tests.support.e2e.clusters import Cluster, retry_cleanup
from tests.support.e2e.pods import pod
from tests.support.e2e.release_fixtures import CLAIM, ReleaseFixtures

from reelway.platform.cli.processes import reelway_command
from reelway.platform.features.feast_store import CONFIG_FILE, online_store_config
from reelway.platform.release.signing import PRIVATE_NAME, PUBLIC_NAME, KeyPair
from reelway.platform.run_directory import RunDirectory

RUNS_PATH: Final = "runs/live"
"""The run's folder in the claim."""
_DELIVERED: Final = ("dataset", "features", "steps")
_EPOCHS: Final = "1"
_STEPS: Final = (
    ("simulate", "--viewers", "300", "--videos", "800", "--impressions", "20000"),
    ("features",),
    ("train", "--epochs", _EPOCHS),
    ("evaluate",),
    ("release", "build", "--name", "first"),
    ("release", "build", "--name", "second"),
)
_STEP_TIMEOUT_S: Final = 300.0


@dataclass(frozen=True)
class LiveRun:
    """The run and its releases."""

    run: RunDirectory
    releases: ReleaseFixtures

    def deliver(self, kubectl: Kubectl, redis: str) -> None:
        """Copies releases and run into a namespace's claim; ``redis`` (host:port) is the run's online store there."""
        config = self.run.features / CONFIG_FILE
        store = yaml.safe_load(config.read_text())
        store["online_store"] = online_store_config(f"redis://{redis}")
        config.write_text(yaml.safe_dump(store))
        self.releases.deliver(kubectl)
        with pod(kubectl, "run-delivery", claim=CLAIM) as name:
            kubectl.run("exec", name, "--", "mkdir", "-p", f"/volume/{RUNS_PATH}")
            for folder in _DELIVERED:
                source, target = self.run.path / folder, f"{name}:/volume/{RUNS_PATH}/{folder}"
                kubectl.run("cp", "--no-preserve", str(source), target)
            kubectl.run("exec", name, "--", "chmod", "-R", "a+rwX", "/volume/runs")

    def durations_ms(self) -> dict[int, int]:
        """Length of each video of the data set."""
        videos = pq.read_table(self.run.dataset / "videos.parquet", columns=["video_id", "duration_ms"])
        return dict(zip(videos["video_id"].to_pylist(), videos["duration_ms"].to_pylist(), strict=True))

    def new_video(self) -> dict[str, Any]:
        """An upload with the content and the creator of the data set's first video."""
        videos = pq.read_table(self.run.dataset / "videos.parquet")
        number = int(pc.max(videos["video_id"]).as_py()) + 1
        uploaded_at = datetime.now(UTC).isoformat()
        changed = {"video_id": number, "uploaded_at": uploaded_at, "title": "uploaded by the end-to-end test"}
        return {**videos.slice(0, 1).to_pylist()[0], **changed}


@contextmanager
def build_live_run(cluster: Cluster) -> Iterator[LiveRun]:
    """Builds the run (about two minutes on 2 cores) for namespaces that are deleted within the block."""
    with tempfile.TemporaryDirectory(prefix="reelway-e2e-live-") as path:
        run = RunDirectory(Path(path) / "live")
        outputs = [_reelway(*step, "--run", str(run.path)) for step in _STEPS]
        ids = tuple(output.strip().split()[-1] for output in outputs[-2:])
        keys = KeyPair(run.keys / PRIVATE_NAME, run.keys / PUBLIC_NAME)
        releases = ReleaseFixtures(cluster, run.path, keys, ids)
        try:
            yield LiveRun(run, releases)
        finally:
            for volume in releases.volumes:
                delete = ("delete", "pv", volume, "--ignore-not-found", "--timeout=60s")
                retry_cleanup(lambda delete=delete: cluster.kubectl("default").run(*delete))


def _reelway(*words: str) -> str:
    """Runs `reelway` on this machine and returns its output."""
    done = subprocess.run(
        reelway_command(*words), capture_output=True, text=True, timeout=_STEP_TIMEOUT_S, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, f"reelway {' '.join(words)} ended with {done.returncode}: {done.stderr[-4000:]}"
    return done.stdout
