"""Latency of a release with its ranker in a rank server, against the same release with a local ranker.

Usage: python -m tests.benchmarks.bench_open_inference [--run runs/demo] [--requests 1000]
       python -m tests.benchmarks.bench_open_inference --release-dir FOLDER --output FILE [--requests 1000]

One service has both variants: two releases with the same files, each for half of the viewers. One client sends to both
in turns, so other load on the machine affects both, and the difference of the medians is the cost of the call. With
``--run`` the compared rows come from a trained run, otherwise from a generated release.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from numpy.typing import NDArray
from tests.benchmarks.open_inference_rows import added_in_one_process, compare_rows
from tests.benchmarks.serving_release import make_realistic_release, viewer_row
from tests.support.bench_results import Row, write_report
from tests.support.release_files import NOW_S
from tests.support.serving.rank_server import rank_server_process
from tests.support.serving.viewer_store import make_viewer_store

from reelway.platform.atomic_files import write_json
from reelway.platform.cli.terminal import print_status
from reelway.platform.contracts.events import Arm
from reelway.platform.features.feast_store import open_feature_store
from reelway.platform.features.viewer_rows import ViewerRowReader
from reelway.platform.release.folder import read_manifest
from reelway.platform.release.signing import create_keys, load_private_key, sign
from reelway.platform.release.store import ReleaseStore
from reelway.platform.rollout.traffic.routing import ArmRoute, Routing
from reelway.platform.rollout.traffic.serving_options import ReleaseStoreArgs, ServingOptions
from reelway.platform.run_directory import RunDirectory
from reelway.serving.free_ports import find_free_port
from reelway.serving.release_loader import ReleaseLoader

ADDED_BAR_MS = 4.0
CANDIDATES = 500
COUNT = 20
SECRET = b"the benchmark's secret of tokens"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="run directory with a trained release, whose rows are compared")
    parser.add_argument("--videos", type=int, default=50_000)
    parser.add_argument("--requests", type=int, default=1000, help="requests per variant")
    parser.add_argument("--release-dir", type=Path, help="release folder; measure only its added latency")
    parser.add_argument("--output", type=Path, help="file for the rows as JSON; required with --release-dir")
    options = parser.parse_args()
    if bool(options.release_dir) != bool(options.output):
        parser.error("--release-dir and --output: one is missing; give both or neither")
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-open-inference-") as name:
        if options.release_dir:
            rows = measure_added(Path(name), options.release_dir, options.requests)
            write_json(options.output, [asdict(row) for row in rows])
            return
        if options.run:
            rows += compare_run(RunDirectory(options.run), Path(name))
        print_status(f"generating a release with {options.videos:,} videos")
        make_realistic_release(Path(name) / "release", options.videos)
        rows += measure_added(Path(name), Path(name) / "release", options.requests, compare=not options.run)
    write_report("open_inference", rows)


def measure_added(folder: Path, release_folder: Path, requests: int, *, compare: bool = False) -> list[Row]:
    """Measures what a remote ranker adds to the whole request path.

    Args:
        release_folder: folder of the release, which the service gets twice.
        requests: requests per variant.
        compare: whether to compare the outputs of the two rankers as well.
    """
    from reelway.serving.deployments.local_serve import running_service

    folder.mkdir(exist_ok=True)
    local, remote = make_two_releases(folder, release_folder)
    store_args = ReleaseStoreArgs(
        release_store=str(folder / "releases"), release_cache=folder / "cache", public_keys=folder / "keys"
    )
    (folder / "token.secret").write_bytes(SECRET)
    options = ServingOptions(
        releases=store_args, metrics_dir=folder / "metrics", token_secrets=folder / "token.secret",
        features_dir=folder / "features", outcomes=folder / "outcomes.db", port=find_free_port("127.0.0.1"),
    )  # fmt: skip
    routing = Routing(
        salt="bench", rollout="bench",
        arms=(ArmRoute(arm=Arm.CANARY, release=remote, weight_bp=5000),
              ArmRoute(arm=Arm.STABLE, release=local, weight_bp=5000)),
    )  # fmt: skip
    rows = []
    print_status("starting the rank server and Ray Serve")
    with (
        rank_server_process(store_args, remote, folder) as server,
        running_service(Routing.single_release(local), options, folder / "token") as service,
    ):
        if compare:
            loader, chance = ReleaseLoader(folder / "releases" / remote), np.random.default_rng(0)
            viewers = (viewer_row(loader.table(), chance) for _ in itertools.count())
            rows += compare_rows(loader, server, viewers, "generated release")
        deploy_both(service, options, routing, remote, server.grpc_port)
        with httpx.Client(base_url=service.url, timeout=30) as client:
            arms = {arm: viewers_of(routing, arm, requests) for arm in (Arm.STABLE, Arm.CANARY)}
            latency_ms = request_in_turns(client, arms, warm_up=50)
        rows += resident_memory(server.process.pid)
    return rows + report(latency_ms, requests)


def resident_memory(pid: int) -> list[Row]:
    """Returns the server's resident memory after the requests."""
    return [Row("rank server, resident memory", psutil.Process(pid).memory_info().rss / 1e6, "MB")]


def added_by(release_folder: Path, requests: int) -> list[Row]:
    """Runs ``measure_added`` in its own process, because Ray reads its authentication mode once per process."""
    with tempfile.TemporaryDirectory(prefix="bench-added-") as name:
        rows = Path(name) / "rows.json"
        options = ["--release-dir", str(release_folder), "--requests", str(requests), "--output", str(rows)]
        subprocess.run([sys.executable, "-m", "tests.benchmarks.bench_open_inference", *options], check=True)
        return [Row(**row) for row in json.loads(rows.read_text())]


def deploy_both(service: Any, options: ServingOptions, routing: Routing, remote: str, port: int) -> None:
    """Deploys both releases. The release ``remote`` calls the server."""
    from reelway.platform.rollout.traffic.serve_config import compose_serve_config
    from reelway.serving.deployments.local_serve import deploy

    document = compose_serve_config(options, routing.releases, routing)
    for application in document["applications"]:
        if application["name"] == remote:
            application["args"]["ranker_address"] = f"127.0.0.1:{port}"
    deploy(service, document)


def make_two_releases(folder: Path, release_folder: Path) -> tuple[str, str]:
    """Creates two signed releases with the same files in a store, and an online store with their viewers."""
    manifest = read_manifest(release_folder)
    key = load_private_key(create_keys(folder / "keys").private)
    store, ids = ReleaseStore(str(folder / "releases")), []
    for second in range(2):
        later = manifest.model_copy(update={"created_at": manifest.created_at + timedelta(seconds=second)})
        ids.append(str(store.write(release_folder, sign(later, key))))
    table, chance = ReleaseLoader(release_folder).table(), np.random.default_rng(1)
    make_viewer_store(folder / "features", {viewer: viewer_row(table, chance) for viewer in range(200)}, NOW_S)
    return ids[0], ids[1]


def viewers_of(routing: Routing, arm: Arm, count: int) -> list[int]:
    """Returns this many ids of known viewers of the arm, with repetitions."""
    in_arm = [viewer for viewer in range(200) if routing.route_of(viewer).arm is arm]
    return [in_arm[i % len(in_arm)] for i in range(count)]


def request_in_turns(
    client: httpx.Client, arms: Mapping[Arm, list[int]], *, warm_up: int
) -> dict[Arm, NDArray[np.float64]]:
    """Returns the latency in ms of each request, of turns in which both responses are complete and from their arm.

    Raises:
        SystemExit: if fewer than 90 % of the turns are complete.
    """
    latency_ms: dict[Arm, list[float]] = {arm: [] for arm in arms}
    example = ""
    requests = len(arms[Arm.STABLE])
    for i in range(-warm_up, requests):
        turn = {}
        for arm, viewers in arms.items():
            body = {"viewer_id": viewers[i], "count": COUNT, "context": {"time": "2024-06-10T06:13:20Z"}}
            started = time.perf_counter()
            answer = client.post("/v1/recommend", json=body)
            elapsed_ms = 1000 * (time.perf_counter() - started)
            complete = answer.is_success and f'"arm":"{arm.value}"' in answer.text and '"degraded":[]' in answer.text
            if complete:
                turn[arm] = elapsed_ms
            else:
                example = answer.text[:300]
        if i >= 0 and len(turn) == len(arms):
            for arm, elapsed_ms in turn.items():
                latency_ms[arm].append(elapsed_ms)
    if len(latency_ms[Arm.STABLE]) < 0.9 * requests:
        raise SystemExit(
            f"{len(latency_ms[Arm.STABLE])} of {requests} turns were complete, expected 90 %; for example {example}"
        )
    return {arm: np.array(values) for arm, values in latency_ms.items()}


def report(latency_ms: Mapping[Arm, NDArray[np.float64]], requests: int) -> list[Row]:
    """Returns the latencies of both variants and their difference."""
    rows = [
        Row(f"whole request path, {where} ranker, p{q}", float(np.percentile(latency_ms[arm], q)), "ms")
        for arm, where in ((Arm.STABLE, "local"), (Arm.CANARY, "remote"))
        for q in (50, 95, 99)
    ]
    added = float(np.median(latency_ms[Arm.CANARY]) - np.median(latency_ms[Arm.STABLE]))
    bar = f"< {ADDED_BAR_MS:g} ms"
    omitted = requests - len(latency_ms[Arm.STABLE])
    return [
        *rows,
        Row(f"added at p50, {CANDIDATES} candidates", added, "ms", bar, added < ADDED_BAR_MS),
        Row(f"turns of {requests} left out, in which a slate was degraded", omitted, ""),
    ]


def compare_run(run: RunDirectory, folder: Path) -> list[Row]:
    """Compares rows of a run: viewers of its online store, candidates and ranker of its release."""
    release = str(ReleaseStore(str(run.release_store)).resolve("latest"))
    loader = ReleaseLoader(run.release_store / release)
    store = ViewerRowReader(open_feature_store(run.features))
    store_args = ReleaseStoreArgs(
        release_store=str(run.release_store), release_cache=folder / "run", public_keys=run.keys
    )
    with rank_server_process(store_args, release, folder) as server:
        rows = compare_rows(loader, server, (store.read(viewer) for viewer in itertools.count(1)), "trained")
        return rows + added_in_one_process(loader, server, [store.read(viewer) for viewer in range(1, 101)])


if __name__ == "__main__":
    main()
