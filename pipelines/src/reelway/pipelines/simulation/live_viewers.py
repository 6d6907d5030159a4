"""Simulated viewers for live traffic: draws the next viewer to request a slate, and the viewer's reaction.

The viewers continue the run's simulated world from the end of its log, and have watched what the log contains. This
module models viewer tastes only, not releases or HTTP.

**Simulated time.** If the log ended recently (within the days for which the world has trends), simulated time is the
current time, and video ages are those that the models were trained on. An older log continues from its end, second by
second: tastes are those of its last day, and only the service sees old videos.

**Watch time.** Watching takes no simulated time. Outcomes are known as soon as the slate arrives, so that a rollout has
evidence within seconds; their values are those of real watch times.
"""

# Shapes: B slates, S positions

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from reelway.pipelines.simulation.arrivals import DEVICES
from reelway.pipelines.simulation.config import DAY_S, SimulationConfig
from reelway.pipelines.simulation.responses import FLAGS, Responses
from reelway.pipelines.simulation.satiation import ViewingHistory
from reelway.pipelines.simulation.world import PAD, World
from reelway.pipelines.simulation.world_constants import LIVE_DAYS, WORLD_VERSION
from reelway.platform.contracts.events import LONG_WATCH_CAP_MS, LONG_WATCH_RATIO, OutcomeType
from reelway.platform.errors import ConfigError, DataError

I64 = NDArray[np.int64]

_DRAW_BATCH: Final = 1024
_DEVICE_SHARES: Final = (0.85, 0.1, 0.05)


@dataclass(frozen=True, slots=True)
class ShownSlate:
    """Videos and impression tokens of one slate, top first."""

    viewer_id: int
    video_ids: Sequence[int]
    tokens: Sequence[str]


@dataclass(frozen=True, slots=True)
class Reaction:
    """A viewer's reaction to a slate; ``outcomes`` in the format of ``POST /v1/outcomes``."""

    outcomes: list[dict[str, Any]]
    looked_at: int
    long_watches: int
    watch_s: float


def load_world(dataset_info: dict[str, Any]) -> World:
    """Returns the world of a run's simulated data set, from its ``dataset.json``.

    Raises:
        ConfigError: if the data set was imported, because the viewers' tastes are then unknown, or if another version
            of the world simulated it.
    """
    try:
        config, seed = SimulationConfig(**dataset_info["config"]), int(dataset_info["seed"])
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"data set {dataset_info.get('name', 'unnamed')!r} has no simulated viewers; create a simulated one with "
            "`reelway simulate --run DIR`"
        ) from error
    if (version := dataset_info.get("world_version")) != WORLD_VERSION:
        raise ConfigError(
            f"data set of version {version or 1} of the simulated world: its viewers differ from those of version "
            f"{WORLD_VERSION}; simulate it again with `reelway simulate --run DIR`"
        )
    return World(config, seed)


def load_history(world: World, outcomes: Path) -> ViewingHistory:
    """Returns what the viewers had watched at the end of the log whose outcomes are in this Parquet file."""
    history = ViewingHistory(world.videos)
    history.add_outcomes(pq.read_table(outcomes, columns=["viewer_id", "video_id", "type", "value", "event_time"]))
    return history


class LiveViewers:
    """Draws the next viewer and viewers' reactions to slates.

    Args:
        world: the world of the data set.
        count: number of viewers, sampled once. Defaults to all viewers who have an account.
        seed: random seed of this object, independent of the world's seed.
        now_s: start of the traffic in Unix seconds.
        history: what the viewers have watched before. Defaults to nothing.
    """

    def __init__(
        self,
        world: World,
        *,
        seed: int,
        now_s: float,
        count: int | None = None,
        history: ViewingHistory | None = None,
    ) -> None:
        self._world = world
        self._history = ViewingHistory(world.videos) if history is None else history
        self._rng = np.random.default_rng(np.random.SeedSequence([world.seed, seed, 9]))
        reaches_s = world.end_s + LIVE_DAYS * DAY_S / 2
        self._behind_s = 0.0 if world.end_s <= now_s <= reaches_s else now_s - world.end_s
        available = world.available_viewers(self.simulated_time_s(now_s))
        if count is not None:
            if not 1 <= count <= len(available):
                raise ConfigError(f"--viewers {count} is outside 1..{len(available)}: viewers with an account")
            available = np.sort(self._rng.choice(available, count, replace=False))
        self._ids = available
        activity = world.viewers.activity[available - 1]
        self._until = np.cumsum(activity / activity.sum())
        self._next: list[tuple[int, str]] = []

    @property
    def count(self) -> int:
        """Number of viewers."""
        return len(self._ids)

    def simulated_time_s(self, now_s: float | None = None) -> float:
        """Returns the simulated time at ``now_s``, by default now; see the module's docstring."""
        return (time.time() if now_s is None else now_s) - self._behind_s

    def next_viewer(self) -> tuple[int, str]:
        """Draws a viewer in proportion to the viewers' activity, and a device."""
        if not self._next:
            index = np.searchsorted(self._until, self._rng.random(_DRAW_BATCH), side="right").clip(
                max=len(self._ids) - 1
            )
            device = self._rng.choice(len(DEVICES), _DRAW_BATCH, p=_DEVICE_SHARES)
            self._next = [(int(v), DEVICES[d]) for v, d in zip(self._ids[index], device, strict=True)]
        return self._next.pop()

    def react(self, slates: Sequence[ShownSlate], moment_s: float) -> list[Reaction]:
        """Draws one reaction per slate, shown at the simulated time ``simulated_time_s``.

        Raises:
            DataError: if a viewer does not exist in this world, or a video is not uploaded yet.
        """
        if not slates:
            return []
        longest = max(len(slate.video_ids) for slate in slates)
        if not longest:
            return [Reaction([], 0, 0, 0.0) for _ in slates]
        video_BS = np.full((len(slates), longest), PAD, dtype=np.int64)
        for row, slate in enumerate(slates):
            video_BS[row, : len(slate.video_ids)] = slate.video_ids
        viewer_B = np.array([slate.viewer_id for slate in slates], dtype=np.int64)
        available = len(self._world.available_videos(moment_s))
        try:
            if (early := video_BS[video_BS > available]).size:
                raise DataError(f"simulation: video id {early[0]} is not uploaded yet, expected 1..{available}")
            responses = self._world.respond(viewer_B, video_BS, moment_s, self._rng, self._history)
        except DataError as error:
            raise DataError(f"{error}; check that the service serves a release of this run") from error
        return _reactions(slates, responses, self._world.videos.duration_ms[np.maximum(video_BS - 1, 0)])


def _reactions(slates: Sequence[ShownSlate], responses: Responses, duration_ms: NDArray[np.int32]) -> list[Reaction]:
    enough_ms = np.minimum(LONG_WATCH_RATIO * duration_ms, LONG_WATCH_CAP_MS)
    long_B = (responses.examined & (responses.watch_ms >= enough_ms)).sum(axis=1).tolist()
    examined_B = responses.examined.sum(axis=1).tolist()
    watch_s_B = (responses.watch_ms.sum(axis=1, dtype=np.float64) / 1000.0).tolist()
    outcomes: list[list[dict[str, Any]]] = [[] for _ in slates]
    rows, positions = (axis.tolist() for axis in np.nonzero(responses.examined))
    watched = responses.watch_ms[responses.examined].astype(np.float64).round(1).tolist()
    for row, position, watch_ms in zip(rows, positions, watched, strict=True):
        outcomes[row].append(
            {"token": slates[row].tokens[position], "type": OutcomeType.WATCH.value, "value": watch_ms}
        )
    for flag in FLAGS:
        rows, positions = (axis.tolist() for axis in np.nonzero(getattr(responses, flag)))
        for row, position in zip(rows, positions, strict=True):
            outcomes[row].append({"token": slates[row].tokens[position], "type": flag, "value": 1.0})
    return [Reaction(*fields) for fields in zip(outcomes, examined_B, long_B, watch_s_B, strict=True)]
