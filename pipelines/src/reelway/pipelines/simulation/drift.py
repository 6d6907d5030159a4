"""Draws the movements of a world's interests: trends and drift of topics, and drift of each viewer's tastes."""

# Shapes: H hours, D days, V viewers, T topics

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from reelway.pipelines.simulation import world_constants as constants
from reelway.pipelines.simulation.config import SimulationConfig
from reelway.pipelines.simulation.population import TOPICS

F16 = NDArray[np.float16]
F32 = NDArray[np.float32]


def draw_trends(rng: np.random.Generator, config: SimulationConfig) -> F32:
    """Returns the trend bonus of each topic at each hour, ``[H, T]``: bumps that rise and fall within a day or two."""
    hours = _days(config) * 24
    bumps = constants.TRENDS_PER_DAY * _days(config)
    at_h, width_h = rng.uniform(0, hours, bumps), rng.uniform(*constants.TREND_WIDTH_H, bumps)
    height, topic = rng.uniform(*constants.TREND_HEIGHT, bumps), rng.integers(0, TOPICS, bumps)
    shape_HN = height * np.exp(-(((np.arange(hours)[:, None] - at_h) / width_h) ** 2))
    trend_HT = np.zeros((hours, TOPICS))
    np.add.at(trend_HT.T, topic, shape_HN.T)
    return np.minimum(trend_HT, constants.TREND_LIMIT).astype(np.float32)


def draw_topic_drift(rng: np.random.Generator, config: SimulationConfig) -> F32:
    """Returns the drift of each topic's popularity at each hour, ``[H, T]``."""
    walk_HT = np.empty((_days(config) * 24, TOPICS), dtype=np.float32)
    _walk(rng, walk_HT, constants.TOPIC_DRIFT, constants.TOPIC_DRIFT_HALF_LIFE_H)
    return walk_HT


def draw_taste_drift(rng: np.random.Generator, config: SimulationConfig) -> F16:
    """Returns the drift of each viewer's taste for each topic at the start of each day, ``[D + 1, V, T]``.

    The last row is the end of the last day. Half precision keeps the array small, with an error far below the drift
    of an hour.
    """
    walk_DVT = np.empty((_days(config) + 1, config.viewers, TOPICS), dtype=np.float16)
    _walk(rng, walk_DVT, constants.TASTE_DRIFT, constants.TASTE_DRIFT_HALF_LIFE_D)
    return walk_DVT


def largest_step(std: float, half_life: float) -> float:
    """Returns the bound of a step of a drift with this standard deviation and half-life in steps."""
    keep = math.pow(0.5, 1.0 / half_life)
    return std * (constants.DRIFT_BOUND * (1.0 - keep) + math.sqrt(3.0 * (1.0 - keep**2)))


def _days(config: SimulationConfig) -> int:
    return config.days + constants.LIVE_DAYS


def _walk(rng: np.random.Generator, walk: NDArray[np.floating], std: float, half_life: float) -> None:
    """Fills ``walk`` along axis 0 with a stationary first-order autoregression.

    Its innovations are uniform, so that every step is bounded.
    """
    keep = 0.5 ** (1.0 / half_life)
    reach, bound = math.sqrt(3.0) * std, constants.DRIFT_BOUND * std
    now = reach * (2.0 * rng.random(walk.shape[1:], dtype=np.float32) - 1.0)
    walk[0] = now
    for step in range(1, len(walk)):
        now *= keep
        now += reach * math.sqrt(1.0 - keep**2) * (2.0 * rng.random(walk.shape[1:], dtype=np.float32) - 1.0)
        np.clip(now, -bound, bound, out=now)
        walk[step] = now
