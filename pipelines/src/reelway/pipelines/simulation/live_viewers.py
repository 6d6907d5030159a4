"""Why: a rollout can only be shown with viewers who like what is good and leave what is not, on a service that runs.

The run's own world goes on where its log ended: who opens the app now, and what they do with the slate that the
service showed. It knows tastes and no release, and speaks no HTTP.

**Which time it is.** The service uses its own clock and so do these viewers: where the log ended lately (within the
days that the world's trends reach on), the world's time is the clock's, and video ages are what the models learned
from. An older log goes on from its own end, second by second: tastes then are those of the log's last day, and only
the service sees old videos. **How long watching takes.** No time: outcomes are known as soon as the slate is there, so
that a rollout has its evidence in seconds; the values are those of viewers who took their time.
"""

# Shapes: B slates, S places

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from reelway.pipelines.simulation.config import DAY_S, SimulationConfig
from reelway.pipelines.simulation.responses import FLAGS, Responses
from reelway.pipelines.simulation.traffic import DEVICES
from reelway.pipelines.simulation.world import PAD, TREND_MARGIN_D, World
from reelway.platform.contracts.events import LONG_WATCH_CAP_MS, LONG_WATCH_RATIO, OutcomeType
from reelway.platform.errors import ConfigError, DataError

I64 = NDArray[np.int64]

_BLOCK: Final = 1024
_DEVICE_SHARES: Final = (0.85, 0.1, 0.05)


@dataclass(frozen=True, slots=True)
class SeenSlate:
    """What one request was answered with: videos and their tokens, top first."""

    viewer_id: int
    video_ids: Sequence[int]
    tokens: Sequence[str]


@dataclass(frozen=True, slots=True)
class Reaction:
    """What one viewer did with one slate; ``outcomes`` as ``POST /v1/outcomes`` takes them."""

    outcomes: list[dict[str, Any]]
    looked_at: int
    long_watches: int
    watch_s: float


def world_of(dataset_info: dict[str, Any]) -> World:
    """The world that a run's data set was logged in, from its ``dataset.json``.

    Raises:
        ConfigError: the data were imported; nobody knows the tastes behind them.
    """
    try:
        return World(SimulationConfig(**dataset_info["config"]), int(dataset_info["seed"]))
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"the data set is {dataset_info.get('name', 'unnamed')!r}, expected one of `reelway simulate`: only a "
            "simulated service has viewers who can be asked; make one with `reelway simulate --run DIR`"
        ) from error


class LiveViewers:
    """Who asks next, and what they do with the answer.

    Args:
        world: as it was logged.
        count: so many of its viewers, chosen once; all who have an account when absent.
        seed: of everything that is drawn here; the world has its own.
        now_s: the clock when traffic begins, Unix seconds.
    """

    def __init__(self, world: World, *, seed: int, now_s: float, count: int | None = None) -> None:
        self._world = world
        self._rng = np.random.default_rng(np.random.SeedSequence([world.seed, seed, 9]))
        reaches_s = world.end_s + TREND_MARGIN_D * DAY_S / 2
        self._behind_s = 0.0 if world.end_s <= now_s <= reaches_s else now_s - world.end_s
        there = world.available_viewers(self.moment_s(now_s))
        if count is not None:
            if not 1 <= count <= len(there):
                raise ConfigError(f"--viewers {count}, expected 1..{len(there)}: so many have an account")
            there = np.sort(self._rng.choice(there, count, replace=False))
        self._ids = there
        activity = world.viewers.activity[there - 1]
        self._until = np.cumsum(activity / activity.sum())
        self._next: list[tuple[int, str]] = []

    @property
    def count(self) -> int:
        """How many viewers there are."""
        return len(self._ids)

    def moment_s(self, now_s: float | None = None) -> float:
        """The world's time at a moment of the clock; see the module's docstring."""
        return (time.time() if now_s is None else now_s) - self._behind_s

    def next_viewer(self) -> tuple[int, str]:
        """A viewer and their device, as often as they are active."""
        if not self._next:
            place = np.searchsorted(self._until, self._rng.random(_BLOCK), side="right").clip(max=len(self._ids) - 1)
            device = self._rng.choice(len(DEVICES), _BLOCK, p=_DEVICE_SHARES)
            self._next = [(int(v), DEVICES[d]) for v, d in zip(self._ids[place], device, strict=True)]
        return self._next.pop()

    def react(self, slates: Sequence[SeenSlate], moment_s: float) -> list[Reaction]:
        """What happens to slates that were shown around ``moment_s`` of the world, one reaction each.

        Raises:
            DataError: the service showed a video that this world doesn't have, or another viewer's slate.
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
        try:
            responses = self._world.respond(viewer_B, video_BS, moment_s, self._rng)
        except DataError as error:
            raise DataError(f"{error}; is the service serving a release of another run?") from error
        return _reactions(slates, responses, self._world.videos.duration_ms[np.maximum(video_BS - 1, 0)])


def _reactions(slates: Sequence[SeenSlate], found: Responses, duration_ms: NDArray[np.int32]) -> list[Reaction]:
    enough_ms = np.minimum(LONG_WATCH_RATIO * duration_ms, LONG_WATCH_CAP_MS)
    long_B = (found.examined & (found.watch_ms >= enough_ms)).sum(axis=1).tolist()
    looked_B = found.examined.sum(axis=1).tolist()
    watch_s_B = (found.watch_ms.sum(axis=1, dtype=np.float64) / 1000.0).tolist()
    outcomes: list[list[dict[str, Any]]] = [[] for _ in slates]
    rows, places = (axis.tolist() for axis in np.nonzero(found.examined))
    watched = found.watch_ms[found.examined].astype(np.float64).round(1).tolist()
    for row, place, watch_ms in zip(rows, places, watched, strict=True):
        outcomes[row].append({"token": slates[row].tokens[place], "type": OutcomeType.WATCH.value, "value": watch_ms})
    for flag in FLAGS:
        rows, places = (axis.tolist() for axis in np.nonzero(getattr(found, flag)))
        for row, place in zip(rows, places, strict=True):
            outcomes[row].append({"token": slates[row].tokens[place], "type": flag, "value": 1.0})
    return [Reaction(*one) for one in zip(outcomes, looked_B, long_B, watch_s_B, strict=True)]
