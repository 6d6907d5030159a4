"""Final output of the demo: slates of a few viewers, request latency, and files to look at next.

Titles and likes come from the data set, slates from the running service.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.table import Table

from reelway.platform.cli.terminal import progress, stdout_console
from reelway.platform.contracts.events import OutcomeType
from reelway.platform.errors import DataError, ServingError
from reelway.platform.run_directory import RunDirectory
from reelway.platform.viewer_pseudonyms import viewer_pseudonym

SHOWN_VIEWERS = 3
SHOWN_VIDEOS = 8
REQUESTS = 200


def print_demo_report(run: RunDirectory, url: str) -> None:
    """Print slates, a latency summary and next steps to standard output."""
    likes = _likes(run.dataset)
    titles = _titles(run.dataset)
    viewers = _typical_viewers(likes)
    for viewer in viewers[:SHOWN_VIEWERS]:
        _print_slate(viewer, likes, titles, _recommend(url, viewer, SHOWN_VIDEOS))
    new_viewer = int(pc.max(likes["viewer_id"]).as_py()) + 1_000_000
    _print_slate(new_viewer, likes, titles, _recommend(url, new_viewer, SHOWN_VIDEOS))
    _print_latency(url, viewers)
    _print_next(run)


def _likes(dataset: Path) -> pa.Table:
    outcomes = pq.read_table(dataset / "outcomes.parquet", columns=["viewer_id", "video_id", "type", "event_time"])
    liked = outcomes.filter(pc.equal(outcomes["type"].cast(pa.string()), OutcomeType.LIKE.value))
    if liked.num_rows == 0:
        raise DataError(f"{dataset / 'outcomes.parquet'}: no 'like' outcomes; use a larger data set")
    return liked.sort_by("event_time")


def _titles(dataset: Path) -> dict[int, str]:
    videos = pq.read_table(dataset / "videos.parquet", columns=["video_id", "title"])
    return dict(zip(videos["video_id"].to_pylist(), videos["title"].to_pylist(), strict=True))


def _typical_viewers(likes: pa.Table) -> list[int]:
    """Returns viewers by descending number of likes, without the top tenth, who are not typical."""
    counts = (
        likes.group_by("viewer_id")
        .aggregate([("video_id", "count")])
        .sort_by([("video_id_count", "descending"), ("viewer_id", "ascending")])
    )
    viewers: list[int] = counts["viewer_id"].to_pylist()
    return viewers[len(viewers) // 10 :] or viewers


def _recommend(url: str, viewer: int, count: int) -> dict[str, Any]:
    answer = httpx.post(
        f"{url}/v1/recommend",
        json={"viewer_id": viewer, "count": count, "context": {"device": "phone"}},
        timeout=30,
    )
    if not answer.is_success:
        raise ServingError(
            f"POST {url}/v1/recommend for {viewer_pseudonym(viewer)}: {answer.status_code} {answer.text[:300]}"
        )
    body: dict[str, Any] = answer.json()
    return body


def _print_slate(viewer: int, likes: pa.Table, titles: dict[int, str], answer: dict[str, Any]) -> None:
    viewer_likes = likes.filter(pc.equal(likes["viewer_id"], viewer))
    liked = [titles.get(video) or f"video {video}" for video in viewer_likes["video_id"].to_pylist()[-4:][::-1]]
    past = f"recently liked: {'; '.join(liked)}" if liked else "new viewer"
    table = Table(title=f"viewer {viewer} ({past})", title_justify="left", expand=False)
    for column in ("#", "video", "source", "reason", "value"):
        table.add_column(column, justify="right" if column in "#value" else "left")
    for video in answer["videos"]:
        table.add_row(
            str(video["position"] + 1),
            video["title"] or f"video {video['video_id']}",
            video["source"],
            video["reason"],
            f"{video['score']:.3f}",
        )
    stdout_console.print(table)
    if answer["degraded"]:
        stdout_console.print(f"degraded: {', '.join(answer['degraded'])}")


def _print_latency(url: str, viewers: list[int]) -> None:
    seen_ms = np.empty(REQUESTS)
    with httpx.Client(base_url=url, timeout=30) as client, progress() as bar:
        task = bar.add_task("measuring latency", total=REQUESTS)
        for i in range(REQUESTS):
            body = {"viewer_id": viewers[i % len(viewers)], "count": 20}
            start = time.perf_counter()
            client.post("/v1/recommend", json=body).raise_for_status()
            seen_ms[i] = 1000 * (time.perf_counter() - start)
            bar.advance(task)
    p50, p95, p99 = np.percentile(seen_ms, [50, 95, 99])
    stdout_console.print(
        f"latency of {REQUESTS} sequential requests for 20 videos each: "
        f"p50 {p50:.1f} ms, p95 {p95:.1f} ms, p99 {p99:.1f} ms"
    )


def _print_next(run: RunDirectory) -> None:
    stdout_console.print(
        "\nnext\n"
        f"  {run.path}/steps/*.json        record of each step: configuration, seed, result\n"
        f"  {run.path}/evaluation/         ranking quality compared with baselines\n"
        f"  {run.path}/releases/           the signed releases\n"
        f"  {run.path}/serving.json        addresses while it runs (make demo KEEP=1): /docs at internal_url\n"
        "  reelway --help                 all commands",
        highlight=False,
    )
