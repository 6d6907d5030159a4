"""Load generator for the service, in a separate process that uses little CPU.

Usage: python -m tests.benchmarks.serving_load '{"url": ..., "record": ..., ...}' (``LoadPlan`` as JSON)

- Closed loop (``rate`` 0): each connection sends its next request after a response. This measures the capacity.
- Open loop: requests are sent at random times (Poisson), independent of earlier responses. A latency counts from the
  time at which the request was due, so a service that stalls for a second shows that second in its latencies.

The client implements only the part of HTTP/1.1 that this service uses. httpx takes ten times the CPU, which would slow
the service down on two cores.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

ANSWER: Final = np.dtype([("due", "f8"), ("done", "f8"), ("status", "i2"), ("whole", "?")])
"""Times in monotonic seconds; status 0 without a response; ``whole``: status 200 and not degraded."""
TIMEOUT_S: Final = 30.0


@dataclass(frozen=True)
class LoadPlan:
    """The load to generate. ``rate`` is in requests per second; 0: a closed loop with ``connections``."""

    url: str
    record: str
    seconds: float
    connections: int = 1
    rate: float = 0.0
    viewers: int = 200
    count: int = 20
    time: str | None = None  # time in the requests' context, ISO 8601
    seed: int = 0
    proofs: str = ""  # file with the Authorization header of each viewer, a JSON list


def run_load(plan: LoadPlan) -> NDArray[np.void]:
    """Generates the load in a separate process and returns the recorded responses."""
    subprocess.run([sys.executable, "-m", "tests.benchmarks.serving_load", json.dumps(asdict(plan))], check=True)
    answers: NDArray[np.void] = np.load(plan.record)
    return answers


def latency_ms(answers: NDArray[np.void]) -> NDArray[np.float64]:
    """Returns the milliseconds from the time a request was due to its response."""
    taken: NDArray[np.float64] = 1000 * (answers["done"] - answers["due"])
    return taken


class _Connection(asyncio.Protocol):
    """An HTTP connection with one request at a time. A future receives status and body of the response."""

    def __init__(self) -> None:
        self._received = b""
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def ask(self, request: bytes) -> asyncio.Future[tuple[int, bytes]]:
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)  # type: ignore[attr-defined]
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        if not separator:
            return
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        if len(body) >= length and self._answer and not self._answer.done():
            self._received = b""
            self._answer.set_result((int(head[9:12]), body))

    def connection_lost(self, _: Exception | None) -> None:
        if self._answer and not self._answer.done():
            self._answer.set_result((0, b""))

    def close(self) -> None:
        self._transport.close()


class _LoadClient:
    """Sends requests over a pool of connections and records the responses."""

    def __init__(self, plan: LoadPlan) -> None:
        address = plan.url.removeprefix("http://")
        self._host, _, port = address.partition(":")
        self._port = int(port)
        self._free: list[_Connection] = []
        proofs = json.loads(Path(plan.proofs).read_text()) if plan.proofs else [""] * plan.viewers
        self._requests = [_request(address, viewer, plan, proofs[viewer]) for viewer in range(plan.viewers)]
        self._chance = random.Random(plan.seed)
        self.answers: list[tuple[float, float, int, bool]] = []

    async def ask(self, due: float) -> None:
        status, body = 0, b""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                connection = self._free.pop() if self._free else await self._connect()
                status, body = await connection.ask(self._chance.choice(self._requests))
            if status:
                self._free.append(connection)
        except (OSError, TimeoutError):
            status = 0
        whole = status == 200 and b'"degraded":[]' in body
        self.answers.append((due, time.monotonic(), status, whole))

    async def _connect(self) -> _Connection:
        _, connection = await asyncio.get_running_loop().create_connection(_Connection, self._host, self._port)
        return connection

    def close(self) -> None:
        for connection in self._free:
            connection.close()


def _request(address: str, viewer: int, plan: LoadPlan, proof: str) -> bytes:
    context = {"time": plan.time} if plan.time else {}
    body = json.dumps({"viewer_id": viewer, "count": plan.count, "context": context}).encode()
    head = f"POST /v1/recommend HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
    head += f"Authorization: {proof}\r\n" if proof else ""
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def _closed(asker: _LoadClient, plan: LoadPlan, end: float) -> None:
    async def one() -> None:
        while (now := time.monotonic()) < end:
            await asker.ask(now)

    await asyncio.gather(*(one() for _ in range(plan.connections)))


async def _open(asker: _LoadClient, plan: LoadPlan, end: float) -> None:
    chance, due, tasks = random.Random(plan.seed + 1), time.monotonic(), []
    while True:
        due += chance.expovariate(plan.rate)
        if due >= end:
            break
        if (wait := due - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(asker.ask(due)))
    await asyncio.gather(*tasks)


async def _main(plan: LoadPlan) -> None:
    asker = _LoadClient(plan)
    end = time.monotonic() + plan.seconds
    await (_open if plan.rate else _closed)(asker, plan, end)
    asker.close()
    with Path(plan.record).open("wb") as sink:
        np.save(sink, np.array(asker.answers, dtype=ANSWER))


if __name__ == "__main__":
    asyncio.run(_main(LoadPlan(**json.loads(sys.argv[1]))))
