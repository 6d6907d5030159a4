"""The viewers of the live loop: the same requests for every arm, and what the viewers watch of the arm's slates."""

# Shapes: B requests of the loop, V viewers + 1 (index = viewer id), D days

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from reelway.pipelines.simulation.arrivals import DEVICES, Requests, draw_requests
from reelway.pipelines.simulation.config import DAY_S
from reelway.pipelines.simulation.live_viewers import LiveViewers, ShownSlate
from reelway.pipelines.simulation.satiation import ViewingHistory
from reelway.pipelines.simulation.world import World
from reelway.platform.cli.terminal import print_status

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

TICK_S: Final = 60.0
"""Step of the simulated clock. Two pages of a viewer are at least 90 s apart, so the live parts run in between."""
SETTLING_S: Final = 2.0
"""From an append to the tick at which the stream has its rows: more than a step of the viewers' histories."""
REQUESTS_SEED, VIEWERS_SEED = 7, 8


class Service(Protocol):
    """One arm, as its viewers use it."""

    def advance(self, now_s: float) -> None:
        """Moves the clock, and does what the arm's background processes do until then."""
        ...

    def recommend(self, viewer_id: int, device: str, now_s: float, request_id: int) -> ShownSlate: ...

    def report(self, outcomes: Sequence[dict[str, Any]], now_s: float) -> None:
        """Takes outcomes in the format of ``POST /v1/outcomes``."""
        ...


@dataclass
class ArmTotals:
    """What the viewers of one arm watched."""

    name: str
    watch_s: F64  # [V, D]
    impressions: int = 0
    repeats: int = 0  # impressions of a video that the viewer was shown before in the loop
    upload_impressions: int = 0  # of videos that were uploaded after the release was built
    uploads_shown: int = 0  # distinct videos of these

    def watch_s_per_viewer_day(self, viewers: int) -> float:
        return float(self.watch_s.sum() / (viewers * self.watch_s.shape[1]))


def loop_requests(world: World, days: int, pages_per_day: float) -> Requests:
    """Returns the requests of the days after the log: on average ``pages_per_day`` of each viewer."""
    rng = np.random.default_rng(np.random.SeedSequence([world.seed, REQUESTS_SEED]))
    count = round(days * pages_per_day * world.config.viewers)
    return draw_requests(world, count, rng, (world.end_s, world.end_s + days * DAY_S))


def run_arm(
    name: str, world: World, history: ViewingHistory, service: Service, requests: Requests, days: int
) -> ArmTotals:
    """Answers all requests by one arm and reports what the viewers did at the end of each tick.

    The same draws decide the viewers' reactions in every arm, because all arms have the same requests.
    """
    viewers = LiveViewers(world, seed=VIEWERS_SEED, now_s=world.end_s, history=history)
    totals = ArmTotals(name, np.zeros((world.config.viewers + 1, days)))
    seen = np.zeros((world.config.viewers + 1, len(world.videos.topic) + 1), dtype=np.bool_)
    tick_B = ((requests.time_s - world.end_s) // TICK_S).astype(np.int64)
    today = 0
    for tick in np.unique(tick_B).tolist():
        start_s = world.end_s + tick * TICK_S
        service.advance(start_s)
        outcomes: list[dict[str, Any]] = []
        for index in np.flatnonzero(tick_B == tick).tolist():
            viewer, time_s = int(requests.viewer_ids[index]), float(requests.time_s[index])
            slate = service.recommend(viewer, DEVICES[requests.device[index]], time_s, index)
            (reaction,) = viewers.react([slate], time_s)
            day = int((time_s - world.end_s) // DAY_S)
            totals.watch_s[viewer, day] += reaction.watch_s
            _count(totals, seen, slate, world.config.videos)
            outcomes += reaction.outcomes
            if day > today:
                _report_day(totals, today, world.config.viewers)
                today = day
        service.report(outcomes, start_s + TICK_S - SETTLING_S)
    _report_day(totals, today, world.config.viewers)
    totals.uploads_shown = int(seen[:, world.config.videos + 1 :].any(axis=0).sum())
    return totals


def _count(totals: ArmTotals, seen: NDArray[np.bool_], slate: ShownSlate, videos: int) -> None:
    shown = np.asarray(slate.video_ids, dtype=np.int64)
    totals.impressions += len(shown)
    totals.repeats += int(seen[slate.viewer_id, shown].sum())
    totals.upload_impressions += int((shown > videos).sum())
    seen[slate.viewer_id, shown] = True


def _report_day(totals: ArmTotals, day: int, viewers: int) -> None:
    watched_s = totals.watch_s[:, day].sum() / viewers
    print_status(f"{totals.name}, day {day + 1}: {watched_s:.1f} s watched per viewer, {totals.repeats:,} repeats")
