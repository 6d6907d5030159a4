"""Measures the service under load beside its floor: latency, throughput, CPU, transport, open loop and overload.

A degraded response ends the benchmark, because its timings would mean nothing. There are two exceptions: with more
connections than the service answers in time, late stages use their fallbacks; in the overload, 429 is a valid response.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import httpx
import numpy as np
from numpy.typing import NDArray
from tests.benchmarks.serving_fixture import NOW, VIEWERS, ServingFixture, store_candidates
from tests.benchmarks.serving_load import LoadPlan, latency_ms, run_load
from tests.benchmarks.serving_variants import COUNT, Variant, floor_of, floor_per_s, running
from tests.support.bench_results import Row

from reelway.platform.cli.terminal import print_status

CORES: Final = os.cpu_count() or 1
SIDES: Final[dict[str, dict[str, Any]]] = {
    "naive": {},
    "staged": {"authenticated": True},
    "fused": {"authenticated": True, "replicas": {"router": CORES}},
}
"""Settings of each variant. Ours verifies the viewer's token and appends each slate to the event log; others do not."""
OVER_FLOOR_BARS: Final = {"staged": 2.0, "fused": 1.35}
"""p50 of one request at a time, over the floor's."""
CPU_BARS_MS: Final = {"staged": 11.0, "fused": 6.8}
"""CPU of one request at a time."""
RATIO_BARS: Final = {
    ("staged", "naive"): 30.0, ("staged", "the floor"): 0.42, ("fused", "naive"): 52.0, ("fused", "the floor"): 0.68,
}  # fmt: skip
"""Throughput at ``CAPACITY`` connections over another variant's."""
OPEN_LOOP_BARS_MS: Final = {"staged": 60.0, "fused": 60.0}
REPLICA_BAR_MB: Final = 250.0
OVERLOAD_BAR: Final = 1.5
"""p99 of accepted requests in an overload, over the p99 at capacity."""
QUEUE: Final = {"max_ongoing_requests": 16, "max_ongoing_sustained": 3}
"""Limits of one router in the overload. The sustained limit bounds the wait of an accepted request. Arrivals at half of
the capacity come in bursts, so the limit of a burst is higher."""
STAGES: Final = ("retrieval", "ranking", "reranking")
ROUNDS: Final = 3
SETTLED_S: Final = 60.0
OPEN_LOOPS: Final = 5
"""Number of open loops, each with other arrivals. A single one may only show what else the machine did."""
CAPACITY: Final = 8
"""Number of connections with which the capacity is measured."""


@dataclass(frozen=True)
class LoadResult:
    """One measurement under load."""

    ms: NDArray[np.float64]
    per_s: float
    cpu_ms: float  # CPU of the service per request
    whole: float = 1.0  # share of responses that are not degraded


def measure_path(fixture: ServingFixture, seconds: float, sides: Sequence[str] = tuple(SIDES)) -> Iterator[Row]:
    """Measures floor and variants: latency at concurrency 1, throughput at 1, 8 and 32, CPU, memory and transport.

    Yields each row when it is measured, so that rows are kept if a later variant does not start.
    """
    if "naive" in sides:
        from tests.benchmarks.serving_naive import naive_candidates

        print_status("writing the candidates' features for the naive variant")
        store_candidates(fixture, naive_candidates(fixture), time.time(), fixture.loader().table())
    floor = floor_of(fixture)
    floors: list[float] = []
    at_eight: dict[str, float] = {}
    for kind in sides:
        print_status(f"measuring {kind}")
        floors.append(
            floor_per_s(fixture, seconds, CORES)
        )  # measured again each time, because other processes may use the machine
        with running(kind, fixture.path, **SIDES[kind]) as side:
            settle(side, fixture)
            yield from measure_in_turns(kind, side, fixture, floor, seconds)
            for connections in (1, CAPACITY, 32):
                seen = measured(side, fixture, seconds, beyond=connections > CAPACITY, connections=connections)
                bar = CPU_BARS_MS.get(kind) if connections == 1 else None
                yield from load_rows(f"{kind}, concurrency {connections}", seen, bar)
                if connections == CAPACITY:
                    at_eight[kind] = seen.per_s
            yield from memory_rows(kind, side.replica_mb())
            if kind != "naive":
                yield from breakdown_rows(kind, side, fixture, seconds)
            if kind in OPEN_LOOP_BARS_MS:
                yield from open_loop_rows(kind, side, fixture, 2 * seconds, 0.7 * at_eight[kind])
    floors.append(floor_per_s(fixture, seconds, CORES))
    at_eight["the floor"] = float(np.median(floors))
    yield Row(f"floor, {CORES} processes: throughput, median of {len(floors)}", at_eight["the floor"], "requests/s")
    yield from ratio_rows(at_eight)


def ratio_rows(at_eight: dict[str, float]) -> list[Row]:
    """Returns the ratios of throughput at 8 connections, for the variants that were measured."""
    rows = []
    for (kind, other), least in RATIO_BARS.items():
        if kind in at_eight and other in at_eight:
            ratio = at_eight[kind] / at_eight[other]
            name = f"{kind} over {other}, throughput at {CAPACITY}"
            rows.append(Row(name, ratio, "x", f">= {least:g}", ratio >= least))
    return rows


def memory_rows(kind: str, replica_mb: dict[str, float]) -> Iterator[Row]:
    """Returns the memory of each replica. Pages of the release that processes share count in proportion."""
    for name, mb in sorted(replica_mb.items()):
        bar = (f"<= {REPLICA_BAR_MB:g}", mb <= REPLICA_BAR_MB) if kind in CPU_BARS_MS else ("", None)
        yield Row(f"{kind}: memory of {name}", mb, "MB", *bar)


def settle(side: Variant, fixture: ServingFixture) -> None:
    """Sends load until no response of a second is degraded: replicas and proxy start one after another."""
    deadline = time.monotonic() + SETTLED_S
    while not run_load(plan(side, fixture, 1.0, connections=4))["whole"].all():
        if time.monotonic() > deadline:
            raise SystemExit(f"{side.url}: responses are still degraded after {SETTLED_S:g} s")
    load(side, fixture, 3.0, connections=4)


def measure_in_turns(
    kind: str, side: Variant, fixture: ServingFixture, floor: Callable[[int], int], seconds: float
) -> list[Row]:
    """Measures floor and service in turns, one request at a time, so that a busy machine affects both."""
    floor_ms: list[float] = []
    service_ms: list[NDArray[np.float64]] = []
    for turn in range(ROUNDS):
        for i in range(100):
            start = time.perf_counter()
            if not floor(turn * 100 + i):
                raise SystemExit("floor: a response is degraded; the timings would mean nothing")
            floor_ms.append(1000 * (time.perf_counter() - start))
        service_ms.append(latency_ms(load(side, fixture, seconds / ROUNDS)))
    rows = []
    for name, taken in ((f"floor beside {kind}", np.array(floor_ms)), (f"{kind}", np.concatenate(service_ms))):
        rows += [Row(f"{name}, one at a time, p{q}", float(np.percentile(taken, q)), "ms") for q in (50, 95, 99)]
    ratio = float(np.median(np.concatenate(service_ms)) / np.median(floor_ms))
    most = OVER_FLOOR_BARS.get(kind)
    bar = ("", None) if most is None else (f"<= {most:g}", ratio <= most)
    return [*rows, Row(f"{kind} over the floor, p50", ratio, "x", *bar)]


def load(
    side: Variant, fixture: ServingFixture, seconds: float, *, beyond: bool = False, **settings: Any
) -> NDArray[np.void]:
    """Returns the responses to the load; exits at a degraded response.

    Args:
        beyond: the load exceeds the capacity, so late stages may use their fallbacks; exits at a failed response only.
    """
    answers = run_load(plan(side, fixture, seconds, **settings))
    if not (answers["status"] == 200 if beyond else answers["whole"]).all():
        statuses = np.unique(answers["status"], return_counts=True)
        raise SystemExit(f"{(~answers['whole']).sum()} of {len(answers)} responses are degraded; statuses {statuses}")
    return answers


def plan(side: Variant, fixture: ServingFixture, seconds: float, **settings: Any) -> LoadPlan:
    record = str(fixture.path / "load.npy")
    proofs = str(fixture.proofs)
    return LoadPlan(side.url, record, seconds, viewers=VIEWERS, count=COUNT, time=NOW, proofs=proofs, **settings)


def measured(
    side: Variant, fixture: ServingFixture, seconds: float, *, beyond: bool = False, **settings: Any
) -> LoadResult:
    before = side.cpu_s()
    answers = load(side, fixture, seconds, beyond=beyond, **settings)
    took = float(answers["done"].max() - answers["due"].min())
    cpu_ms, whole = 1000 * (side.cpu_s() - before) / len(answers), float(answers["whole"].mean())
    return LoadResult(latency_ms(answers), len(answers) / took, cpu_ms, whole)


def load_rows(name: str, seen: LoadResult, cpu_bar_ms: float | None = None) -> list[Row]:
    latency = [Row(f"{name}, p{q}", float(np.percentile(seen.ms, q)), "ms") for q in (50, 95, 99)]
    return [
        Row(f"{name}: throughput", seen.per_s, "requests/s"), *latency,
        Row(f"{name}: CPU", seen.cpu_ms, "ms/request",
            *(("", None) if cpu_bar_ms is None else (f"<= {cpu_bar_ms:g}", seen.cpu_ms <= cpu_bar_ms))),
        *([Row(f"{name}: slates with every stage", 100 * seen.whole, "%")] if seen.whole < 1 else []),
    ]  # fmt: skip


def open_loop_rows(kind: str, side: Variant, fixture: ServingFixture, seconds: float, rate: float) -> list[Row]:
    """Measures open loops with Poisson arrivals; a latency counts from the time a request was due."""
    taken = [latency_ms(load(side, fixture, seconds, rate=rate, seed=seed)) for seed in range(OPEN_LOOPS)]
    p50, p99 = (np.array([np.percentile(one, q) for one in taken]) for q in (50, 99))
    name, usual, most = (
        f"{kind}, open loop at {rate:.0f}/s (70 %), {OPEN_LOOPS} times",
        float(np.median(p99)),
        OPEN_LOOP_BARS_MS[kind],
    )
    return [
        Row(f"{name}, p50, median", float(np.median(p50)), "ms"),
        Row(f"{name}, p99, median", usual, "ms", f"< {most:g} ms", usual < most),
        Row(f"{name}, p99, lowest", float(p99.min()), "ms"),
        Row(f"{name}, p99, highest", float(p99.max()), "ms"),
    ]


def breakdown_rows(kind: str, side: Variant, fixture: ServingFixture, seconds: float) -> list[Row]:
    """Measures, one request at a time, the time of each stage and of its transport, and the CPU of each process.

    The CPU rows add up to the CPU of a request.
    """
    with httpx.Client(base_url=side.internal_url, timeout=30) as client:
        before, cpu_before = scraped(client), side.cpu_by_process()
        requests = len(load(side, fixture, seconds))
        cpu_s = {name: used - cpu_before.get(name, 0.0) for name, used in side.cpu_by_process().items()}
        parts = breakdown(before, scraped(client))
    by_cost = sorted(cpu_s.items(), key=lambda item: -item[1])
    idle_before = side.cpu_s()
    time.sleep(seconds)
    idle = 100 * (side.cpu_s() - idle_before) / seconds
    return [
        Row(f"{kind}, CPU without requests", idle, "% of a core"),
        *(Row(f"{kind}, mean of {name}", ms, "ms") for name, ms in parts.items()),
        *(Row(f"{kind}, CPU of {name}", 1000 * used_s / requests, "ms/request") for name, used_s in by_cost),
    ]


def scraped(client: httpx.Client) -> dict[str, float]:
    """Returns all sums and counts of latency histograms by series."""
    found = re.findall(r"^(reelway_\w+_latency_seconds_(?:sum|count)\S*) (\S+)$", client.get("/metrics").text, re.M)
    return {series: float(value) for series, value in found}


def breakdown(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Returns mean milliseconds between two scrapes: each stage's own work, and its transport."""

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


def measure_overload(fixture: ServingFixture, seconds: float, overload_s: float, sides: Sequence[str]) -> Iterator[Row]:
    """Measures an overload of three times the capacity: failures, latency of accepted requests, and recovery."""
    for kind in sides:
        if kind not in OVER_FLOOR_BARS:
            continue
        print_status(f"overload of {kind} for {overload_s:g} s")
        with running(kind, fixture.path, **SIDES[kind]) as side:
            settle(side, fixture)
            calm = measured(side, fixture, seconds, connections=CAPACITY)
        with running(kind, fixture.path, **SIDES[kind], **QUEUE) as side:
            settle(side, fixture)
            answers = run_load(plan(side, fixture, overload_s, rate=3 * calm.per_s))
            after = run_load(plan(side, fixture, 5 + seconds, rate=0.5 * calm.per_s))
        yield from overload_rows(kind, calm, answers, after)


def overload_rows(kind: str, calm: LoadResult, answers: NDArray[np.void], after: NDArray[np.void]) -> list[Row]:
    status, whole = answers["status"], answers["whole"]
    sent_away = status == 429
    failed = int((~(whole | sent_away) & (status != 200)).sum())
    accepted = latency_ms(answers[status == 200])
    bound, p99 = OVERLOAD_BAR * float(np.percentile(calm.ms, 99)), float(np.percentile(accepted, 99))
    recovered = after[after["due"] - after["due"].min() > 5]
    ok = float(recovered["whole"].mean())
    late = float(np.percentile(latency_ms(recovered), 99))
    took = float(answers["done"].max() - answers["due"].min())
    name, bar = f"{kind}, overload at 3x", f"< {bound:.0f} ms, {OVERLOAD_BAR:g} times the p99 at capacity"
    return [
        Row(f"{name}: requests", len(answers), ""),
        Row(f"{name}: failed (neither a slate nor 429)", failed, "", "0", failed == 0),
        Row(f"{name}: sent away with 429", 100 * float(sent_away.mean()), "%"),
        Row(f"{name}: slates a second, over what it does at ease", len(accepted) / took / calm.per_s, "x"),
        Row(f"{name}: p99 of the accepted", p99, "ms", bar, p99 < bound),
        Row(f"{kind}, 5 s after: whole slates", 100 * ok, "%", "100", ok == 1.0),
        Row(f"{kind}, 5 s after: p99", late, "ms", f"< {bound:.0f} ms", late < bound),
    ]
