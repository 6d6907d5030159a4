"""Logging policy: a mixture of popular, topic, random and fresh videos with recorded propensities.

Positions are filled from the top, each from the same mixture without the videos above. The propensity of a position is
the probability of its video given the positions above: ``q(v) / (1 - sum of q over those above)``. The policy does not
use the viewers' tastes, only counts of past outcomes and a profile that is partly wrong.
"""

# Shapes: B requests, S slate, D draws, M videos, P profile topics

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from reelway.pipelines.simulation.population import TOPICS
from reelway.pipelines.simulation.responses import Responses
from reelway.pipelines.simulation.world import World

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

SOURCES: Final = ("popular", "topic", "explore", "fresh")
_EXTRA_DRAWS: Final = 8
_HALF_LIFE_S: Final = 1.5 * 86_400.0
_PRIOR_COUNT: Final = 1.5
_POWER: Final = 0.9


@dataclass(frozen=True)
class _Period:
    """State of the policy during one period: distributions over the ``n`` available videos."""

    available: int
    popular: F64  # [n] sums to 1
    popular_until: F64  # [n] cumulative
    by_topic: I64  # [n] video rows grouped by topic
    by_topic_until: F64  # [n] cumulative popularity in that order
    topic_end: F64  # [T] cumulative popularity at the end of each topic
    topic_mass: F64  # [T]
    fresh_from: int  # videos from this row on are fresh


class LoggingPolicy:
    """Chooses slates and counts popularity."""

    def __init__(self, world: World) -> None:
        config = world.config
        self._world = world
        self._counts = np.zeros(config.videos)
        self._shares = np.array([config.popular_share, config.topic_share, config.explore_share, config.fresh_share])

    def begin_period(self, time_s: float) -> None:
        """Updates the available videos and their popularity."""
        world = self._world
        self._counts *= 0.5 ** (world.config.policy_period_s / _HALF_LIFE_S)
        n = len(world.available_videos(time_s))
        popular = (self._counts[:n] + _PRIOR_COUNT) ** _POWER
        popular /= popular.sum()
        topic = world.videos.topic[:n]
        by_topic = np.argsort(topic, kind="stable")
        mass = np.bincount(topic, weights=popular, minlength=TOPICS).astype(np.float64)
        fresh_from = int(np.searchsorted(world.videos.uploaded_s[:n], time_s - world.config.fresh_s))
        self._period = _Period(
            n, popular, np.cumsum(popular), by_topic, np.cumsum(popular[by_topic]), np.cumsum(mass), mass, fresh_from
        )  # fmt: skip

    def choose(self, viewer_ids: I64, rng: np.random.Generator) -> tuple[I64, F32, NDArray[np.int8]]:
        """Returns slates (video ids), propensities and codes into ``SOURCES``, ``[B, S]`` each."""
        slate = self._world.config.slate
        shares_BC, profile_BP = self._shares_of(viewer_ids)
        video_BD, source_BD = self._draw(viewer_ids, shares_BC, profile_BP, rng)
        while True:
            new_BD = _first_occurrences(video_BD)
            short = np.flatnonzero(new_BD.sum(axis=1) < slate)
            if not len(short):
                break
            more, more_source = self._draw(viewer_ids, shares_BC, profile_BP, rng)  # for all rows, for simplicity
            video_BD = np.concatenate([video_BD, more], axis=1)
            source_BD = np.concatenate([source_BD, more_source], axis=1)
        first_new = np.argsort(~new_BD, axis=1, kind="stable")[:, :slate]
        video_BS = np.take_along_axis(video_BD, first_new, axis=1)
        q_BS = self._probability(viewer_ids, video_BS, shares_BC, profile_BP)
        above_BS = np.cumsum(q_BS, axis=1) - q_BS
        propensity = np.clip(q_BS / np.maximum(1.0 - above_BS, 1e-9), 1e-9, 1.0).astype(np.float32)
        return video_BS + 1, propensity, np.take_along_axis(source_BD, first_new, axis=1)

    def learn(self, slates: I64, responses: Responses) -> None:
        """Counts enjoyed videos; a like counts once more."""
        weight = responses.enjoyed.astype(np.float64) + responses.like
        self._counts += np.bincount(slates.ravel() - 1, weights=weight.ravel(), minlength=len(self._counts))

    def _shares_of(self, viewer_ids: I64) -> tuple[F64, F64]:
        """Returns shares of sources ``[B, 4]`` and profile topics ``[B, P]``; popular gets empty shares."""
        period, viewers = self._period, self._world.viewers
        topics_BP = viewers.profile_topics[viewer_ids - 1]
        profile_BP = viewers.profile_weights[viewer_ids - 1] * (period.topic_mass[topics_BP] > 0)
        total_B1 = profile_BP.sum(axis=1, keepdims=True)
        profile_BP = profile_BP / np.maximum(total_B1, 1e-12)
        shares_BC = np.broadcast_to(self._shares, (len(viewer_ids), 4)).copy()
        shares_BC[total_B1[:, 0] <= 0, 1] = 0.0
        if period.fresh_from >= period.available:
            shares_BC[:, 3] = 0.0
        shares_BC[:, 0] = 1.0 - shares_BC[:, 1:].sum(axis=1)
        return shares_BC, profile_BP

    def _draw(
        self, viewer_ids: I64, shares_BC: F64, profile_BP: F64, rng: np.random.Generator
    ) -> tuple[I64, NDArray[np.int8]]:
        """Draws independently from the mixture; returns video rows and sources ``[B, D]``."""
        period, shape = self._period, (len(viewer_ids), self._world.config.slate + _EXTRA_DRAWS)
        which = rng.random(shape)
        until_BC = np.cumsum(shares_BC, axis=1)
        source = np.zeros(shape, dtype=np.int8)
        for c in range(3):
            source += which >= until_BC[:, c : c + 1]
        u, video = rng.random(shape), np.empty(shape, dtype=np.int64)
        last = period.available - 1
        rows = source == 0
        video[rows] = np.minimum(np.searchsorted(period.popular_until, u[rows], side="right"), last)
        rows = source == 2
        video[rows] = (u[rows] * period.available).astype(np.int64)
        rows = source == 3
        video[rows] = period.fresh_from + (u[rows] * (period.available - period.fresh_from)).astype(np.int64)

        row, column = np.nonzero(source == 1)
        slot = (rng.random(len(row))[:, None] >= np.cumsum(profile_BP, axis=1)[row, :-1]).sum(axis=1)
        # Rounding can select a profile topic of weight 0; use the first topic with a positive weight instead.
        slot = np.where(profile_BP[row, slot] > 0, slot, np.argmax(profile_BP[row] > 0, axis=1))
        topic = self._world.viewers.profile_topics[viewer_ids[row] - 1, slot]
        target = period.topic_end[topic] - period.topic_mass[topic] * (1.0 - u[row, column])
        index = np.minimum(np.searchsorted(period.by_topic_until, target, side="right"), last)
        video[row, column] = period.by_topic[index]
        return video, source

    def _probability(self, viewer_ids: I64, video_BS: I64, shares_BC: F64, profile_BP: F64) -> F64:
        """Returns the mixture's probability of each video, ``[B, S]``."""
        period = self._period
        popular_BS = period.popular[video_BS]
        topic_BS = self._world.videos.topic[video_BS]
        topics_BP = self._world.viewers.profile_topics[viewer_ids - 1]
        liked_BS = np.zeros(video_BS.shape)
        for p in range(profile_BP.shape[1]):
            liked_BS += profile_BP[:, p : p + 1] * (topic_BS == topics_BP[:, p : p + 1])
        fresh_BS = (video_BS >= period.fresh_from) / max(period.available - period.fresh_from, 1)
        parts: tuple[F64 | float, ...] = (
            popular_BS,
            liked_BS * popular_BS / period.topic_mass[topic_BS],
            1.0 / period.available,
            fresh_BS,
        )
        total: F64 = np.zeros(video_BS.shape)
        for c, part in enumerate(parts):
            total += shares_BC[:, c : c + 1] * part
        return total


def _first_occurrences(values_BD: I64) -> NDArray[np.bool_]:
    """Returns whether each value does not occur to its left."""
    order = np.argsort(values_BD, axis=1, kind="stable")
    ranked = np.take_along_axis(values_BD, order, axis=1)
    first = np.ones(values_BD.shape, dtype=np.bool_)
    first[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    new = np.empty_like(first)
    np.put_along_axis(new, order, first, axis=1)
    return new
