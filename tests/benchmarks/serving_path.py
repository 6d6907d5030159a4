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
SIDES: Final[dict[str, dict[str, Any]]] = {"naive": {}, "staged": {}, "fused": {"replicas": {"router": CORES}}}
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
                yield from load_rows(f"{kind}, concurrency {connections}", seen)
                if connections == CAPACITY:
                    at_eight[kind] = seen.per_s
            yield from (Row(f"{kind}: memory of {name}", mb, "MB") for name, mb in sorted(side.replica_mb().items()))
            if kind != "naive":
                yield from breakdown_rows(kind, side, fixture, seconds)
            if kind == "fused":
                yield from open_loop_rows(side, fixture, 2 * seconds, 0.7 * at_eight[kind])
    floors.append(floor_per_s(fixture, seconds, CORES))
    at_eight["the floor"] = float(np.median(floors))
    yield Row(f"floor, {CORES} processes: throughput, median of {len(floors)}", at_eight["the floor"], "requests/s")
    yield from ratio_rows(at_eight)


def ratio_rows(at_eight: dict[str, float]) -> list[Row]:
    """Returns the ratios of throughput at 8 connections, for the variants that were measured."""
    rows = []
    for kind, other, least in (("fused", "naive", 8), ("fused", "the floor", 0.5), ("staged", "naive", None)):
        if kind in at_eight and other in at_eight:
            ratio = at_eight[kind] / at_eight[other]
            bar = ("", None) if least is None else (f">= {least}", ratio >= least)
            rows.append(Row(f"{kind} over {other}, throughput at 8", ratio, "x", *bar))
    return rows


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
    bar = ("<= 2", ratio <= 2) if kind == "fused" else ("", None)
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
    return LoadPlan(side.url, record, seconds, viewers=VIEWERS, count=COUNT, time=NOW, **settings)


def measured(
    side: Variant, fixture: ServingFixture, seconds: float, *, beyond: bool = False, **settings: Any
) -> LoadResult:
    before = side.cpu_s()
    answers = load(side, fixture, seconds, beyond=beyond, **settings)
    took = float(answers["done"].max() - answers["due"].min())
    cpu_ms, whole = 1000 * (side.cpu_s() - before) / len(answers), float(answers["whole"].mean())
    return LoadResult(latency_ms(answers), len(answers) / took, cpu_ms, whole)


def load_rows(name: str, seen: LoadResult) -> list[Row]:
    latency = [Row(f"{name}, p{q}", float(np.percentile(seen.ms, q)), "ms") for q in (50, 95, 99)]
    return [
        Row(f"{name}: throughput", seen.per_s, "requests/s"), *latency, Row(f"{name}: CPU", seen.cpu_ms, "ms/request"),
        *([Row(f"{name}: slates with every stage", 100 * seen.whole, "%")] if seen.whole < 1 else []),
    ]  # fmt: skip


def open_loop_rows(side: Variant, fixture: ServingFixture, seconds: float, rate: float) -> list[Row]:
    """Measures open loops with Poisson arrivals; a latency counts from the time a request was due."""
    taken = [latency_ms(load(side, fixture, seconds, rate=rate, seed=seed)) for seed in range(OPEN_LOOPS)]
    p50, p99 = (np.array([np.percentile(one, q) for one in taken]) for q in (50, 99))
    name, usual = f"fused, open loop at {rate:.0f}/s (70 %), {OPEN_LOOPS} times", float(np.median(p99))
    return [
        Row(f"{name}, p50, median", float(np.median(p50)), "ms"),
        Row(f"{name}, p99, median", usual, "ms", "< 100 ms", usual < 100),
        Row(f"{name}, p99, lowest", float(p99.min()), "ms"),
        Row(f"{name}, p99, highest", float(p99.max()), "ms"),
    ]


def breakdown_rows(kind: str, side: Variant, fixture: ServingFixture, seconds: float) -> list[Row]:
    """Measures the mean milliseconds of each stage's own work and of its transport, between two scrapes."""
    with httpx.Client(base_url=side.internal_url, timeout=30) as client:
        before = scraped(client)
        load(side, fixture, seconds)
        parts = breakdown(before, scraped(client))
    return [Row(f"{kind}, mean of {name}", ms, "ms") for name, ms in parts.items()]


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


def measure_overload(fixture: ServingFixture, seconds: float, overload_s: float) -> list[Row]:
    """Measures an overload of three times the capacity: failures, latency of accepted requests, and recovery."""
    print_status(f"overload for {overload_s:g} s")
    with running("fused", fixture.path, **SIDES["fused"]) as side:
        settle(side, fixture)
        calm = measured(side, fixture, seconds, connections=CAPACITY)
    with running("fused", fixture.path, **SIDES["fused"], **QUEUE) as side:
        settle(side, fixture)
        answers = run_load(plan(side, fixture, overload_s, rate=3 * calm.per_s))
        after = run_load(plan(side, fixture, 5 + seconds, rate=0.5 * calm.per_s))
    return overload_rows(calm, answers, after)


def overload_rows(calm: LoadResult, answers: NDArray[np.void], after: NDArray[np.void]) -> list[Row]:
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
