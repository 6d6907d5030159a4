"""A rank server, with what a test needs to ask it."""

from __future__ import annotations

import asyncio
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from tests.release_files import NOW_S, make_release_folder

from reelway.platform.cli.processes import child, reelway_command
from reelway.platform.contracts.api import RequestContext
from reelway.platform.release.signing import create_keys, load_private_key
from reelway.platform.release.store import ReleaseStore
from reelway.platform.rollout.traffic.serving_options import ReleaseArgs, ReleaseStoreArgs
from reelway.serving.metrics import SHORT
from reelway.serving.open_inference.model import LoadedRanker
from reelway.serving.open_inference.server import Listening, RankServerOptions, run_rank_server
from reelway.serving.release_loader import ReleaseLoader
from reelway.serving.video_table import VideoTable
from reelway.serving.viewers import viewer_query

READY_S = 170.0


@dataclass
class MadeRelease:
    """A signed release in a store."""

    place: Path
    release: str

    @property
    def folder(self) -> Path:
        return self.place / "made"

    @cached_property
    def ranker(self) -> LoadedRanker:
        """The graph in this process."""
        return LoadedRanker(self.folder, candidates=100_000)

    @cached_property
    def table(self) -> VideoTable:
        """The release's videos."""
        return ReleaseLoader(self.folder).table()

    def inputs(self, candidates: int, seed: int = 0) -> dict[str, NDArray[Any]]:
        """The ranker's inputs for one made viewer and so many videos of the release."""
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
        """What the graph in this process answers."""
        return self.ranker.run(inputs)["outputs"]


def make_release(place: Path, videos: int = 600) -> MadeRelease:
    """A release, signed by a key in ``place / "keys"``."""
    key = load_private_key(create_keys(place / "keys").private)
    manifest = make_release_folder(place / "made", videos=videos, key=key)
    return MadeRelease(place, ReleaseStore(str(place / "releases")).write(place / "made", manifest))


@dataclass
class RankServer:
    """A server under test; ``stop`` is what SIGTERM does."""

    made: MadeRelease
    http_port: int
    grpc_port: int
    client: httpx.Client
    stop: Callable[[], None]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the series of this name that carry the labels."""
        found = re.findall(rf"^{name}(?:{{(.*)}})? (\S+)$", self.client.get("/metrics").text, re.M)
        return sum(float(v) for words, v in found if all(f'{k}="{w}"' in words for k, w in labels.items()))


def options_of(made: MadeRelease, **changes: Any) -> RankServerOptions:
    """At free ports of this machine."""
    source = ReleaseArgs(
        release_store=str(made.place / "releases"), release_cache=made.place / "cache",
        public_keys=made.place / "keys", release=made.release,
    )  # fmt: skip
    return RankServerOptions(source, host="127.0.0.1", http_port=0, grpc_port=0, **changes)


@contextmanager
def running_rank_server(made: MadeRelease, **changes: Any) -> Iterator[RankServer]:
    """A server that is ready, on a thread of this process; ended with the block."""
    began: Future[tuple[Listening, asyncio.AbstractEventLoop, asyncio.Event]] = Future()
    ended: Future[None] = Future()

    async def serve() -> None:
        where: list[Listening] = []
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        await run_rank_server(
            options_of(made, **changes), where.append, lambda: began.set_result((where[0], loop, stop)), stop
        )

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            (ended if began.done() else began).set_exception(error)
            raise
        ended.set_result(None)

    thread = threading.Thread(target=run, name="rank server")
    thread.start()
    at, loop, stop = began.result(READY_S)

    def end() -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(stop.set)

    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{at.http_port}", timeout=30) as client:
            yield RankServer(made, at.http_port, at.grpc_port, client, end)
    finally:
        end()
        thread.join()
        ended.result(READY_S)


@dataclass(frozen=True)
class RankServerProcess:
    """`reelway rank-server` in a process of its own, on this machine."""

    http_port: int
    grpc_port: int
    process: subprocess.Popen[bytes]


@contextmanager
def rank_server_process(
    shelf: ReleaseStoreArgs, release: str, place: Path, *, grpc_port: int = 0
) -> Iterator[RankServerProcess]:
    """A server that is ready.

    Args:
        place: folder for its log and its cache.
        grpc_port: 0 chooses a free one.
    """
    command = reelway_command(
        "rank-server", "--release", release, "--release-store", shelf.release_store, "--release-cache",
        str(place / "rank-cache"), "--public-keys", str(shelf.public_keys), "--host", "127.0.0.1", "--http-port", "0",
        "--grpc-port", str(grpc_port), "--drain-seconds", "0",
    )  # fmt: skip
    log = place / f"rank-server-{release[:SHORT]}.log"
    with child(command, log=log) as process:
        deadline = time.monotonic() + READY_S
        while "ranking by release" not in (said := log.read_text()):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the rank server is not ready:\n{said}")
            time.sleep(0.05)
        found = re.search(r"REST at \S+:(\d+), gRPC at \S+:(\d+)", said)
        assert found, said
        yield RankServerProcess(int(found[1]), int(found[2]), process)
