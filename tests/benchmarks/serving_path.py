"""The service under load beside its floor: latency in turns, throughput, CPU, hops, open loop, overload.

Every measurement is of whole answers: one that took a rung of the ladder ends the benchmark, but for more connections
than the service answers in time, where a stage that is late is left out, and the overload, where being sent away is an
answer.
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
from tests.benchmarks.report import Row
from tests.benchmarks.serving_load import LoadPlan, latency_ms, run_load
from tests.benchmarks.serving_place import NOW, VIEWERS, Place, store_candidates
from tests.benchmarks.serving_sides import COUNT, Side, floor_of, floor_per_s, running

from reelway.platform.cli.terminal import say

CORES: Final = os.cpu_count() or 1
SIDES: Final[dict[str, dict[str, Any]]] = {"naive": {}, "staged": {}, "fused": {"replicas": {"router": CORES}}}
QUEUE: Final = {"max_ongoing_requests": 16, "max_ongoing_sustained": 3}
"""Of one router in the overload. What may stand in its queue is what an accepted request may wait; what comes at once
at half of what it can do is a burst, which may be longer."""
STAGES: Final = ("retrieval", "ranking", "reranking")
ROUNDS: Final = 3
SETTLED_S: Final = 60.0
OPEN_LOOPS: Final = 5
"""Each of other arrivals. One of them alone says what else the machine did meanwhile."""
CAPACITY: Final = 8
"""Connections at which what the service can do is measured."""


@dataclass(frozen=True)
class Seen:
    """One measurement under load."""

    ms: NDArray[np.float64]
    per_s: float
    cpu_ms: float  # of the service, a request
    whole: float = 1.0  # share of the answers


def measure_path(place: Place, seconds: float, sides: Sequence[str] = tuple(SIDES)) -> Iterator[Row]:
    """Floor, naive and ours: latency in turns at concurrency 1, throughput at 1, 8, 32, CPU, memory, hops.

    Each row comes as it is measured, so that what was measured is kept where a later side does not start.
    """
    if "naive" in sides:
        from tests.benchmarks.serving_naive import naive_candidates

        say("writing the candidates' features for the naive side")
        store_candidates(place, naive_candidates(place), time.time(), place.loader().table())
    floor = floor_of(place)
    floors: list[float] = []
    at_eight: dict[str, float] = {}
    for kind in sides:
        say(f"measuring {kind}")
        floors.append(floor_per_s(place, seconds, CORES))  # each time anew, since the machine is not ours alone
        with running(kind, place.path, **SIDES[kind]) as side:
            settle(side, place)
            yield from measure_in_turns(kind, side, place, floor, seconds)
            for connections in (1, CAPACITY, 32):
                seen = measured(side, place, seconds, beyond=connections > CAPACITY, connections=connections)
                yield from load_rows(f"{kind}, concurrency {connections}", seen)
                if connections == CAPACITY:
                    at_eight[kind] = seen.per_s
            yield from (Row(f"{kind}: memory of {name}", mb, "MB") for name, mb in sorted(side.replica_mb().items()))
            if kind != "naive":
                yield from breakdown_rows(kind, side, place, seconds)
            if kind == "fused":
                yield from open_loop_rows(side, place, 2 * seconds, 0.7 * at_eight[kind])
    floors.append(floor_per_s(place, seconds, CORES))
    at_eight["the floor"] = float(np.median(floors))
    yield Row(f"floor, {CORES} processes: throughput, median of {len(floors)}", at_eight["the floor"], "requests/s")
    yield from ratio_rows(at_eight)


def ratio_rows(at_eight: dict[str, float]) -> list[Row]:
    """Throughput at 8 of ours over the others', as far as they were measured."""
    rows = []
    for kind, other, least in (("fused", "naive", 8), ("fused", "the floor", 0.5), ("staged", "naive", None)):
        if kind in at_eight and other in at_eight:
            ratio = at_eight[kind] / at_eight[other]
            bar = ("", None) if least is None else (f">= {least}", ratio >= least)
            rows.append(Row(f"{kind} over {other}, throughput at 8", ratio, "x", *bar))
    return rows


def settle(side: Side, place: Place) -> None:
    """Ask until a second of answers is whole: replicas and their proxy come up one after another."""
    deadline = time.monotonic() + SETTLED_S
    while not run_load(plan(side, place, 1.0, connections=4))["whole"].all():
        if time.monotonic() > deadline:
            raise SystemExit(f"{side.url} gave no second of whole answers within {SETTLED_S:g} s")
    load(side, place, 3.0, connections=4)


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


def load(side: Side, place: Place, seconds: float, *, beyond: bool = False, **how: Any) -> NDArray[np.void]:
    """Whole answers only: a degraded one ends the benchmark, but ``beyond`` what the service can do in time, where
    leaving out a stage that is late is the answer; one without a slate ends it there, too."""
    answers = run_load(plan(side, place, seconds, **how))
    if not (answers["status"] == 200 if beyond else answers["whole"]).all():
        statuses = np.unique(answers["status"], return_counts=True)
        raise SystemExit(f"{(~answers['whole']).sum()} of {len(answers)} answers were not whole; statuses {statuses}")
    return answers


def plan(side: Side, place: Place, seconds: float, **how: Any) -> LoadPlan:
    record = str(place.path / "load.npy")
    return LoadPlan(side.url, record, seconds, viewers=VIEWERS, count=COUNT, time=NOW, **how)


def measured(side: Side, place: Place, seconds: float, *, beyond: bool = False, **how: Any) -> Seen:
    before = side.cpu_s()
    answers = load(side, place, seconds, beyond=beyond, **how)
    took = float(answers["done"].max() - answers["due"].min())
    cpu_ms, whole = 1000 * (side.cpu_s() - before) / len(answers), float(answers["whole"].mean())
    return Seen(latency_ms(answers), len(answers) / took, cpu_ms, whole)


def load_rows(name: str, seen: Seen) -> list[Row]:
    latency = [Row(f"{name}, p{q}", float(np.percentile(seen.ms, q)), "ms") for q in (50, 95, 99)]
    return [
        Row(f"{name}: throughput", seen.per_s, "requests/s"), *latency, Row(f"{name}: CPU", seen.cpu_ms, "ms/request"),
        *([Row(f"{name}: slates with every stage", 100 * seen.whole, "%")] if seen.whole < 1 else []),
    ]  # fmt: skip


def open_loop_rows(side: Side, place: Place, seconds: float, rate: float) -> list[Row]:
    """Poisson arrivals, several times; a latency counts from when the request was due."""
    taken = [latency_ms(load(side, place, seconds, rate=rate, seed=seed)) for seed in range(OPEN_LOOPS)]
    p50, p99 = (np.array([np.percentile(one, q) for one in taken]) for q in (50, 99))
    name, usual = f"fused, open loop at {rate:.0f}/s (70 %), {OPEN_LOOPS} times", float(np.median(p99))
    return [
        Row(f"{name}, p50, median", float(np.median(p50)), "ms"),
        Row(f"{name}, p99, median", usual, "ms", "< 100 ms", usual < 100),
        Row(f"{name}, p99, lowest", float(p99.min()), "ms"),
        Row(f"{name}, p99, highest", float(p99.max()), "ms"),
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
    with running("fused", place.path, **SIDES["fused"]) as side:
        settle(side, place)
        calm = measured(side, place, seconds, connections=CAPACITY)
    with running("fused", place.path, **SIDES["fused"], **QUEUE) as side:
        settle(side, place)
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
