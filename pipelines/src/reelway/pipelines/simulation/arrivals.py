"""Arrival times of requests: sessions with daily and weekly cycles, and viewers who join during the log."""

# Shapes: N sessions, B requests

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from reelway.pipelines.simulation.config import DAY_S
from reelway.pipelines.simulation.population import REGION_OFFSET_H
from reelway.pipelines.simulation.world import World

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

DEVICES: Final = ("phone", "tablet", "tv")
_DEVICE_SHARES: Final = (0.85, 0.95, 1.0)
_REQUESTS_PER_SESSION: Final = 2.0
_GAP_S: Final = 90.0


@dataclass(frozen=True)
class Requests:
    """Requests sorted by time, ``[B]`` each."""

    viewer_ids: I64
    time_s: F64
    device: NDArray[np.int64]  # codes into DEVICES


def daily_cycle(local_hour: F64) -> F64:
    """Returns the relative activity at a local hour, in 0..1: lowest at 4, highest at 20."""
    return 0.15 + 0.85 * (0.5 - 0.5 * np.cos((local_hour - 4.0) / 24.0 * 2 * np.pi)) ** 1.3


def draw_requests(
    world: World, count: int, rng: np.random.Generator, span_s: tuple[float, float] | None = None
) -> Requests:
    """Draws exactly ``count`` requests, grouped into sessions.

    Args:
        span_s: start and end of the requests in Unix seconds; None: those of the log.
    """
    span_s = span_s or (world.config.start_s, world.config.end_s)
    viewer, start_s = _sessions(world, int(count / _REQUESTS_PER_SESSION * 1.15) + 8, rng, span_s)
    parts: list[tuple[I64, F64, I64]] = []
    have = 0
    while True:
        parts.append(_session_requests(viewer, start_s, rng, span_s[1]))
        have += len(parts[-1][0])
        if have >= count:
            break
        viewer, start_s = _sessions(world, int((count - have) / _REQUESTS_PER_SESSION * 1.3) + 8, rng, span_s)
    viewers, time_s, device = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    keep = rng.permutation(have)[:count]
    order = keep[np.lexsort((viewers[keep], time_s[keep]))]
    return Requests(viewers[order], time_s[order], device[order])


def _sessions(world: World, count: int, rng: np.random.Generator, span_s: tuple[float, float]) -> tuple[I64, F64]:
    """Draws viewer ids and session starts, uniform over the part of the span in which the viewer has an account."""
    viewers, (start_s, end_s) = world.viewers, span_s
    from_s = np.maximum(viewers.created_s, start_s)
    weight = np.cumsum(viewers.activity * (end_s - from_s))
    drawn_viewers, starts_s, drawn = [], [], 0
    while drawn < count:
        tries = int(2.2 * (count - drawn)) + 16
        viewer = np.searchsorted(weight / weight[-1], rng.random(tries), side="right").clip(max=len(weight) - 1)
        at_s = from_s[viewer] + rng.random(tries) * (end_s - from_s[viewer])
        local_hour = (at_s / 3600.0 + REGION_OFFSET_H[viewers.region[viewer]]) % 24.0
        weekend = ((at_s / DAY_S + 3) % 7 >= 5) * 0.15
        awake = rng.random(tries) < (daily_cycle(local_hour) + weekend) / 1.15
        drawn_viewers.append(viewer[awake])
        starts_s.append(at_s[awake])
        drawn += int(awake.sum())
    return np.concatenate(drawn_viewers)[:count] + 1, np.concatenate(starts_s)[:count]


def _session_requests(viewer: I64, start_s: F64, rng: np.random.Generator, end_s: float) -> tuple[I64, F64, I64]:
    length = rng.geometric(1.0 / _REQUESTS_PER_SESSION, len(viewer))
    session = np.repeat(np.arange(len(viewer)), length)
    step = np.arange(len(session)) - np.repeat(np.cumsum(length) - length, length)
    time_s = start_s[session] + step * _GAP_S + rng.random(len(session)) * 20.0
    time_s = np.floor(time_s * 1000.0) / 1000.0
    device = np.searchsorted(_DEVICE_SHARES, rng.random(len(viewer)))[session]
    inside = time_s < end_s - 900.0
    return viewer[session][inside], time_s[inside], device[inside]
