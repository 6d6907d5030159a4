"""Simulated world: the probability that a viewer enjoys a video at a given time. All reactions derive from it.

Configuration and seed determine a world. Responses do not change its state, so live traffic, the log and closed-loop
evaluation can share a world.

``logit P(enjoy) = topic match + style match + quality + trend + freshness - foreign language - length - boredom``
"""

# Shapes: B requests, S slate, V viewers, M videos, T topics, K = topics and style

from __future__ import annotations

from functools import cached_property
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.pipelines.datasets.columns import list_column, time_column
from reelway.pipelines.simulation.config import DAY_S, SimulationConfig
from reelway.pipelines.simulation.population import (
    LANGUAGES,
    NO_LANGUAGE,
    REGIONS,
    SEGMENTS,
    TOPICS,
    draw_creators,
    draw_topic_shares,
    draw_videos,
    draw_viewers,
)
from reelway.pipelines.simulation.responses import Responses, draw_responses
from reelway.platform.contracts.events import CREATORS, VIDEOS, VIEWERS
from reelway.platform.errors import DataError

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

PAD: Final = -1
_BIAS, _TOPIC, _STYLE, _QUALITY = -2.2, 5.0, 2.0, 0.6
_FOREIGN, _LENGTH, _AGE = -2.2, -0.3, -0.25
_BOREDOM: Final = -0.25
"""Per earlier video with the same main topic in the slate."""
_DRIFT_S: Final = 1.5 * DAY_S
_TREND_STEP_S: Final = 3600.0
TREND_MARGIN_D: Final = 14
"""Days after the end of the log for which trends are drawn, for live traffic."""


class World:
    """Viewers, creators, videos and trends of one seed. Viewer, creator and video ids are 1..count."""

    def __init__(self, config: SimulationConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        rng = np.random.default_rng(np.random.SeedSequence([seed, 0]))
        shares = draw_topic_shares(rng)
        self.viewers = draw_viewers(rng, config, shares)
        self.creators = draw_creators(rng, config, shares)
        self.videos = draw_videos(rng, config, self.creators, shares)
        self._trend_HT = _trends(rng, config)
        self._video_MK = np.concatenate([self.videos.topics, self.videos.style], axis=1)
        length = np.log(self.videos.duration_ms / 15_000.0)
        self._video_base_M = (_BIAS + _QUALITY * self.videos.quality + _LENGTH * length).astype(np.float32)

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

    def respond(self, viewer_ids: I64, slates: I64, time_s: F64 | float, rng: np.random.Generator) -> Responses:
        """Draws the responses of viewers to slates.

        Args:
            viewer_ids: ``[B]``.
            slates: video ids ``[B, S]``, top first, shorter slates filled with ``PAD``.
            time_s: Unix seconds of the requests, ``[B]`` or one value for all.
            rng: the only source of randomness.

        Raises:
            DataError: if an id does not exist in this world.
        """
        viewer_ids, slates = np.asarray(viewer_ids, dtype=np.int64), np.asarray(slates, dtype=np.int64)
        moment_s = np.broadcast_to(np.asarray(time_s, dtype=np.float64), viewer_ids.shape)
        enjoy_BS = self.enjoyment(viewer_ids, slates, moment_s)
        video = np.maximum(slates - 1, 0)
        return draw_responses(
            rng,
            present=slates != PAD,
            enjoy_probability=enjoy_BS,
            duration_ms=self.videos.duration_ms[video].astype(np.float32),
            quality=self.videos.quality[video],
            reactivity=self.viewers.reactivity[viewer_ids - 1],
        )

    def enjoyment(self, viewer_ids: I64, slates: I64, time_s: F64) -> F32:
        """Returns the probability that each viewer enjoys each video if it is examined, ``[B, S]``; 0 for pads.

        The probability is 0 for a video that is not uploaded yet or occurs earlier in the slate.
        """
        self._check_ids(viewer_ids, slates)
        video = np.maximum(slates - 1, 0)
        logit_BS = np.matmul(self._video_MK[video], self.viewer_vectors(viewer_ids, time_s)[:, :, None])[:, :, 0]
        logit_BS += self._video_base_M[video]
        logit_BS += self._foreign(viewer_ids, self.videos.language[video])
        age_d = ((time_s[:, None] - self.videos.uploaded_s[video]) / DAY_S).astype(np.float32)
        logit_BS += _AGE * np.log1p(np.maximum(age_d, 0))
        topic = self.videos.topic[video]
        blocked = (slates == PAD) | (age_d < 0)
        for s in range(1, slates.shape[1]):
            logit_BS[:, s] += _BOREDOM * (topic[:, :s] == topic[:, s : s + 1]).sum(axis=1)
            blocked[:, s] |= (slates[:, :s] == slates[:, s : s + 1]).any(axis=1)
        enjoy_BS: F32 = 1.0 / (1.0 + np.exp(-logit_BS))
        enjoy_BS[blocked] = 0.0
        return enjoy_BS

    def enjoyment_of_all(self, viewer_ids: I64, time_s: float) -> F32:
        """Returns the probability for every video in the first position, ``[B, M]``, for the oracle policy."""
        self._check_ids(viewer_ids, np.zeros((0, 1), dtype=np.int64))
        moment_s = np.full(len(viewer_ids), time_s)
        logit_BM = self.viewer_vectors(viewer_ids, moment_s) @ self._video_MK.T + self._video_base_M
        logit_BM += self._foreign(viewer_ids, np.broadcast_to(self.videos.language, logit_BM.shape))
        age_d = ((time_s - self.videos.uploaded_s) / DAY_S).astype(np.float32)
        logit_BM += _AGE * np.log1p(np.maximum(age_d, 0))
        enjoy_BM: F32 = 1.0 / (1.0 + np.exp(-logit_BM))
        enjoy_BM[:, age_d < 0] = 0.0
        return enjoy_BM

    def viewer_vectors(self, viewer_ids: I64, time_s: F64) -> F32:
        """Returns the viewers' topic taste and style at a time, ``[B, K]``, to be multiplied with those of videos."""
        viewer = viewer_ids - 1
        past = (self.viewers.drift_at_s[viewer] - time_s) / _DRIFT_S
        late_B1 = (1.0 / (1.0 + np.exp(np.clip(past, -30, 30))))[:, None].astype(np.float32)
        early_BT, late_BT = self.viewers.early_taste[viewer], self.viewers.late_taste[viewer]
        hour = ((time_s - self.config.start_s) / _TREND_STEP_S).astype(np.int64).clip(0, len(self._trend_HT) - 1)
        taste_BT = _TOPIC * (early_BT + late_B1 * (late_BT - early_BT)) + self._trend_HT[hour]
        return np.concatenate([taste_BT, _STYLE * self.viewers.style[viewer]], axis=1)

    def _foreign(self, viewer_ids: I64, language: NDArray[np.int32]) -> F32:
        viewer = viewer_ids - 1
        first, second = self.viewers.language[viewer][:, None], self.viewers.second_language[viewer][:, None]
        foreign = (language != NO_LANGUAGE) & (language != first) & (language != second)
        penalty: F32 = np.float32(_FOREIGN) * foreign
        return penalty

    def _check_ids(self, viewer_ids: I64, slates: I64) -> None:
        for name, ids, count, least in (
            ("viewer", viewer_ids, self.config.viewers, 1),
            ("video", slates[slates != PAD], self.config.videos, 1),
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
        """Returns all videos, including later uploads, in the schema ``VIDEOS``."""
        videos = self.videos
        return pa.table(
            {
                "video_id": np.arange(1, self.config.videos + 1),
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


def _trends(rng: np.random.Generator, config: SimulationConfig) -> F32:
    """Returns the trend bonus of each topic at each hour, ``[H, T]``: bumps that rise and fall within a day or two."""
    hours = int((config.days + TREND_MARGIN_D) * DAY_S / _TREND_STEP_S)
    bumps = 2 * (config.days + TREND_MARGIN_D)
    at_h, width_h = rng.uniform(0, hours, bumps), rng.uniform(10, 36, bumps)
    height, topic = rng.uniform(0.4, 1.2, bumps), rng.integers(0, TOPICS, bumps)
    shape_HN = height * np.exp(-(((np.arange(hours)[:, None] - at_h) / width_h) ** 2))
    trend_HT = np.zeros((hours, TOPICS))
    np.add.at(trend_HT.T, topic, shape_HN.T)
    return np.minimum(trend_HT, 2.5).astype(np.float32)


def _seconds(time_s: F64) -> pa.Array:
    return time_column(np.rint(time_s * 1e6).astype(np.int64))


def _string_column(codes: NDArray[np.int32], names: tuple[str, ...]) -> pa.Array:
    return pa.array(names, pa.string()).take(pa.array(codes, mask=codes < 0))
