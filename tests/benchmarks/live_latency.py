"""Times from what happens to the slate that shows it: outcomes, uploads, takedowns and trends."""

from __future__ import annotations

import asyncio
import itertools
import time
from contextlib import ExitStack, closing
from datetime import UTC, datetime

import numpy as np
from tests.benchmarks.live_service import LiveService, ObservedRouter, until
from tests.support.bench_results import Row
from tests.support.pipelines.list_events import ListEvent, exposure_rows, outcome_rows
from tests.support.serving.takedowns import takedown
from tests.support.serving.uploads import upload

from reelway.platform.contracts.api import OutcomesRequest, RecommendRequest, ReportedOutcome, RequestContext
from reelway.platform.contracts.events import OutcomeType
from reelway.platform.contracts.ids import MAX_ID
from reelway.platform.eventlog.exposure_events import encode_exposures
from reelway.platform.eventlog.live_lists_file import TRENDING
from reelway.platform.eventlog.outcome_events import encode_outcomes
from reelway.platform.eventlog.topics import Topic, open_topic
from reelway.platform.features.viewer_rows import ViewerRowReader
from reelway.serving.video_table import ABSENT
from reelway.serving.viewer_query import viewer_query

FIRST_VIEWER = 100_000
"""Viewers that have no row at the beginning; a stream's row is as of the data set's time and would not replace one."""
FIRST_UPLOAD = 10**9
CLIENTS = 4


def p99(values: list[float]) -> float:
    return float(np.percentile(values, 99))


def quantile_rows(name: str, values: list[float], bar_s: float) -> list[Row]:
    """Returns the rows of p50, p99 and the maximum; the bar is that of p99."""
    tail = p99(values)
    return [
        Row(f"{name}, p50 of {len(values)}", float(np.median(values)), "s"),
        Row(f"{name}, p99", tail, "s", f"<= {bar_s:g}", tail <= bar_s),
        Row(f"{name}, slowest", max(values), "s"),
    ]


async def measure_outcomes(service: LiveService, outcomes: int) -> list[Row]:
    """Measures from the acknowledgement of an outcome to the viewer's next slate computed from a row with it."""
    with service.stream(), service.viewer_rows() as rows:
        async with service.replica() as router:
            viewers = itertools.count(FIRST_VIEWER)
            await _outcome_s(router, rows, next(viewers), timeout_s=120)  # the stream has started
            taken: list[float] = []

            async def client() -> None:
                while len(taken) < outcomes:
                    taken.append(await _outcome_s(router, rows, next(viewers)))

            await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return quantile_rows(f"outcome to changed slate, {CLIENTS} viewers at once", taken, 2.0)


async def _outcome_s(router: ObservedRouter, rows: ViewerRowReader, viewer: int, timeout_s: float = 30.0) -> float:
    answer = await router.recommend(RecommendRequest(viewer_id=viewer, count=10))
    if answer.background:
        await answer.background()
    video = answer.response.videos[0]
    watch = ReportedOutcome(token=video.token, type=OutcomeType.WATCH, value=30_000)
    response = await router.report_outcomes(OutcomesRequest(outcomes=[watch]))
    acknowledged = time.monotonic()
    if response.accepted != 1:
        raise SystemExit(f"outcome of viewer {viewer} was refused: {response.refused}")
    what = f"row of viewer {viewer} with video {video.video_id}"
    await until(what, lambda: video.video_id in (rows.read(viewer)["history_videos"] or ()), timeout_s)
    await router.recommend(RecommendRequest(viewer_id=viewer, count=10))
    return time.monotonic() - acknowledged


async def measure_uploads(service: LiveService, uploads: int) -> list[Row]:
    """Measures uploads until they are candidates, takedowns until their last slate, and a replica that starts."""
    added, taken_down = [], []
    with service.overlay_writer(), service.publisher() as publisher:
        async with service.replica() as router:
            ids = list(range(FIRST_UPLOAD, FIRST_UPLOAD + uploads + 1))
            for video in ids:
                change = upload(video, uploaded_at=datetime.now(UTC))
                await asyncio.to_thread(publisher.publish, [change])
                published = time.monotonic()
                await _until_candidate(router, video, 60 if video == ids[0] else 20)
                added.append(time.monotonic() - published)
            for number in range(uploads):
                video = ids[1 + number] if number % 2 else (await _slate(router, FIRST_VIEWER + number))[0]
                await asyncio.to_thread(publisher.publish, takedown(videos=[video]))
                taken_down.append(await _last_slate_s(router, video, time.monotonic()))
        removed = await asyncio.to_thread(_removed_ids, service)
        async with service.replica() as started:
            shown = sum([len(set(await _slate(started, viewer, 100)) & removed) for viewer in range(200)])
            await until("the uploads of a new replica", lambda: started.opened.router_release.table.uploads.rows > 0)
            shown += sum([len(set(await _slate(started, viewer, 100)) & removed) for viewer in range(200)])
    return [
        *quantile_rows("upload to first slate it could be in", added[1:], 5.0),
        *quantile_rows("takedown to last slate it was in", taken_down, 2.0),
        Row(
            "videos taken down in 400 slates of 100 after a replica's start", shown, "",
            f"0 of {len(removed)}", shown == 0,
        ),
    ]  # fmt: skip


def _removed_ids(service: LiveService) -> set[int]:
    with service.publisher() as publisher:
        return set(publisher.read_takedowns().taken_down().videos.tolist())


async def _until_candidate(router: ObservedRouter, video: int, timeout_s: float) -> None:
    """Returns when retrieval, asked for a viewer without a row, has the video among its candidates."""
    opened = router.opened
    table, deadline = opened.router_release.table, time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        (row,) = table.rows_of(np.array([video]))
        if row != ABSENT:
            query = viewer_query({}, RequestContext(), time.time(), table, seed=0)
            if row in (await opened.stages.retrieve(query)).rows:
                return
        await asyncio.sleep(0.02)
    raise SystemExit(f"upload {video}: no candidate within {timeout_s:g} s")


async def _slate(router: ObservedRouter, viewer: int, count: int = 10) -> list[int]:
    answer = await router.recommend(RecommendRequest(viewer_id=viewer, count=count))
    return [video.video_id for video in answer.response.videos]


async def _last_slate_s(router: ObservedRouter, video: int, taken_down_at: float) -> float:
    """Returns when the last slate could have the video: the video table hides it, or a slate had it later."""
    table = router.opened.router_release.table
    row = table.rows_of(np.array([video]))
    viewers = itertools.count(int(taken_down_at * 1e6) % (MAX_ID // 2))
    last, hidden_since = 0.0, None
    while hidden_since is None or time.monotonic() < hidden_since + 0.2:
        if hidden_since is None and (table.servable_rows(row) == ABSENT).all():
            hidden_since = time.monotonic()
            last = hidden_since - taken_down_at
        started = time.monotonic()
        if video in await _slate(router, next(viewers)):
            last = max(last, started - taken_down_at)
        if started > taken_down_at + 60:
            raise SystemExit(f"video {video}: in slates 60 s after its takedown")
    return last


async def measure_trend(service: LiveService, rate: int) -> list[Row]:
    """Measures from the first event of a planted trend until the list that a replica serves has it on top."""
    with service.overlay_writer():
        async with service.replica() as router:
            table, lists = router.opened.router_release.table, router.opened.router_release.lists
            planted = int(table.video_id[len(table) // 2])
            usual = [int(video) for video in table.video_id[np.arange(0, 200)]]
            with Watching(service.events) as watching:
                for _ in range(10):
                    await asyncio.to_thread(watching.append, usual, rate)
                    await asyncio.sleep(1)
                row = int(table.rows_of(np.array([planted]))[0])
                start = time.monotonic()

                def is_on_top() -> bool:
                    top = lists.current().by_kind[TRENDING].of_all[:1]
                    return lists.age_s() is not None and len(top) > 0 and int(top[0]) == row

                while not is_on_top() and time.monotonic() < start + 120:
                    await asyncio.to_thread(watching.append, [*usual, *[planted] * 50], rate // 4)
                    await asyncio.sleep(0.25)
            seconds = time.monotonic() - start
    name = f"planted trend ({rate}/s events, a fifth of them its own) until it is on top"
    return [Row(name, seconds, "s", "<= 30", seconds <= 30)]


class Watching:
    """Appends slates and long watches of videos to an event log."""

    def __init__(self, events: str) -> None:
        self._stack = ExitStack()
        self._logs = {
            topic: self._stack.enter_context(closing(open_topic(events, topic)))
            for topic in (Topic.EXPOSURES, Topic.OUTCOMES)
        }
        self._rng = np.random.default_rng(0)
        self._impression = 10**14

    def __enter__(self) -> Watching:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def append(self, videos: list[int], count: int) -> None:
        """Appends so many impressions of random ones of the videos, each of which is watched to the end."""
        now_us = time.time_ns() // 1000
        chosen = self._rng.choice(videos, count).tolist()
        numbers = range(self._impression, self._impression + count)
        self._impression += count
        for kind, encode, rows in (
            ("exposure", encode_exposures, exposure_rows),
            ("watch", encode_outcomes, outcome_rows),
        ):
            log = self._logs[Topic.EXPOSURES if kind == "exposure" else Topic.OUTCOMES]
            made = [
                ListEvent(kind, i, i % 10_000, video, now_us, "eu", "en", 9_900.0)
                for i, video in zip(numbers, chosen, strict=True)
            ]
            batch = rows(made).combine_chunks().to_batches()[0]
            log.append(list(encode(batch, log.partitions, log.max_record_bytes)))
