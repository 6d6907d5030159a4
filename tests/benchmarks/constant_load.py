"""Constant load on the service from a process of its own: every request, its answer's arm and release, on record.

Open loop: requests leave at their times whether or not earlier ones have been answered, so that a service that stops
for a second is seen to have stopped. The record is a file of fixed-size rows that anybody may read while it grows.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
from numpy.typing import NDArray

from reelway.platform.cli.processes import child

RECORD = np.dtype(
    [
        ("sent", "f8"), ("done", "f8"), ("viewer", "i8"), ("status", "i2"), ("degraded", "?"), ("arm", "S8"),
        ("release", "S12"),
    ]
)  # fmt: skip
"""Unix seconds; status 0 where no answer came; ``degraded`` where a stage of the release was left out."""
TIMEOUT_S = 10.0


@contextmanager
def constant_load(url: str, record: Path, *, rate: float, viewers: int) -> Iterator[None]:
    """``rate`` requests a second, from now until the block is left."""
    command = [sys.executable, "-m", "tests.benchmarks.constant_load", url, str(record), str(rate), str(viewers)]
    with child(command) as process:
        deadline = time.monotonic() + 30
        while not (record.exists() and record.stat().st_size):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the load on {url} did not start")
            time.sleep(0.05)
        yield
        _refuse_an_early_end(process)


def _refuse_an_early_end(process: subprocess.Popen[bytes]) -> None:
    if (code := process.poll()) is not None:
        raise RuntimeError(f"the load ended with code {code} before the measurement did")


def read_record(record: Path) -> NDArray[np.void]:
    """What is on record by now, in order of the answers."""
    raw = record.read_bytes()
    return np.frombuffer(raw[: len(raw) // RECORD.itemsize * RECORD.itemsize], dtype=RECORD)


async def _run(url: str, record: Path, rate: float, viewers: int) -> None:
    chance = random.Random(1)
    limits = httpx.Limits(max_connections=200, max_keepalive_connections=50)
    under_way: set[asyncio.Task[None]] = set()
    with record.open("ab", buffering=0) as sink:
        async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits) as client:
            began, count = time.monotonic(), 0
            while True:
                count += 1
                await asyncio.sleep(max(0.0, began + count / rate - time.monotonic()))
                task = asyncio.create_task(_ask(client, chance.randrange(viewers), sink))
                under_way.add(task)
                task.add_done_callback(under_way.discard)


async def _ask(client: httpx.AsyncClient, viewer: int, sink: object) -> None:
    row = np.zeros(1, dtype=RECORD)
    row["sent"], row["viewer"] = time.time(), viewer
    try:
        answer = await client.post("/v1/recommend", json={"viewer_id": viewer, "count": 5})
        row["status"] = answer.status_code
        if answer.is_success:
            body = answer.json()
            row["degraded"] = bool(set(body["degraded"]) - {"no_viewer_row"})
            row["arm"], row["release"] = body["arm"].encode(), body["release"][:12].encode()
    except httpx.HTTPError:
        row["status"] = 0
    row["done"] = time.time()
    sink.write(row.tobytes())  # type: ignore[attr-defined]


if __name__ == "__main__":
    try:
        asyncio.run(_run(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])))
    except KeyboardInterrupt:
        sys.exit(0)
