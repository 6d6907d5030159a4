"""Reference policies for tests and closed-loop evaluation: random, recent popularity, and an oracle with true tastes.

None of the policies learns; ``RecentPopularity`` receives its events as an argument.
"""

# Shapes: B requests, S slate, M videos

from __future__ import annotations

from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reelway.pipelines.simulation.config import DAY_S
from reelway.pipelines.simulation.responses import expected_watch_ms
from reelway.pipelines.simulation.world import World
from reelway.platform.contracts.events import LONG_WATCH_CAP_MS, LONG_WATCH_RATIO, OutcomeType

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Policy(Protocol):
    """A policy that chooses slates."""

    def slates(
        self, viewer_ids: I64, time_s: float, count: int, rng: np.random.Generator, /, *, seen: Bools | None = None
    ) -> I64:
        """Returns video ids ``[B, count]``, best first; ``seen`` ``[B, M]`` (column = video id - 1) are excluded."""
        ...


class RandomPolicy:
    """Recommends available videos at random."""

    def __init__(self, world: World) -> None:
        self._world = world

    def slates(
        self, viewer_ids: I64, time_s: float, count: int, rng: np.random.Generator, /, *, seen: Bools | None = None
    ) -> I64:
        score = rng.random((len(viewer_ids), len(self._world.videos.topic)))
        return _best(self._world, score, time_s, count, seen)


class RecentPopularity:
    """Recommends the videos with the most long watches in the ``window_s`` before ``until_s`` of the given events."""

    def __init__(self, world: World, outcomes: pa.Table, until_s: float, *, window_s: float = DAY_S) -> None:
        self._world = world
        when_s = outcomes["event_time"].cast(pa.int64()).to_numpy() / 1e6
        recent = (when_s >= until_s - window_s) & (when_s < until_s)
        watched = outcomes.filter(
            pc.and_(pa.array(recent), pc.equal(outcomes["type"].cast(pa.string()), OutcomeType.WATCH.value))
        )
        video = watched["video_id"].to_numpy() - 1
        enough_ms = np.minimum(LONG_WATCH_RATIO * world.videos.duration_ms[video], LONG_WATCH_CAP_MS)
        long_watch = watched["value"].to_numpy() >= enough_ms
        self.counts = np.bincount(video[long_watch], minlength=len(world.videos.topic)).astype(np.float64)

    def slates(
        self, viewer_ids: I64, time_s: float, count: int, _: np.random.Generator, /, *, seen: Bools | None = None
    ) -> I64:
        score = np.broadcast_to(self.counts, (len(viewer_ids), len(self.counts)))
        return _best(self._world, score, time_s, count, seen)


class OraclePolicy:
    """Recommends the videos with the highest expected watch time at the first exposure.

    It is an upper bound for recommenders that show a viewer no video twice, up to the mild satiation of a session.
    """

    def __init__(self, world: World) -> None:
        self._world = world

    def slates(
        self, viewer_ids: I64, time_s: float, count: int, _: np.random.Generator, /, *, seen: Bools | None = None
    ) -> I64:
        enjoy = self._world.enjoyment_of_all(viewer_ids, time_s)
        score = expected_watch_ms(enjoy, self._world.videos.duration_ms.astype(np.float32))
        return _best(self._world, score, time_s, count, seen)


def _best(world: World, score_BM: NDArray[np.floating], time_s: float, count: int, seen: Bools | None) -> I64:
    available = len(world.available_videos(time_s))
    score_BM = score_BM[:, :available].astype(np.float64)
    if seen is not None:
        score_BM[seen[:, :available]] -= 1e12  # below all unseen videos
    top = np.argpartition(-score_BM, count - 1, axis=1)[:, :count]
    order = np.argsort(-np.take_along_axis(score_BM, top, axis=1), axis=1, kind="stable")
    chosen: I64 = np.take_along_axis(top, order, axis=1) + 1
    return chosen
