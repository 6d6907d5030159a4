"""Slates of a replica with everything live: repeats, what it costs, and what updates of the catalogue cost."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from datetime import UTC, datetime
from typing import Final

import numpy as np
from prometheus_client import CollectorRegistry
from tests.benchmarks.live_latency import FIRST_UPLOAD, Watching
from tests.benchmarks.live_service import LiveService, ObservedRouter, own_core, settle, until
from tests.benchmarks.serving_fixture import SECRET, VIEWERS
from tests.support.bench_results import Row
from tests.support.serving.uploads import upload

from reelway.platform.contracts.api import OutcomesRequest, RecommendRequest, ReportedOutcome
from reelway.platform.contracts.events import OutcomeType
from reelway.platform.rollout.traffic.serving_options import BudgetsMs
from reelway.platform.tokens import TokenSigner
from reelway.serving.fused import open_fused
from reelway.serving.release_loader import ReleaseLoader
from reelway.serving.release_pool import OpenRelease
from reelway.serving.router import Router, RouterDependencies
from reelway.serving.video_table import VideoTable

PAGES, PAGE = 20, 10
SLATE: Final = 20
PAUSE_S: Final = 0.03
"""Pause after a slate; the router writes what it remembers within ``shown_memory.WRITE_DELAY_S``."""
UPLOADS: Final = 1_000
"""Uploads in the overlay while its cost is measured."""


async def measure_repeats(service: LiveService, viewers: int) -> list[Row]:
    """Counts videos that a viewer gets twice in 20 pages, the first two of each page watched, stream on and off."""
    rows = []
    for streams, first in ((True, 10**6), (False, 2 * 10**6)):
        with service.stream() if streams else nullcontext():
            async with service.replica() as router:
                if streams:
                    await _stream_started(service, router)
                repeated, missing = await _repeats(router, range(first, first + viewers))
        name = f"{PAGES} pages of {PAGE} for {viewers} viewers, stream {'on' if streams else 'off'}"
        rows += [
            Row(f"{name}: repeats", repeated, "", "0", repeated == 0),
            Row(f"{name}: videos missing in slates", missing, "", "0", missing == 0),
        ]
    return rows


async def _stream_started(service: LiveService, router: ObservedRouter) -> None:
    """Returns when a viewer's row is in the store."""
    viewer = 10**6 - 1
    await _page(router, viewer)
    with service.viewer_rows() as rows:
        await until("the stream's first row", lambda: bool(rows.read(viewer)["history_videos"]), timeout_s=120)


async def _repeats(router: ObservedRouter, viewers: range) -> tuple[int, int]:
    seen: dict[int, Counter[int]] = {viewer: Counter() for viewer in viewers}
    for _ in range(PAGES):
        for start in range(0, len(viewers), 4):
            group = viewers[start : start + 4]
            for viewer, videos in zip(group, await asyncio.gather(*(_page(router, v) for v in group)), strict=True):
                seen[viewer].update(videos)
    shown = sum(counts.total() for counts in seen.values())
    return shown - sum(len(counts) for counts in seen.values()), len(viewers) * PAGES * PAGE - shown


async def _page(router: ObservedRouter, viewer: int) -> list[int]:
    """Requests a page and watches its first two videos."""
    answer = await router.recommend(RecommendRequest(viewer_id=viewer, count=PAGE))
    if answer.background:
        await answer.background()
    watched = [
        ReportedOutcome(token=video.token, type=OutcomeType.WATCH, value=30_000) for video in answer.response.videos[:2]
    ]
    await router.report_outcomes(OutcomesRequest(outcomes=watched))
    return [video.video_id for video in answer.response.videos]


async def measure_added(service: LiveService, slates: int) -> list[Row]:
    """Measures slates with memory, overlay and lists against slates without, in turns in this process.

    Slates follow each other after a pause, in which what the slate before left to write is written. The throughput of
    both, beside it, includes these writes and the exposure log.
    """
    off_ms: list[float] = []
    on_ms: list[float] = []
    with service.overlay_writer(), Watching(service.events) as watching:
        async with service.replica() as on, frozen_replica(service) as off:
            await _fill_overlay(service, on, watching)
            for turn in range(-2, slates // 10):
                for router, taken in ((off, off_ms), (on, on_ms)) if turn % 2 else ((on, on_ms), (off, off_ms)):
                    times = [await _slate_ms(router, (10 * turn + i) % VIEWERS) for i in range(10)]
                    taken += times if turn >= 0 else []
            off_per_s, on_per_s = [await _closed_loop_per_s(router, 5.0) for router in (off, on)]
    on_p50, off_p50 = float(np.median(on_ms)), float(np.median(off_ms))
    name = f"slate of {SLATE}, {len(on_ms)} each in turns with pauses"
    return [
        Row(f"{name}: nothing live, p50", off_p50, "ms"),
        Row(f"{name}: memory, {UPLOADS:,} uploads and lists, p50", on_p50, "ms"),
        Row("added to a slate's p50", on_p50 - off_p50, "ms", "<= 0.5", on_p50 - off_p50 <= 0.5),
        Row("slates per second, everything live over nothing live", on_per_s / off_per_s, "x"),
        Row("added to a slate's p99", float(np.percentile(on_ms, 99) - np.percentile(off_ms, 99)), "ms"),
    ]


@asynccontextmanager
async def frozen_replica(service: LiveService) -> AsyncIterator[Router]:
    """Runs a router whose release stays as it was built and that remembers nothing; it reads viewers' rows."""

    async def open_release(_: str) -> OpenRelease:
        return await asyncio.to_thread(open_fused, ReleaseLoader(service.fixture.release_folder), BudgetsMs().path)

    with service.viewer_rows() as rows:
        router = Router(
            open_release, RouterDependencies(TokenSigner(SECRET), CollectorRegistry(), read_viewer=rows.read_viewer)
        )
        await router.reconfigure(service.routing().model_dump(mode="json"))
        await settle(router)
        yield router


async def _fill_overlay(service: LiveService, router: ObservedRouter, watching: Watching) -> None:
    release = router.opened.router_release
    before = release.table.uploads.rows
    changes = [upload(2 * FIRST_UPLOAD + number, uploaded_at=datetime.now(UTC)) for number in range(UPLOADS)]
    with service.publisher() as publisher:
        await asyncio.to_thread(publisher.publish, changes)
    await asyncio.to_thread(watching.append, [int(video) for video in release.table.video_id[np.arange(300)]], 3_000)
    await until("the overlay", lambda: release.table.uploads.rows >= before + UPLOADS)
    await until("the lists", lambda: release.lists.age_s() is not None)


async def _slate_ms(router: Router, viewer: int) -> float:
    start = time.perf_counter()
    answer = await router.recommend(RecommendRequest(viewer_id=viewer, count=SLATE))
    taken = 1000 * (time.perf_counter() - start)
    if answer.background:
        await answer.background()
    await asyncio.sleep(PAUSE_S)
    if answer.response.degraded:
        raise SystemExit(f"slate of viewer {viewer}: {answer.response.degraded}; its time would mean nothing")
    return taken


async def measure_updates(service: LiveService, rate: int, seconds: float) -> list[Row]:
    """Measures slates at half of the replica's throughput with and without updates of the catalogue.

    The replica has a core of its own. Publisher, overlay writer, broker and Redis share the others.
    """
    with service.overlay_writer():
        async with service.replica() as router:
            table = router.opened.router_release.table
            with _publisher(service, rate, seconds) as publisher, own_core():
                await _closed_loop_per_s(router, 2.0)
                capacity = await _closed_loop_per_s(router, 5.0)
                calm_ms = await _open_loop_ms(router, 0.5 * capacity, seconds)
                with _counting(table) as samples:
                    assert publisher.stdin
                    assert publisher.stdout
                    publisher.stdin.write("go\n")
                    publisher.stdin.flush()
                    busy_ms = await _open_loop_ms(router, 0.5 * capacity, seconds)
                    published = float(await asyncio.to_thread(publisher.stdout.readline))
                    await asyncio.sleep(2)
    taken_in = updates_per_s(samples)
    calm, busy = (float(np.percentile(taken, 99)) for taken in (calm_ms, busy_ms))
    name = f"slates at {0.5 * capacity:.0f}/s (50 %), the replica on a core of its own"
    return [
        Row(f"catalogue updates published in {seconds:g} s", published, "1/s"),
        Row("catalogue updates taken in by the replica", taken_in, "1/s", ">= 5,000", taken_in >= 5_000),
        Row(f"{name}: without updates, p99 of {len(calm_ms)}", calm, "ms"),
        Row(f"{name}: with updates, p99 of {len(busy_ms)}", busy, "ms"),
        Row("p99 with updates over p99 without", busy / calm, "x", "<= 1.2", busy / calm <= 1.2),
        Row("p50 with updates over p50 without", float(np.median(busy_ms) / np.median(calm_ms)), "x"),
    ]


@contextmanager
def _publisher(service: LiveService, rate: int, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """Starts the publisher's process and waits until it can begin."""
    command = [sys.executable, "-m", "tests.benchmarks.live_publisher"]
    arguments = [service.events, str(3 * FIRST_UPLOAD), str(rate), str(seconds)]
    with subprocess.Popen([*command, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            if process.stdout.readline() != "ready\n":
                raise SystemExit("the publisher did not start")
            yield process
        finally:
            process.terminate()


@contextmanager
def _counting(table: VideoTable) -> Iterator[list[tuple[float, int]]]:
    """Counts the rows of the overlay ten times a second, on a thread."""
    samples, stop = [(time.monotonic(), table.uploads.rows)], threading.Event()

    def count() -> None:
        while not stop.wait(0.1):
            samples.append((time.monotonic(), table.uploads.rows))

    thread = threading.Thread(target=count)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def updates_per_s(samples: list[tuple[float, int]]) -> float:
    """Returns the slope between the first and the last sample at which rows had been added."""
    grown = [after for before, after in itertools.pairwise(samples) if after[1] > before[1]]
    if len(grown) < 2:
        return 0.0
    return (grown[-1][1] - grown[0][1]) / (grown[-1][0] - grown[0][0])


async def _closed_loop_per_s(router: Router, seconds: float, connections: int = 8) -> float:
    end, answered = time.monotonic() + seconds, [0]

    async def client() -> None:
        while time.monotonic() < end:
            answer = await router.recommend(RecommendRequest(viewer_id=answered[0] % VIEWERS, count=SLATE))
            if answer.background:
                await answer.background()
            answered[0] += 1

    await asyncio.gather(*(client() for _ in range(connections)))
    return answered[0] / seconds


async def _open_loop_ms(router: Router, per_s: float, seconds: float) -> list[float]:
    """Requests slates with Poisson arrivals; a latency counts from the time at which the request was due."""
    due = np.cumsum(np.random.default_rng(0).exponential(1 / per_s, int(per_s * seconds)))
    start, taken, running = time.perf_counter(), [], []

    async def request(viewer: int, due_s: float) -> None:
        answer = await router.recommend(RecommendRequest(viewer_id=viewer, count=SLATE))
        taken.append(1000 * (time.perf_counter() - start - due_s))
        if answer.background:
            await answer.background()

    for number, due_s in enumerate(due.tolist()):
        await asyncio.sleep(max(start + due_s - time.perf_counter(), 0))
        running.append(asyncio.create_task(request(number % VIEWERS, due_s)))
    await asyncio.gather(*running)
    return taken
