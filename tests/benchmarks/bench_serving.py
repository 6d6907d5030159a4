"""The request path against its floor and against the naive composition, and its parts against their bars.

Usage: python -m tests.benchmarks.bench_serving [--only parts,path,overload] [--videos 200000] [--overload-s 60]

- the floor: the same arithmetic in one process, nothing around it (one process for each core for its throughput);
- the naive composition: what the guides of Serve, Feast and torch lead to (``serving_naive``);
- ours, ``staged`` (three deployments behind the router) and ``fused`` (the stages in the routers).

All answer the same viewers from the same release and read the viewers' rows from the same online store. The load comes
from a process of its own on the same cores, so every side pays for it. What is compared comes from one run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
import psutil
from numpy.typing import NDArray
from tests.benchmarks.report import Row, write_report
from tests.benchmarks.serving_load import LoadPlan, latency_ms, run_load
from tests.benchmarks.serving_place import NOW, VIEWERS, Place, make_place, online_store, store_candidates
from tests.benchmarks.serving_sides import COUNT, Side, floor_of, floor_per_s, running

from reelway.platform.cli.terminal import say

CORES: Final = os.cpu_count() or 1
FUSED: Final[dict[str, Any]] = {"replicas": {"router": CORES}}
AT_ONCE: Final = 8
"""Requests that one router takes at once in the overload: what its queue may hold is what an accepted one may wait."""
SECTIONS: Final = ("parts", "path", "overload")
STAGES: Final = ("retrieval", "ranking", "reranking")
ROUNDS: Final = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"some of {', '.join(SECTIONS)}")
    parser.add_argument("--videos", type=int, default=200_000)
    parser.add_argument("--large", type=int, default=1_000_000, help="videos of the largest catalogue")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement under load")
    parser.add_argument("--overload-s", type=float, default=60.0)
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := sorted(set(chosen) - set(SECTIONS)):
        parser.error(f"--only names {unknown}, expected among {SECTIONS}")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as name:
        path = Path(name)
        say(f"making a release of {options.videos} videos")
        place = make_place(path / "place", options.videos)
        with online_store(place) as address:
            say(f"the online store is {address.partition(':')[0]}")
            if "parts" in chosen:
                rows += measure_parts(path, place, options.large)
            if "path" in chosen:
                rows += measure_path(place, options.seconds)
            if "overload" in chosen:
                rows += measure_overload(place, options.seconds, options.overload_s)
    write_report("serving", rows)


def measure_parts(path: Path, place: Place, large: int) -> list[Row]:
    """Each part by itself, and a replica's start."""
    from tests.benchmarks import serving_parts as parts

    rows = parts.measure_features(place) + parts.measure_ranking(place) + parts.measure_retrieval(path, large)
    rows += parts.measure_growth(path, (large // 100, large // 10, large))
    return rows + measure_cold_start(make_place(path / "cold", large), large)


def measure_cold_start(place: Place, videos: int) -> list[Row]:
    """Two replicas, one after the other, of a release that the node has."""
    say(f"cold start with {videos} videos")
    command = [sys.executable, "-m", "tests.benchmarks.serving_sides", "cold", str(place.path)]
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)  # the node fetches it
    replicas: list[subprocess.Popen[str]] = []
    took_s = []
    try:
        for _ in range(2):
            replicas.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            took_s.append(float(json.loads(replicas[-1].stdout.readline())["seconds"]))  # type: ignore[union-attr]
        memory = [psutil.Process(one.pid).memory_full_info() for one in replicas]
    finally:
        for one in replicas:
            one.communicate()
    slowest = max(took_s)
    return [
        Row(f"cold start, {videos:,} videos: process to first slate", slowest, "s", "< 10 s", slowest < 10),
        Row("cold start: memory that is a replica's own", max(one.uss for one in memory) / 1e6, "MB"),
        Row("cold start: mapped memory that two replicas share", (memory[0].rss - memory[0].uss) / 1e6, "MB"),
    ]


@dataclass(frozen=True)
class Seen:
    """One measurement under load."""

    ms: NDArray[np.float64]
    per_s: float
    cpu_ms: float  # of the service, a request


def measure_path(place: Place, seconds: float) -> list[Row]:
    """Floor, naive and ours: latency in turns at concurrency 1, throughput at 1, 8, 32, CPU, memory, hops."""
    from tests.benchmarks.serving_naive import naive_candidates

    say("writing the candidates' features for the naive side")
    store_candidates(place, naive_candidates(place), time.time(), place.loader().table())
    floor = floor_of(place)
    floor_rate = floor_per_s(place, seconds, CORES)
    rows = [Row(f"floor, {CORES} processes: throughput", floor_rate, "requests/s")]
    seen: dict[str, dict[int, Seen]] = {}
    for kind, settings in (("naive", {}), ("staged", {}), ("fused", FUSED)):
        say(f"measuring {kind}")
        with running(kind, place.path, **settings) as side:
            load(side, place, 4, connections=4)
            rows += measure_in_turns(kind, side, place, floor, seconds)
            seen[kind] = {n: measured(side, place, seconds, connections=n) for n in (1, 8, 32)}
            for connections, one in seen[kind].items():
                rows += load_rows(f"{kind}, concurrency {connections}", one)
            rows += [Row(f"{kind}: memory of {name}", mb, "MB") for name, mb in sorted(side.replica_mb().items())]
            if kind != "naive":
                rows += breakdown_rows(kind, side, place, seconds)
            if kind == "fused":
                rows += open_loop_rows(side, place, 2 * seconds, 0.7 * seen[kind][8].per_s)
    rate, naive_rate = seen["fused"][8].per_s, seen["naive"][8].per_s
    rows += [
        Row("fused over naive, throughput at 8", rate / naive_rate, "x", ">= 8", rate / naive_rate >= 8),
        Row("fused over the floor, throughput at 8", rate / floor_rate, "x", ">= 0.5", rate / floor_rate >= 0.5),
        Row("staged over naive, throughput at 8", seen["staged"][8].per_s / naive_rate, "x"),
    ]
    return rows


def measure_in_turns(kind: str, side: Side, place: Place, floor: Callable[[int], int], seconds: float) -> list[Row]:
    """Floor and service in turns, one request at a time: a machine that is busy for a while is busy for both."""
    floor_ms: list[float] = []
    service_ms: list[NDArray[np.float64]] = []
    for turn in range(ROUNDS):
        for i in range(100):
            start = time.perf_counter()
            if not floor(turn * 100 + i):
                raise SystemExit("an answer of the floor was not whole; the timings would mean nothing")
            floor_ms.append(1000 * (time.perf_counter() - start))
        service_ms.append(latency_ms(load(side, place, seconds / ROUNDS)))
    rows = []
    for name, taken in ((f"floor beside {kind}", np.array(floor_ms)), (f"{kind}", np.concatenate(service_ms))):
        rows += [Row(f"{name}, one at a time, p{q}", float(np.percentile(taken, q)), "ms") for q in (50, 95, 99)]
    ratio = float(np.median(np.concatenate(service_ms)) / np.median(floor_ms))
    bar = ("<= 2", ratio <= 2) if kind == "fused" else ("", None)
    return [*rows, Row(f"{kind} over the floor, p50", ratio, "x", *bar)]


def load(side: Side, place: Place, seconds: float, **how: Any) -> NDArray[np.void]:
    """Whole answers only: a degraded one ends the benchmark."""
    answers = run_load(plan(side, place, seconds, **how))
    if not answers["whole"].all():
        statuses = np.unique(answers["status"], return_counts=True)
        raise SystemExit(f"{(~answers['whole']).sum()} of {len(answers)} answers were not whole; statuses {statuses}")
    return answers


def plan(side: Side, place: Place, seconds: float, **how: Any) -> LoadPlan:
    record = str(place.path / "load.npy")
    return LoadPlan(side.url, record, seconds, viewers=VIEWERS, count=COUNT, time=NOW, **how)


def measured(side: Side, place: Place, seconds: float, **how: Any) -> Seen:
    before = side.cpu_s()
    answers = load(side, place, seconds, **how)
    took = float(answers["done"].max() - answers["due"].min())
    return Seen(latency_ms(answers), len(answers) / took, 1000 * (side.cpu_s() - before) / len(answers))


def load_rows(name: str, seen: Seen) -> list[Row]:
    latency = [Row(f"{name}, p{q}", float(np.percentile(seen.ms, q)), "ms") for q in (50, 95, 99)]
    return [
        Row(f"{name}: throughput", seen.per_s, "requests/s"), *latency, Row(f"{name}: CPU", seen.cpu_ms, "ms/request"),
    ]  # fmt: skip


def open_loop_rows(side: Side, place: Place, seconds: float, rate: float) -> list[Row]:
    """Poisson arrivals; a latency counts from when the request was due."""
    taken = latency_ms(load(side, place, seconds, rate=rate))
    name, p99 = f"fused, open loop at {rate:.0f}/s (70 %)", float(np.percentile(taken, 99))
    return [
        Row(f"{name}, p50", float(np.median(taken)), "ms"),
        Row(f"{name}, p99", p99, "ms", "< 100 ms", p99 < 100),
    ]


def breakdown_rows(kind: str, side: Side, place: Place, seconds: float) -> list[Row]:
    """Mean milliseconds of each stage's own work and of its hop, between two scrapes."""
    with httpx.Client(base_url=side.url, timeout=30) as client:
        before = scraped(client)
        load(side, place, seconds)
        parts = breakdown(before, scraped(client))
    return [Row(f"{kind}, mean of {name}", ms, "ms") for name, ms in parts.items()]


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
    parts["path, viewer row to answer"] = mean_ms("reelway_ingress_latency_seconds")
    return parts


def measure_overload(place: Place, seconds: float, overload_s: float) -> list[Row]:
    """Three times what the service can do: nobody fails, who is accepted does not wait, and it is over when it is."""
    say(f"overload for {overload_s:g} s")
    with running("fused", place.path, **FUSED, at_once=AT_ONCE) as side:
        load(side, place, 4, connections=4)
        calm = measured(side, place, seconds, connections=AT_ONCE)
        answers = run_load(plan(side, place, overload_s, rate=3 * calm.per_s))
        after = run_load(plan(side, place, 5 + seconds, rate=0.5 * calm.per_s))
    return overload_rows(calm, answers, after)


def overload_rows(calm: Seen, answers: NDArray[np.void], after: NDArray[np.void]) -> list[Row]:
    status, whole = answers["status"], answers["whole"]
    sent_away = status == 429
    failed = int((~(whole | sent_away) & (status != 200)).sum())
    accepted = latency_ms(answers[status == 200])
    bound, p99 = 2 * float(np.percentile(calm.ms, 99)), float(np.percentile(accepted, 99))
    recovered = after[after["due"] - after["due"].min() > 5]
    ok = float(recovered["whole"].mean())
    late = float(np.percentile(latency_ms(recovered), 99))
    took = float(answers["done"].max() - answers["due"].min())
    return [
        Row("overload at 3x: requests", len(answers), ""),
        Row("overload: failed (neither a slate nor 429)", failed, "", "0", failed == 0),
        Row("overload: sent away with 429", 100 * float(sent_away.mean()), "%"),
        Row("overload: slates a second, over what it does at ease", len(accepted) / took / calm.per_s, "x"),
        Row("overload: p99 of the accepted", p99, "ms", f"< {bound:.0f} ms, twice the p99 at capacity", p99 < bound),
        Row("5 s after: whole slates", 100 * ok, "%", "100", ok == 1.0),
        Row("5 s after: p99", late, "ms", f"< {bound:.0f} ms", late < bound),
    ]


if __name__ == "__main__":
    main()
