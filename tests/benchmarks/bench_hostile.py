"""Measures what hostile requests and slow clients cost honest viewers: ``python -m tests.benchmarks.bench_hostile``.

One service on Ray Serve, behind its HTTP proxy, gets half of its capacity from honest viewers, alone and beside

- malformed and hostile requests of every kind, each many times, at a fixed rate;
- clients that send one byte a second on many connections.

Load generator, attackers and service share the cores; the attackers run in a process of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tests.benchmarks.serving_fixture import ServingFixture, make_serving_fixture, online_store
from tests.benchmarks.serving_load import latency_ms, run_load
from tests.benchmarks.serving_path import CAPACITY, measured, plan, settle
from tests.benchmarks.serving_variants import Variant, running
from tests.support.bench_results import Row, write_report
from tests.support.hostile_requests import MALFORMED, NOT_ANSWERED, REQUESTS, Endpoint, HostileRequest, send
from tests.support.serving.hostile_serving_requests import LIKE, OUTCOME, RECOMMEND, VIEWER, check_error

from reelway.platform.cli.terminal import print_status
from reelway.serving.http_api import OUTCOMES as OUTCOMES_PATH
from reelway.serving.http_api import RECOMMEND as RECOMMEND_PATH
from reelway.serving.serve_settings import SLOW_REQUEST_S

ROUNDS: Final = 4
ATTACKERS: Final = 64
"""Threads of the attacker; bodies that stall keep theirs for seconds."""
LATE_S: Final = SLOW_REQUEST_S + 1.0
P99_BAR: Final = 1.2
MEMORY_BAR: Final = 1.05


def main() -> None:
    options = _options()
    if options.attack:
        print(json.dumps(attack(options.attack, options.times, options.hostile_rate)))
        return
    if options.dawdle:
        asyncio.run(dawdle(options.dawdle, options.slow_clients))
        return
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="bench-hostile-") as name:
        fixture = make_serving_fixture(Path(name), options.videos)
        with online_store(fixture) as address:
            os.environ["REELWAY_ONLINE_STORE"] = address
            with running("fused", fixture.path) as service:
                settle(service, fixture)
                rate = 0.5 * measured(service, fixture, options.seconds, connections=CAPACITY).per_s
                rows += measure_hostile(service, fixture, rate, options)
                rows += measure_slow_clients(service, fixture, rate, options.seconds, options.slow_clients)
    write_report("hostile", rows)


def measure_hostile(service: Variant, fixture: ServingFixture, rate: float, options: argparse.Namespace) -> list[Row]:
    """Measures honest requests alone and beside all kinds of hostile requests, in turns."""
    alone: list[NDArray[np.void]] = []
    beside: list[NDArray[np.void]] = []
    wrong: Counter[str] = Counter()
    seconds = options.seconds
    sent, before = 0, sum(service.replica_mb().values())
    for turn in range(ROUNDS):
        print_status(f"hostile requests, turn {turn + 1} of {ROUNDS}")
        alone.append(run_load(plan(service, fixture, seconds, rate=rate, seed=turn)))
        command = [sys.executable, "-m", "tests.benchmarks.bench_hostile", "--attack", service.url]
        command += ["--times", str(options.times // ROUNDS), "--hostile-rate", str(options.hostile_rate)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as attacker:
            answers = run_load(plan(service, fixture, seconds, rate=rate, seed=100 + turn))
            while attacker.poll() is None:  # honest requests go on until the attack ends
                answers = np.concatenate([answers, run_load(plan(service, fixture, 2.0, rate=rate, seed=turn))])
            assert attacker.stdout is not None
            found = json.loads(attacker.stdout.read())
        beside.append(answers)
        sent += found["sent"]
        wrong.update(found["wrong"])
    for kind, count in wrong.most_common(20):
        print_status(f"{count} x {kind}")
    grown = sum(service.replica_mb().values()) / before
    kinds = len(_attacks(service.url))
    rejected = wrong.total()
    return [
        Row(f"{kinds} kinds of hostile requests at {options.hostile_rate:.0f}/s: sent", sent, ""),
        Row("answers outside the documented shapes", rejected, "", "0", rejected == 0),
        *_latency_rows("hostile requests", rate, alone, beside),
        Row("memory of the replicas after over before", grown, "x", f"<= {MEMORY_BAR}", grown <= MEMORY_BAR),
    ]


def measure_slow_clients(
    service: Variant, fixture: ServingFixture, rate: float, seconds: float, clients: int
) -> list[Row]:
    """Measures honest requests alone and beside connections that send one byte a second, in turns."""
    alone, beside = [], []
    for turn in range(ROUNDS):
        print_status(f"slow clients, turn {turn + 1} of {ROUNDS}")
        alone.append(run_load(plan(service, fixture, seconds, rate=rate, seed=turn)))
        with _dawdling(service.url, clients):
            beside.append(run_load(plan(service, fixture, seconds, rate=rate, seed=100 + turn)))
    return _latency_rows(f"{clients} clients that send a byte a second", rate, alone, beside)


def attack(url: str, times: int, rate: float) -> dict[str, object]:
    """Sends each hostile request ``times`` times, at ``rate`` requests per second.

    Returns how many were sent, and the wrong answers by description.
    """
    attacks = _attacks(url) * times
    began_s = time.monotonic()

    def send_when_due(index: int) -> str | None:
        time.sleep(max(0.0, began_s + index / rate - time.monotonic()))
        return _problem(*attacks[index])

    with ThreadPoolExecutor(ATTACKERS) as pool:
        wrong = Counter(filter(None, pool.map(send_when_due, range(len(attacks)))))
    return {"sent": len(attacks), "wrong": wrong}


async def dawdle(url: str, clients: int) -> None:
    """Keeps so many connections open that each send one byte a second, until standard input ends."""
    host, _, port = url.removeprefix("http://").partition(":")
    data = f"POST {RECOMMEND_PATH} HTTP/1.1\r\nHost: a\r\nContent-Length: 9000\r\n\r\n".encode()

    async def one() -> None:
        while True:
            with suppress(OSError):
                _, writer = await asyncio.open_connection(host, int(port))
                for byte in data + b" " * 9_000:
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(1)

    tasks = [asyncio.create_task(one()) for _ in range(clients)]
    await asyncio.to_thread(sys.stdin.read)
    for task in tasks:
        task.cancel()


@contextmanager
def _dawdling(url: str, clients: int) -> Iterator[None]:
    command = [sys.executable, "-m", "tests.benchmarks.bench_hostile", "--dawdle", url, "--slow-clients", str(clients)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        try:
            yield
        finally:
            assert process.stdin is not None
            process.stdin.close()


def _attacks(url: str) -> list[tuple[Endpoint, HostileRequest]]:
    port = int(url.rpartition(":")[2])
    recommend = Endpoint(port, RECOMMEND_PATH, VIEWER, 422, lambda: 0, check_error)
    outcomes = Endpoint(port, OUTCOMES_PATH, LIKE, 422, lambda: 0, check_error)
    return [
        *((recommend, _behind_proxy(request)) for request in [*REQUESTS, *RECOMMEND]),
        *((outcomes, _behind_proxy(request)) for request in [*REQUESTS, *OUTCOME]),
    ]


def _behind_proxy(request: HostileRequest) -> HostileRequest:
    """Returns the request as HAProxy answers it, which waits for a body of any declared length until its own limit."""
    if request.pause_s:
        return replace(request, pause_s=LATE_S)
    declares_more = request.status == 413 and request.headers.get("Content-Length") is not None
    return replace(request, status=408) if declares_more else request


def _problem(endpoint: Endpoint, request: HostileRequest) -> str | None:
    """Sends a request and returns a description of an answer outside the documented shapes, or None."""
    try:
        status, body = send(endpoint, request)
    except OSError as error:
        return f"{endpoint.path}, {request.name}: {error!r}"
    expected = endpoint.malformed if request.status == MALFORMED else request.status
    try:
        if not (request.by_server or status == NOT_ANSWERED):
            endpoint.check_body(body)
    except (AssertionError, ValueError):
        return f"{endpoint.path}, {request.name}: {status} with body {body[:80]!r}"
    return None if status == expected else f"{endpoint.path}, {request.name}: {status}, expected {expected}"


def _latency_rows(
    what: str, rate: float, alone: Sequence[NDArray[np.void]], beside: Sequence[NDArray[np.void]]
) -> list[Row]:
    before, after = np.concatenate(alone), np.concatenate(beside)
    failed = int((after["status"] != 200).sum())
    p99_alone, p99 = (float(np.percentile(latency_ms(answers), 99)) for answers in (before, after))
    p50_alone, p50 = (float(np.percentile(latency_ms(answers), 50)) for answers in (before, after))
    return [
        Row(f"honest requests at {rate:.0f}/s (50 %) beside {what}: not answered with a slate", failed, ""),
        Row(f"honest p50 beside {what}, over alone", p50 / p50_alone, "x"),
        Row(f"honest p99 alone, {ROUNDS} turns", p99_alone, "ms"),
        Row(f"honest p99 beside {what}", p99, "ms"),
        Row("that p99 over alone", p99 / p99_alone, "x", f"<= {P99_BAR}", p99 <= P99_BAR * p99_alone),
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=20_000, help="size of the catalogue")
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of one load")
    parser.add_argument("--times", type=int, default=200, help="how often each kind is sent, over all turns")
    parser.add_argument("--hostile-rate", type=float, default=100.0, help="hostile requests per second")
    parser.add_argument("--slow-clients", type=int, default=300, help="connections that send a byte a second")
    parser.add_argument("--attack", metavar="URL", help=argparse.SUPPRESS)
    parser.add_argument("--dawdle", metavar="URL", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
