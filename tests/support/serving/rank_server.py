"""A signed release for tests, and ``reelway rank-server`` as a process that serves it."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from tests.support.release_files import NOW_S, make_release_folder

from reelway.platform.cli.processes import child_process, reelway_command
from reelway.platform.contracts.api import RequestContext
from reelway.platform.release.signing import create_keys, load_private_key
from reelway.platform.release.store import ReleaseStore
from reelway.platform.rollout.traffic.serving_options import ReleaseStoreArgs
from reelway.serving.metrics import SHORT_RELEASE
from reelway.serving.open_inference.ranker_service import LoadedRanker
from reelway.serving.release_loader import ReleaseLoader
from reelway.serving.video_table import VideoTable
from reelway.serving.viewer_query import viewer_query

STARTUP_TIMEOUT_S = 170.0
LISTENING = re.compile(r"REST at http://\S+:(\d+), gRPC at \S+:(\d+)\s")


@dataclass
class ReleaseFixture:
    """A signed release in a store.

    Args:
        path: has the store ``releases``, the release's folder ``release`` and the key pair ``keys``.
        release: its id.
    """

    path: Path
    release: str

    @property
    def folder(self) -> Path:
        return self.path / "release"

    @cached_property
    def ranker(self) -> LoadedRanker:
        """The release's ranker in this process."""
        return LoadedRanker(self.folder, max_candidates=100_000)

    @cached_property
    def table(self) -> VideoTable:
        return ReleaseLoader(self.folder).table()

    def inputs(self, candidates: int, seed: int = 0) -> dict[str, NDArray[Any]]:
        """Returns the ranker's inputs for one viewer and this many videos of the release."""
        table = self.table
        rng = np.random.default_rng(seed)
        watched = rng.choice(table.video_id, 20).tolist()
        row = {
            "region": "eu", "history_videos": watched, "history_weights": [1.0] * 20,
            "history_times_s": [NOW_S - 60.0 * i for i in range(20, 0, -1)],
            "topic_affinity": rng.dirichlet(np.ones(32)).tolist(),
        }  # fmt: skip
        viewer = viewer_query(row, RequestContext(), NOW_S, table, seed=0).arrays
        return {
            "viewer_dense": viewer.viewer_dense,
            "viewer_categories": viewer.viewer_categories,
            "viewer_embedding": table.embedding[rng.integers(len(table), size=1)],
            **table.gather(rng.integers(len(table), size=candidates).astype(np.int32), NOW_S).as_inputs(),
        }

    def outputs(self, inputs: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Returns the output of the ranker in this process."""
        return self.ranker.run(inputs)["outputs"]


def make_release(path: Path, videos: int = 600) -> ReleaseFixture:
    key = load_private_key(create_keys(path / "keys").private)
    manifest = make_release_folder(path / "release", videos=videos, key=key)
    return ReleaseFixture(path, ReleaseStore(str(path / "releases")).write(path / "release", manifest))


@dataclass
class RankServer:
    """A server under test, with a client for REST."""

    made: ReleaseFixture
    http_port: int
    grpc_port: int
    client: httpx.Client
    process: subprocess.Popen[bytes]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def metric(self, name: str, **labels: str) -> float:
        """Returns the sum of the series with this name and these labels."""
        samples = re.findall(rf"^{name}(?:{{(.*)}})? (\S+)$", self.client.get("/metrics").text, re.M)
        return sum(float(v) for series, v in samples if all(f'{k}="{w}"' in series for k, w in labels.items()))


@dataclass(frozen=True)
class RankServerProcess:
    """The ports and the process of a server."""

    http_port: int
    grpc_port: int
    process: subprocess.Popen[bytes]


def rank_server_command(folder: Path, *options: str) -> list[str]:
    """Returns the command line of a server on 127.0.0.1. Its ports are free ones unless ``options`` name them."""
    ports = ("--http-port", "0", "--grpc-port", "0")
    return reelway_command("rank-server", "--release-dir", str(folder), "--host", "127.0.0.1", *ports, *options)


def wait_until_listening(log: Path, process: subprocess.Popen[bytes]) -> tuple[int, int]:
    """Returns the ports of REST and gRPC that the server's log names."""
    deadline = time.monotonic() + STARTUP_TIMEOUT_S
    while not ((ports := LISTENING.search(text := log.read_text())) and "ranking with release" in text):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"rank server: not listening; its log:\n{text}")
        time.sleep(0.05)
    return int(ports[1]), int(ports[2])


@contextmanager
def running_rank_server(release: ReleaseFixture, log: Path, *options: str) -> Iterator[RankServer]:
    """Runs a server of the release's folder with these options until the block ends."""
    with child_process(rank_server_command(release.folder, *options), log=log) as process:
        http_port, grpc_port = wait_until_listening(log, process)
        with httpx.Client(base_url=f"http://127.0.0.1:{http_port}", timeout=30) as client:
            yield RankServer(release, http_port, grpc_port, client, process)


@contextmanager
def rank_server_process(
    store: ReleaseStoreArgs, release: str, folder: Path, *, grpc_port: int = 0
) -> Iterator[RankServerProcess]:
    """Fetches and verifies a release, as the init container does, and runs a server of it until the block ends.

    Args:
        folder: folder for the server's log and the fetched release.
        grpc_port: 0 selects a free port.
    """
    fetch = reelway_command(
        "release", "fetch", release, "--release-store", store.release_store, "--to", str(folder / "rank-cache"),
        "--verify", "--public-keys", str(store.public_keys),
    )  # fmt: skip
    subprocess.run(fetch, check=True, timeout=STARTUP_TIMEOUT_S, stdout=subprocess.DEVNULL)
    command = rank_server_command(
        folder / "rank-cache" / release, "--grpc-port", str(grpc_port), "--drain-seconds", "0"
    )
    log = folder / f"rank-server-{release[:SHORT_RELEASE]}.log"
    with child_process(command, log=log) as process:
        http_port, bound_port = wait_until_listening(log, process)
        yield RankServerProcess(http_port, bound_port, process)
