"""Simulated world: the probability that a viewer enjoys a video at a given time. All reactions derive from it.

Configuration and seed determine a world, including uploads, trends and drifting tastes until ``LIVE_DAYS`` after the
end of the log. Responses change no state except the viewers' ``ViewingHistory``, so live traffic, the log and
closed-loop evaluation can share a world. ``world_constants`` has all constants.

``logit P(enjoy) = topic match + style match + quality + trend + freshness - foreign language - length - boredom
- satiation``
"""

# Shapes: B requests, S slate, V viewers, M videos, T topics, K = topics and style, H hours, D days,
# L levels of satiation

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.pipelines.datasets.columns import list_column, time_column
from reelway.pipelines.simulation import world_constants as constants
from reelway.pipelines.simulation.config import DAY_S, SimulationConfig
from reelway.pipelines.simulation.drift import draw_taste_drift, draw_topic_drift, draw_trends
from reelway.pipelines.simulation.population import (
    LANGUAGES,
    NO_LANGUAGE,
    REGIONS,
    SEGMENTS,
    draw_creators,
    draw_topic_shares,
    draw_videos,
    draw_viewers,
)
from reelway.pipelines.simulation.responses import Responses, attention, draw_responses
from reelway.pipelines.simulation.satiation import ViewingHistory
from reelway.platform.contracts.events import CREATORS, VIDEOS, VIEWERS
from reelway.platform.errors import DataError

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

PAD: Final = -1


class World:
    """Viewers, creators, videos and trends of one seed. Viewer, creator and video ids are 1..count."""

    def __init__(self, config: SimulationConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        rng = np.random.default_rng(np.random.SeedSequence([seed, 0]))
        shares = draw_topic_shares(rng)
        self.viewers = draw_viewers(rng, config, shares)
        self.creators = draw_creators(rng, config, shares)
        self.videos = draw_videos(rng, config, self.creators, shares)
        self.trend_HT = draw_trends(rng, config)
        self.topic_drift_HT = draw_topic_drift(rng, config)
        self.taste_drift_DVT = draw_taste_drift(rng, config)
        self._video_MK = np.concatenate([self.videos.topics, self.videos.style], axis=1)
        length = np.log(self.videos.duration_ms / 15_000.0)
        self._video_base_M = (
            constants.BIAS + constants.QUALITY * self.videos.quality + constants.LENGTH * length
        ).astype(np.float32)

    # Availability.

    def available_videos(self, time_s: float) -> I64:
        """Returns the ids of the videos uploaded by ``time_s``, ascending."""
        return np.arange(1, np.searchsorted(self.videos.uploaded_s, time_s, side="right") + 1, dtype=np.int64)

    def available_viewers(self, time_s: float) -> I64:
        """Returns the ids of the viewers who have an account by ``time_s``, ascending."""
        return np.flatnonzero(self.viewers.created_s <= time_s) + 1

    @cached_property
    def end_s(self) -> float:
        """End of the log and start of live traffic."""
        return self.config.end_s

    # Responses.

    def respond(
        self, viewer_ids: I64, slates: I64, time_s: F64 | float, rng: np.random.Generator, history: ViewingHistory
    ) -> Responses:
        """Draws the responses of viewers to slates and adds the exposures to ``history``.

        Args:
            viewer_ids: ``[B]``.
            slates: video ids ``[B, S]``, top first, shorter slates filled with ``PAD``.
            time_s: Unix seconds of the requests, ``[B]`` or one value for all.
            rng: the only source of randomness.
            history: what the viewers have watched so far. A viewer may have several requests.

        Raises:
            DataError: if an id does not exist in this world.
        """
        viewer_ids, slates = np.asarray(viewer_ids, dtype=np.int64), np.asarray(slates, dtype=np.int64)
        moment_s = np.broadcast_to(np.asarray(time_s, dtype=np.float64), viewer_ids.shape)
        logit_BS, present = self._logits(viewer_ids, slates, moment_s), slates != PAD
        video = np.maximum(slates - 1, 0)
        slots_LBS = history.slots(viewer_ids, video)
        chance_2BS = rng.random((2, *slates.shape), dtype=np.float32)
        enjoy_BS, examined, enjoyed = np.empty_like(logit_BS), np.empty_like(present), np.empty_like(present)
        for rows in _turns(viewer_ids, moment_s):
            slots, at_s = slots_LBS[:, rows], moment_s[rows]
            enjoy_BS[rows] = _probability(logit_BS[rows] - history.penalty(slots, at_s))
            examined[rows], enjoyed[rows] = attention(chance_2BS[:, rows], present[rows], enjoy_BS[rows])
            history.add(slots, at_s, examined=examined[rows], enjoyed=enjoyed[rows])
        return draw_responses(
            rng,
            present=present,
            examined=examined,
            enjoyed=enjoyed,
            enjoy_probability=enjoy_BS,
            duration_ms=self.videos.duration_ms[video].astype(np.float32),
            quality=self.videos.quality[video],
            reactivity=self.viewers.reactivity[viewer_ids - 1],
        )

    def enjoyment(self, viewer_ids: I64, slates: I64, time_s: F64, history: ViewingHistory | None = None) -> F32:
        """Returns the probability that each viewer enjoys each video if it is examined, ``[B, S]``; 0 for pads.

        The probability is 0 for a video that is not uploaded yet or occurs earlier in the slate. Without ``history``,
        the viewers have watched nothing before.
        """
        logit_BS = self._logits(viewer_ids, slates, time_s)
        if history is not None:
            logit_BS -= history.penalty(history.slots(viewer_ids, np.maximum(slates - 1, 0)), time_s)
        return _probability(logit_BS)

    def _logits(self, viewer_ids: I64, slates: I64, time_s: F64) -> F32:
        """Returns the logits of ``enjoyment`` without satiation; minus infinity where the probability is 0."""
        self._check_ids(viewer_ids, slates)
        video = np.maximum(slates - 1, 0)
        logit_BS: F32 = np.matmul(self._video_MK[video], self.viewer_vectors(viewer_ids, time_s)[:, :, None])[:, :, 0]
        logit_BS += self._video_base_M[video]
        logit_BS += self._foreign(viewer_ids, self.videos.language[video])
        age_s = (time_s[:, None] - self.videos.uploaded_s[video]).astype(np.float32)
        logit_BS += _age_effect(age_s)
        topic = self.videos.topic[video]
        blocked = (slates == PAD) | (age_s < 0)
        for s in range(1, slates.shape[1]):
            logit_BS[:, s] += constants.BOREDOM * (topic[:, :s] == topic[:, s : s + 1]).sum(axis=1)
            blocked[:, s] |= (slates[:, :s] == slates[:, s : s + 1]).any(axis=1)
        logit_BS[blocked] = -np.inf
        return logit_BS

    def enjoyment_of_all(self, viewer_ids: I64, time_s: float) -> F32:
        """Returns the probability for every video in the first position, ``[B, M]``, for the oracle policy.

        Satiation is not included.
        """
        self._check_ids(viewer_ids, np.zeros((0, 1), dtype=np.int64))
        moment_s = np.full(len(viewer_ids), time_s)
        logit_BM = self.viewer_vectors(viewer_ids, moment_s) @ self._video_MK.T + self._video_base_M
        logit_BM += self._foreign(viewer_ids, np.broadcast_to(self.videos.language, logit_BM.shape))
        age_s = (time_s - self.videos.uploaded_s).astype(np.float32)
        logit_BM += _age_effect(age_s)
        logit_BM[:, age_s < 0] = -np.inf
        return _probability(logit_BM)

    def viewer_vectors(self, viewer_ids: I64, time_s: F64) -> F32:
        """Returns the viewers' topic taste and style at a time, ``[B, K]``, to be multiplied with those of videos."""
        viewer = viewer_ids - 1
        past = (self.viewers.drift_at_s[viewer] - time_s) / constants.TASTE_CHANGE_S
        late_B1 = (1.0 / (1.0 + np.exp(np.clip(past, -30, 30))))[:, None].astype(np.float32)
        early_BT, late_BT = self.viewers.early_taste[viewer], self.viewers.late_taste[viewer]
        taste_BT = early_BT + late_B1 * (late_BT - early_BT) + self._taste_drift(viewer, time_s)
        hour = ((time_s - self.config.start_s) / 3600.0).astype(np.int64).clip(0, len(self.trend_HT) - 1)
        taste_BT = constants.TOPIC * taste_BT + self.trend_HT[hour] + self.topic_drift_HT[hour]
        return np.concatenate([taste_BT, constants.STYLE * self.viewers.style[viewer]], axis=1)

    def _taste_drift(self, viewer: I64, time_s: F64) -> F32:
        """Returns the drift of tastes ``[B, T]``, linear within a day."""
        day = ((time_s - self.config.start_s) / DAY_S).clip(0, len(self.taste_drift_DVT) - 1.001)
        first = day.astype(np.int64)
        share_B1 = (day - first).astype(np.float32)[:, None]
        start_BT, end_BT = (self.taste_drift_DVT[d, viewer].astype(np.float32) for d in (first, first + 1))
        drift_BT: F32 = start_BT + share_B1 * (end_BT - start_BT)
        return drift_BT

    def _foreign(self, viewer_ids: I64, language: NDArray[np.int32]) -> F32:
        viewer = viewer_ids - 1
        first, second = self.viewers.language[viewer][:, None], self.viewers.second_language[viewer][:, None]
        foreign = (language != NO_LANGUAGE) & (language != first) & (language != second)
        penalty: F32 = np.float32(constants.FOREIGN) * foreign
        return penalty

    def _check_ids(self, viewer_ids: I64, slates: I64) -> None:
        for name, ids, count, least in (
            ("viewer", viewer_ids, self.config.viewers, 1),
            ("video", slates[slates != PAD], len(self.videos.topic), 1),
        ):
            if len(ids) and (ids.min() < least or ids.max() > count):
                unknown = ids[(ids < least) | (ids > count)][0]
                raise DataError(f"simulation: {name} id {unknown} is not in this world, expected 1..{count}")

    # Tables in the event schema.

    def viewers_table(self) -> pa.Table:
        """Returns all viewers in the schema ``VIEWERS``."""
        return pa.table(
            {
                "viewer_id": np.arange(1, self.config.viewers + 1),
                "created_at": _seconds(self.viewers.created_s),
                "region": _string_column(self.viewers.region, REGIONS),
                "language": _string_column(self.viewers.language, LANGUAGES),
                "segment": _string_column(self.viewers.segment, SEGMENTS),
            },
            schema=VIEWERS,
        )

    def creators_table(self) -> pa.Table:
        """Returns all creators in the schema ``CREATORS``."""
        return pa.table(
            {
                "creator_id": np.arange(1, self.config.creators + 1),
                "created_at": _seconds(self.creators.created_s),
                "followers": self.creators.followers,
            },
            schema=CREATORS,
        )

    def videos_table(self) -> pa.Table:
        """Returns the videos of the log, uploaded before its end, in the schema ``VIDEOS``."""
        return self.all_videos_table().slice(0, self.config.videos)

    def all_videos_table(self) -> pa.Table:
        """Returns all videos in the schema ``VIDEOS``, including the uploads of the ``LIVE_DAYS`` after the log."""
        videos = self.videos
        return pa.table(
            {
                "video_id": np.arange(1, len(videos.topic) + 1),
                "creator_id": videos.creator.astype(np.int64) + 1,
                "uploaded_at": _seconds(videos.uploaded_s),
                "duration_ms": videos.duration_ms,
                "topic": videos.topic,
                "language": _string_column(videos.language, LANGUAGES),
                "title": pa.array(videos.titles, pa.string()),
                "visual": list_column(videos.visual, videos.has_visual),
                "audio": list_column(videos.audio, videos.has_audio),
                "text": list_column(videos.text, videos.has_text),
            },
            schema=VIDEOS,
        )


def _probability(logit: F32) -> F32:
    probability: F32 = np.float32(1.0) / (np.float32(1.0) + np.exp(-logit))
    return probability


def _age_effect(age_s: F32) -> F32:
    """Returns the part of the logit that depends on a video's age: a bonus that fades, then a slow decline."""
    age_d = np.maximum(age_s, 0) / np.float32(DAY_S)
    fresh = np.exp2(age_d * np.float32(-DAY_S / constants.FRESH_HALF_LIFE_S))
    effect = constants.FRESH * fresh + constants.AGE * np.log1p(age_d)
    return effect.astype(np.float32, copy=False)


def _turns(viewer_ids: I64, time_s: F64) -> Iterator[I64]:
    """Yields rows in turns: the first request of each viewer, then the second of those who have one, and so on."""
    order = np.lexsort((time_s, viewer_ids))
    viewer = viewer_ids[order]
    first = np.flatnonzero(np.diff(viewer, prepend=-1))
    turn = np.arange(len(viewer)) - np.repeat(first, np.diff(np.append(first, len(viewer))))
    by_turn = order[np.argsort(turn, kind="stable")]
    yield from np.split(by_turn, np.cumsum(np.bincount(turn))[:-1])


def _seconds(time_s: F64) -> pa.Array:
    return time_column(np.rint(time_s * 1e6).astype(np.int64))


def _string_column(codes: NDArray[np.int32], names: tuple[str, ...]) -> pa.Array:
    return pa.array(names, pa.string()).take(pa.array(codes, mask=codes < 0))
