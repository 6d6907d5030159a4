"""Live scenes of ``reelway demo``: what is shown, done, uploaded and taken down counts within seconds.

Every number comes from requests to the running service. A scene that does not happen within its deadline fails the
demo.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import httpx
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.table import Table

from reelway.platform.cli.processes import reelway_command, run_command
from reelway.platform.cli.terminal import print_status, stderr_console, stdout_console
from reelway.platform.contracts.events import OutcomeType
from reelway.platform.errors import ServingError
from reelway.platform.run_directory import RunDirectory
from reelway.platform.viewer_pseudonyms import viewer_pseudonym

PAGES: Final = 10
PAGE_VIDEOS: Final = 10
WATCHED: Final = 3
UPLOAD_VIEWERS: Final = 30
TREND_VIEWERS: Final = 60
DEADLINE_S: Final = 60.0
"""How long a scene may take to become visible."""
START_DEADLINE_S: Final = 120.0
GONE_S: Final = 5.0
"""How long slates are read after a takedown."""
POLL_INTERVAL_S: Final = 0.1


@dataclass(frozen=True)
class LiveResult:
    """Result of one scene."""

    scene: str
    result: str
    passed: bool


@dataclass(frozen=True)
class LiveScenes:
    """The scenes, played one after another on a running service.

    Args:
        url: URL of the service.
        viewers: ids of known viewers.
        new_viewer: first id of viewers whom the service does not know.
        videos: the data set's videos.
    """

    run: RunDirectory
    client: httpx.Client
    viewers: Sequence[int]
    new_viewer: int
    videos: pa.Table

    def play(self) -> list[LiveResult]:
        """Plays all scenes and returns their results."""
        with stderr_console.status("waiting for the feature stream"):
            self._wait_for_stream()
        results = []
        video = self._new_video()
        for title, scene in (
            ("ten pages without a repeat", self._pages),
            (f"watched {WATCHED} videos of one topic", self._next_page),
            ("uploaded a video", lambda: self._upload(video)),
            ("took the video down", lambda: self._takedown(int(video["video_id"]))),
            ("many viewers watch one video", self._trend),
        ):
            with stderr_console.status(title):
                result, passed = scene()
            results.append(LiveResult(title, result, passed))
        return results

    def _wait_for_stream(self) -> None:
        """Waits until the stream has caught up after its start: an outcome reaches a new viewer's slate.

        Raises:
            ServingError: if it does not within ``START_DEADLINE_S``.
        """
        viewer = self.new_viewer - 1
        (first,) = self._slate(viewer, 1)
        self._report([(first["token"], OutcomeType.LIKE, None)])
        deadline = time.monotonic() + START_DEADLINE_S
        while not any(video["reason"].startswith("because") for video in self._slate(viewer, PAGE_VIDEOS)):
            if time.monotonic() > deadline:
                raise ServingError(
                    f"outcomes reach no slate after {START_DEADLINE_S:g} s; see {self.run.path / 'stream'}/stream.log"
                )
            time.sleep(1.0)

    def _pages(self) -> tuple[str, bool]:
        shown = [video["video_id"] for _ in range(PAGES) for video in self._slate(self.viewers[0], PAGE_VIDEOS)]
        repeats = len(shown) - len(set(shown))
        return f"{len(shown)} videos, {repeats} repeats", not repeats and len(shown) == PAGES * PAGE_VIDEOS

    def _next_page(self) -> tuple[str, bool]:
        """A new viewer watches and likes videos of one topic to the end."""
        viewer, topic_of = self.new_viewer, self._topics()
        first = self._slate(viewer, 2 * PAGE_VIDEOS)
        topic, _ = Counter(topic_of[video["video_id"]] for video in first).most_common(1)[0]
        of_topic = [video for video in first if topic_of[video["video_id"]] == topic][:WATCHED]
        self._report(
            [(video["token"], OutcomeType.WATCH, self._duration_ms(video["video_id"])) for video in of_topic]
            + [(video["token"], OutcomeType.LIKE, None) for video in of_topic]
        )
        began = time.monotonic()

        def page_that_follows() -> list[dict[str, Any]] | None:
            page = self._slate(viewer, PAGE_VIDEOS)
            return page if any(video["reason"].startswith("because") for video in page) else None

        page, elapsed_s = _first(page_that_follows, began)
        if page is None:
            return f"no slate followed within {DEADLINE_S:g} s", False
        because = sum(video["reason"].startswith("because") for video in page)
        return (
            f"first slate that follows after {elapsed_s:.1f} s: {because} of {len(page)} videos because of them, "
            "none before"
        ), True

    def _new_video(self) -> dict[str, Any]:
        """A new video with the content of the most liked one, by the same creator."""
        likes = _outcomes(self.run.dataset, OutcomeType.LIKE)
        counts = likes.group_by("video_id").aggregate([("viewer_id", "count")])
        best = counts.sort_by([("viewer_id_count", "descending"), ("video_id", "ascending")])["video_id"][0]
        video: dict[str, Any] = self.videos.filter(pc.equal(self.videos["video_id"], best)).to_pylist()[0]
        new_id = int(pc.max(self.videos["video_id"]).as_py()) + int(time.time())
        return video | {"video_id": new_id, "uploaded_at": datetime.now(UTC), "title": "fresh from the demo"}

    def _upload(self, video: dict[str, Any]) -> tuple[str, bool]:
        path = self.run.path / "upload.jsonl"
        path.write_text(json.dumps(video, default=lambda value: value.isoformat()) + "\n")
        began = time.monotonic()
        run_command(reelway_command("catalogue", "upsert", str(path), "--run", str(self.run.path)))
        viewers = self._cycle()

        def viewer_who_sees_it() -> int | None:
            viewer = next(viewers)
            shown = [video["video_id"] for video in self._slate(viewer, 2 * PAGE_VIDEOS)]
            return viewer if video["video_id"] in shown else None

        viewer, elapsed_s = _first(viewer_who_sees_it, began, interval_s=0.0)
        if viewer is None:
            return f"in no slate within {DEADLINE_S:g} s", False
        return f"first shown after {elapsed_s:.1f} s, to {viewer_pseudonym(viewer)}", True

    def _takedown(self, video_id: int) -> tuple[str, bool]:
        began = time.monotonic()
        command = ["catalogue", "takedown", "--video", str(video_id), "--reason", "demo", "--run", str(self.run.path)]
        run_command(reelway_command(*command))
        done, last_s = time.monotonic(), 0.0
        viewers = self._cycle()
        while time.monotonic() < done + GONE_S:
            if video_id in [video["video_id"] for video in self._slate(next(viewers), 2 * PAGE_VIDEOS)]:
                last_s = time.monotonic() - began
        shown = f"last shown after {last_s:.1f} s" if last_s else "not shown again"
        return f"{shown}, read for {GONE_S:g} s", last_s < done - began + GONE_S / 2

    def _trend(self) -> tuple[str, bool]:
        """New viewers watch a video until it is in the first ten of the trending list.

        It is one that most of the first viewers are shown: the one that is lowest in the list, or not in it.
        """
        ranks, began = _trending_ranks(self.run.overlay), time.monotonic()
        viewers = itertools.count(self.new_viewer + 1)
        slates = [self._slate(next(viewers), 2 * PAGE_VIDEOS) for _ in range(TREND_VIEWERS)]
        shown = Counter(video["video_id"] for slate in slates for video in slate)
        often = [video for video, slates_with_it in shown.items() if 2 * slates_with_it >= TREND_VIEWERS]
        target = max(often or [shown.most_common(1)[0][0]], key=lambda video: ranks.get(video, len(ranks)))
        before = ranks.get(target)
        for slate in slates:
            self._watch_to_the_end(target, slate)

        def rank_in_first_ten() -> int | None:
            rank = _trending_ranks(self.run.overlay).get(target)
            if rank is not None and rank < min(before if before is not None else 1 << 30, 10):
                return rank
            self._watch_to_the_end(target, self._slate(next(viewers), 2 * PAGE_VIDEOS))
            return None

        rank, elapsed_s = _first(rank_in_first_ten, began, interval_s=0.0)
        place = "not in the list" if before is None else f"place {before + 1}"
        watched = f"{next(viewers) - self.new_viewer - 1} viewers"
        if rank is None:
            return f"video {target}: {place} before, not in the first ten after {DEADLINE_S:g} s and {watched}", False
        return (
            f"video {target}: {place} before, place {rank + 1} of the trending list after {elapsed_s:.1f} s and "
            f"{watched}"
        ), True

    def _watch_to_the_end(self, video_id: int, slate: Sequence[dict[str, Any]]) -> None:
        """Reports that a video was watched to the end and liked, if the slate has it."""
        tokens = [video["token"] for video in slate if video["video_id"] == video_id]
        watched = [(token, OutcomeType.WATCH, self._duration_ms(video_id)) for token in tokens]
        if tokens:
            self._report(watched + [(token, OutcomeType.LIKE, None) for token in tokens])

    def _slate(self, viewer: int, count: int) -> list[dict[str, Any]]:
        answer = self.client.post("/v1/recommend", json={"viewer_id": viewer, "count": count})
        if not answer.is_success:
            raise ServingError(
                f"POST /v1/recommend for {viewer_pseudonym(viewer)}: {answer.status_code} {answer.text[:300]}"
            )
        videos: list[dict[str, Any]] = answer.json()["videos"]
        return videos

    def _report(self, outcomes: Sequence[tuple[str, OutcomeType, int | None]]) -> None:
        if not outcomes:
            return
        body = [{"token": token, "type": str(kind), "value": value} for token, kind, value in outcomes]
        answer = self.client.post("/v1/outcomes", json={"outcomes": body})
        if not answer.is_success:
            raise ServingError(f"POST /v1/outcomes: {answer.status_code} {answer.text[:300]}")

    def _cycle(self) -> Iterator[int]:
        while True:
            yield from self.viewers[:UPLOAD_VIEWERS]

    def _topics(self) -> dict[int, int]:
        return dict(zip(self.videos["video_id"].to_pylist(), self.videos["topic"].to_pylist(), strict=True))

    def _duration_ms(self, video_id: int) -> int:
        row = self.videos.filter(pc.equal(self.videos["video_id"], video_id))
        return int(row["duration_ms"][0].as_py()) if row.num_rows else 0


def play_live_scenes(run: RunDirectory, url: str) -> list[LiveResult]:
    """Plays the live scenes on the service at ``url`` and prints their results."""
    likes = _outcomes(run.dataset, OutcomeType.LIKE)
    counts = likes.group_by("viewer_id").aggregate([("video_id", "count")])
    viewers = counts.sort_by([("video_id_count", "descending"), ("viewer_id", "ascending")])["viewer_id"].to_pylist()
    new_viewer = max(viewers) + 2_000_000
    with httpx.Client(base_url=url, timeout=30) as client:
        scenes = LiveScenes(run, client, viewers[len(viewers) // 10 :] or viewers, new_viewer, _videos(run.dataset))
        results = scenes.play()
    table = Table(title="live", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("scene", "result"):
        table.add_column(column)
    for one in results:
        table.add_row(one.scene, one.result if one.passed else f"[bold red]{one.result}[/]")
    stdout_console.print(table)
    return results


def check_live_results(results: Sequence[LiveResult]) -> None:
    """Checks that every scene happened.

    Raises:
        ServingError: if one did not.
    """
    if failed := [f"{one.scene}: {one.result}" for one in results if not one.passed]:
        raise ServingError("the live scenes did not end as expected: " + "; ".join(failed))
    print_status("live scenes: all as expected")


def _first(attempt: Callable[[], Any], began: float, *, interval_s: float = POLL_INTERVAL_S) -> tuple[Any, float]:
    """Returns the first result that is not ``None`` with the seconds since ``began``; ``None`` at the deadline."""
    while time.monotonic() < began + DEADLINE_S:
        if (result := attempt()) is not None:
            return result, time.monotonic() - began
        time.sleep(interval_s)
    return None, DEADLINE_S


def _trending_ranks(overlay: Path) -> dict[int, int]:
    """Returns video id -> place in the live list of trending videos, from 0; empty while there is no list."""
    try:
        with pa.memory_map(str(overlay / "lists.arrow"), "r") as source:
            lists = pa.ipc.open_file(source).read_all()
    except FileNotFoundError:
        return {}
    trending = lists.filter(pc.equal(lists["list"].cast(pa.string()), "trending"))
    return dict(zip(trending["video_id"].to_pylist(), trending["rank"].to_pylist(), strict=True))


def _outcomes(dataset: Path, kind: OutcomeType) -> pa.Table:
    outcomes = pq.read_table(dataset / "outcomes.parquet", columns=["viewer_id", "video_id", "type"])
    return outcomes.filter(pc.equal(outcomes["type"].cast(pa.string()), str(kind)))


def _videos(dataset: Path) -> pa.Table:
    return pq.read_table(dataset / "videos.parquet")
