"""Constant load on the service from a process of its own: every request, its answer's arm and release, on record.

Open loop: requests leave at their times whether or not earlier ones have been answered, so that a service that stops
for a second is seen to have stopped. The record is a file of fixed-size rows that anybody may read while it grows.
Where viewers are to watch (``WATCHED``), every slate is followed by what became of its videos, the same on every arm.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
from numpy.typing import NDArray

from reelway.platform.cli.processes import child_process

RECORD = np.dtype(
    [
        ("sent", "f8"), ("done", "f8"), ("viewer", "i8"), ("status", "i2"), ("degraded", "?"), ("arm", "S8"),
        ("release", "S12"),
    ]
)  # fmt: skip
"""Unix seconds; status 0 where no answer came; ``degraded`` where a stage of the release was left out."""
TIMEOUT_S = 10.0
ONE_REQUEST, MORE_REQUESTS = {"Connection": "close"}, {"Connection": "keep-alive"}
"""Of a connection, which is kept from the first slate on. HAProxy answers one more request on an idle connection by the
configuration that it was opened under: one from before there was a service would be told so later, once.
"""
WATCHED = "watched"
"""Sixth word of the command where outcomes are to be sent."""
LONG_MS, SHORT_MS, LONG_SHARE = 60_000, 900, 0.7
"""What is watched of a video: long by any duration, or short by any; and how often the former."""


@contextmanager
def constant_load(url: str, record: Path, *, rate: float, viewers: int) -> Iterator[None]:
    """``rate`` requests a second, from now until the block is left."""
    command = [sys.executable, "-m", "tests.support.constant_load", url, str(record), str(rate), str(viewers)]
    with child_process(command) as process:
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


async def _run(url: str, record: Path, rate: float, viewers: int, *, watched: bool) -> None:
    chance = random.Random(1)
    limits = httpx.Limits(max_connections=200, max_keepalive_connections=50)
    under_way: set[asyncio.Task[None]] = set()
    with record.open("ab", buffering=0) as sink:
        async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits, headers=ONE_REQUEST) as client:
            began, count = time.monotonic(), 0
            while True:
                count += 1
                await asyncio.sleep(max(0.0, began + count / rate - time.monotonic()))
                task = asyncio.create_task(_ask(client, chance.randrange(viewers), sink, chance if watched else None))
                under_way.add(task)
                task.add_done_callback(under_way.discard)


async def _ask(client: httpx.AsyncClient, viewer: int, sink: object, chance: random.Random | None) -> None:
    row = np.zeros(1, dtype=RECORD)
    row["sent"], row["viewer"] = time.time(), viewer
    try:
        answer = await client.post("/v1/recommend", json={"viewer_id": viewer, "count": 5})
        row["status"] = answer.status_code
        if answer.is_success:
            client.headers.update(MORE_REQUESTS)
            body = answer.json()
            row["degraded"] = bool(set(body["degraded"]) - {"no_viewer_row"})
            row["arm"], row["release"] = body["arm"].encode(), body["release"][:12].encode()
    except httpx.HTTPError:
        row["status"] = 0
    row["done"] = time.time()
    sink.write(row.tobytes())  # type: ignore[attr-defined]
    if chance is not None and row["status"][0] == httpx.codes.OK and body["videos"]:
        await _report(client, [video["token"] for video in body["videos"]], chance)


async def _report(client: httpx.AsyncClient, tokens: list[str], chance: random.Random) -> None:
    """A watch of each video. What is lost is lost: the record is of slates."""
    watches = [
        {"token": token, "type": "watch", "value": LONG_MS if chance.random() < LONG_SHARE else SHORT_MS}
        for token in tokens
    ]
    with suppress(httpx.HTTPError):
        await client.post("/v1/outcomes", json={"outcomes": watches})


if __name__ == "__main__":
    try:
        url, record, rate, viewers, *more = sys.argv[1:]
        asyncio.run(_run(url, Path(record), float(rate), int(viewers), watched=more == [WATCHED]))
    except KeyboardInterrupt:
        sys.exit(0)
