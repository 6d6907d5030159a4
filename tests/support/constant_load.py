"""Constant load on the service from a separate process, which records arm and release of every response.

Open loop: each request is sent at its time, whether or not earlier ones have a response, so that a stalled service
shows in the record. The record is a file of fixed-size rows that can be read while it grows. With ``WATCHED``, outcomes
follow every slate, with the same distribution on every arm.
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
"""Times in Unix seconds. Status 0: no response. ``degraded``: a stage of the release was skipped."""
TIMEOUT_S = 10.0
ONE_REQUEST, MORE_REQUESTS = {"Connection": "close"}, {"Connection": "keep-alive"}
"""Headers that close a connection or keep it open. Connections are kept open from the first slate on.

HAProxy answers one more request on an idle connection with the configuration that was valid when it was opened. A
connection from before the service started would therefore get one late error.
"""
WATCHED = "watched"
"""Fifth argument of the program: send outcomes, too."""
LONG_MS, SHORT_MS, LONG_SHARE = 60_000, 900, 0.7
"""Milliseconds of a long and a short watch for videos of any length, and the share of long watches."""


@contextmanager
def constant_load(url: str, record: Path, *, rate: float, viewers: int) -> Iterator[None]:
    """Sends ``rate`` requests per second until the block is left."""
    command = [sys.executable, "-m", "tests.support.constant_load", url, str(record), str(rate), str(viewers)]
    with child_process(command) as process:
        deadline = time.monotonic() + 30
        while not (record.exists() and record.stat().st_size):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the load on {url} did not start; see the messages of its process")
            time.sleep(0.05)
        yield
        _check_still_running(process)


def _check_still_running(process: subprocess.Popen[bytes]) -> None:
    if (code := process.poll()) is not None:
        raise RuntimeError(f"the load exited with code {code} before the measurement ended; see its messages")


def read_record(record: Path) -> NDArray[np.void]:
    """Returns the rows recorded so far, in order of the responses."""
    raw = record.read_bytes()
    return np.frombuffer(raw[: len(raw) // RECORD.itemsize * RECORD.itemsize], dtype=RECORD)


async def _run(url: str, record: Path, rate: float, viewers: int, *, watched: bool) -> None:
    chance = random.Random(1)
    limits = httpx.Limits(max_connections=200, max_keepalive_connections=50)
    in_flight: set[asyncio.Task[None]] = set()
    with record.open("ab", buffering=0) as sink:
        async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits, headers=ONE_REQUEST) as client:
            began, count = time.monotonic(), 0
            while True:
                count += 1
                await asyncio.sleep(max(0.0, began + count / rate - time.monotonic()))
                task = asyncio.create_task(
                    _send_request(client, chance.randrange(viewers), sink, chance if watched else None)
                )
                in_flight.add(task)
                task.add_done_callback(in_flight.discard)


async def _send_request(client: httpx.AsyncClient, viewer: int, sink: object, chance: random.Random | None) -> None:
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
        await _send_outcomes(client, [video["token"] for video in body["videos"]], chance)


async def _send_outcomes(client: httpx.AsyncClient, tokens: list[str], chance: random.Random) -> None:
    """Sends a watch of each video. Lost outcomes are ignored, because the record is about slates."""
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
