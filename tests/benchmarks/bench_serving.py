"""The request path over HTTP and Ray Serve, against its floor: the same arithmetic in one process with nothing around.

Usage: python -m tests.benchmarks.bench_serving --videos 50000

Both sides read the viewer's row from the same online store and answer the same viewers. Floor and service are measured
in turns within one run, so that a machine that is busy for a while is busy for both.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
from numpy.typing import NDArray
from tests.benchmarks.report import Row, write_report
from tests.benchmarks.serving_release import make_realistic_release, viewer_row
from tests.release_files import NOW_S
from tests.serving.viewer_store import make_viewer_store

from reelway.platform.cli.terminal import say
from reelway.platform.contracts.api import RecommendRequest
from reelway.platform.features.store import ViewerRows, open_feature_store
from reelway.platform.release.signing import create_keys, load_private_key, sign
from reelway.platform.release.store import ReleaseStore
from reelway.platform.rollout.traffic.routing import Routing
from reelway.platform.tokens import TokenSigner
from reelway.serving.free_ports import free_port
from reelway.serving.release_loader import ReleaseLoader

BAR_MS = 25.0
VIEWERS = 200
COUNT = 20
ROUNDS = 4
SECRET = b"the benchmark's secret of tokens"
STAGES = ("retrieval", "ranking", "reranking")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=int, default=50_000)
    parser.add_argument("--requests", type=int, default=1000, help="on each side")
    parser.add_argument("--concurrency", type=int, default=8, help="of the throughput measurement")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as name:
        write_report("serving", measure(Path(name), options.videos, options.requests, options.concurrency))


def measure(place: Path, videos: int, requests: int, concurrency: int) -> list[Row]:
    """Build everything, run both sides, and say what was seen."""
    from reelway.serving.deployments.service import running_service
    from reelway.serving.serve_config import ReleaseShelf, ServiceOptions

    say(f"making a release of {videos} videos")
    manifest = sign(
        make_realistic_release(place / "made", videos), load_private_key(create_keys(place / "keys").private)
    )
    release = ReleaseStore(str(place / "releases")).write(place / "made", manifest)
    loader = ReleaseLoader(place / "made")
    table, rng = loader.table(), np.random.default_rng(1)
    make_viewer_store(place / "features", {viewer: viewer_row(table, rng) for viewer in range(VIEWERS)}, NOW_S)

    rows = ViewerRows(open_feature_store(place / "features"))
    graph = loader.graph(TokenSigner(SECRET))
    (place / "token.secret").write_bytes(SECRET)
    options = ServiceOptions(
        ReleaseShelf(release_store=str(place / "releases"), release_cache=place / "cache", public_keys=place / "keys"),
        metrics_dir=place / "metrics",
        token_secrets=place / "token.secret",
        features_dir=place / "features",
        outcomes=place / "outcomes.db",
        port=free_port("127.0.0.1"),
    )
    say("starting Ray Serve")
    with (
        running_service(Routing.whole(release), options, place / "ray.token") as service_at,
        httpx.Client(base_url=service_at.url, timeout=30) as client,
    ):

        def floor(i: int) -> int:
            request = RecommendRequest(viewer_id=i % VIEWERS, count=COUNT)
            answer = graph.recommend(request, rows.read(request.viewer_id), NOW_S)
            return len(answer.model_dump_json()) if not answer.degraded and len(answer.videos) == COUNT else 0

        def service(i: int) -> int:
            body = {"viewer_id": i % VIEWERS, "count": COUNT, "context": {"time": "2024-06-10T06:13:20Z"}}
            answer = client.post("/v1/recommend", json=body)
            return len(answer.content) if '"degraded":[]' in answer.text else 0

        say(f"{requests} requests on each side, in turns")
        in_turns(floor, service, 100, rounds=1)
        before = scraped(client)
        floor_ms, service_ms = in_turns(floor, service, requests, rounds=ROUNDS)
        parts = breakdown(before, scraped(client))
        say(f"{requests} requests, {concurrency} at a time")
        per_s = throughput(service_at.url, requests, concurrency)
    return report(floor_ms, service_ms, parts, per_s, concurrency)


def in_turns(
    floor: Callable[[int], int], service: Callable[[int], int], requests: int, *, rounds: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Milliseconds of each call on both sides. A wrong answer ends the benchmark."""
    taken: tuple[list[float], list[float]] = ([], [])
    for round_number in range(rounds):
        for call, into in zip((floor, service), taken, strict=True):
            for i in range(requests // rounds):
                start = time.perf_counter()
                size = call(round_number * requests + i)
                into.append(1000 * (time.perf_counter() - start))
                if not size:
                    raise SystemExit("an answer was degraded or not whole; the timings would mean nothing")
    return np.array(taken[0]), np.array(taken[1])


def throughput(url: str, requests: int, concurrency: int) -> float:
    """Requests per second with so many at a time, each on a connection of its own."""

    def some(first: int) -> None:
        with httpx.Client(base_url=url, timeout=30) as client:
            for i in range(first, requests, concurrency):
                client.post("/v1/recommend", json={"viewer_id": i % VIEWERS, "count": COUNT}).raise_for_status()

    start = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as threads:
        list(threads.map(some, range(concurrency)))
    return requests / (time.perf_counter() - start)


def scraped(client: httpx.Client) -> dict[str, float]:
    """Every sum and count of latency that the service reports, by its series."""
    found = re.findall(r"^(reelway_\w+_latency_seconds_(?:sum|count)\S*) (\S+)$", client.get("/metrics").text, re.M)
    return {series: float(value) for series, value in found}


def breakdown(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Mean milliseconds between two scrapes: of each stage's own work, and as the router sees it."""

    def mean_ms(name: str, label: str = "") -> float:
        sums = [0.0, 0.0]
        for series, value in after.items():
            for k, kind in enumerate(("_sum", "_count")):
                if series.startswith(f"{name}{kind}") and label in series:
                    sums[k] += value - before.get(series, 0.0)
        return 1000 * sums[0] / sums[1] if sums[1] else float("nan")

    parts = {"viewer row, online store": mean_ms("reelway_ingress_stage_latency_seconds", 'stage="viewer_row"')}
    for stage in STAGES:
        own = mean_ms(f"reelway_{stage}_latency_seconds")
        seen = mean_ms("reelway_ingress_stage_latency_seconds", f'stage="{stage}"')
        parts[f"{stage}, own work"] = own
        parts[f"{stage}, hop"] = seen - own
    parts["router, from valid request to answer"] = mean_ms("reelway_ingress_latency_seconds")
    return parts


def report(
    floor_ms: NDArray[np.float64],
    service_ms: NDArray[np.float64],
    parts: dict[str, float],
    per_s: float,
    concurrency: int,
) -> list[Row]:
    """The rows of the table."""
    rows = []
    for name, taken in (("floor, one process", floor_ms), ("over HTTP and Ray Serve", service_ms)):
        for q in (50, 95, 99):
            value = float(np.percentile(taken, q))
            held = q == 50 and taken is service_ms
            bar = f"< {BAR_MS:g} ms" if held else ""
            rows.append(Row(f"{name}, p{q}", value, "ms", bar, value < BAR_MS if held else None))
    rows.append(Row("ratio to the floor at p50", float(np.median(service_ms) / np.median(floor_ms)), "x"))
    rows.extend(Row(f"mean of {name}", value, "ms") for name, value in parts.items())
    rows.append(Row(f"throughput at concurrency {concurrency}", per_s, "requests/s"))
    return rows


if __name__ == "__main__":
    main()
