"""Draws the viewers, creators and videos of a world: their constant properties."""

# Shapes: V viewers, C creators, M videos, T topics, S style, K = T + S

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from reelway.pipelines.simulation.config import DAY_S, SimulationConfig
from reelway.pipelines.simulation.world_constants import LIVE_DAYS, UPLOAD_CYCLE, UPLOAD_PEAK_H
from reelway.platform.contracts.feature_dimensions import FeatureDimensions

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I32 = NDArray[np.int32]
Bools = NDArray[np.bool_]
Generator = np.random.Generator

VISUAL_DIM: Final = 32
AUDIO_DIM: Final = 16
TEXT_DIM: Final = 32
STYLE_DIM: Final = 8
LANGUAGES: Final = ("en", "es", "de", "hi")
_LANGUAGE_SHARES: Final = np.array([0.5, 0.22, 0.14, 0.14])
REGIONS: Final = ("americas", "europe", "asia")
REGION_OFFSET_H: Final = np.array([-6.0, 1.0, 6.0])
_REGION_BY_LANGUAGE: Final = np.array([[0.6, 0.25, 0.15], [0.7, 0.3, 0.0], [0.0, 1.0, 0.0], [0.05, 0.1, 0.85]])
SEGMENTS: Final = ("13-17", "18-24", "25-34", "35-49", "50+")
_SEGMENT_SHARES: Final = np.array([0.15, 0.3, 0.27, 0.18, 0.1])
TOPIC_NAMES: Final = (
    "ramen", "street food", "baking", "football", "basketball", "yoga", "running", "makeup", "street style", "magic",
    "stand-up", "pranks", "puppies", "kittens", "wildlife", "gardening", "woodwork", "home decor", "chess", "speedrun",
    "retro games", "guitar", "drums", "choir", "ballet", "hip-hop dance", "travel", "vans", "space", "chemistry",
    "history", "languages",
)  # fmt: skip
_TITLE_WORDS: Final = ("easy", "wild", "tiny", "late-night", "perfect", "first", "secret", "slow", "epic", "honest")
NO_LANGUAGE: Final = -1
_OWN_TOPICS = 4
_DISLIKES = 4
TOPICS: Final = len(TOPIC_NAMES)
DIMENSIONS: Final = FeatureDimensions(visual=VISUAL_DIM, audio=AUDIO_DIM, text=TEXT_DIM, topics=TOPICS)
"""The schema of simulated data sets."""


@dataclass(frozen=True)
class Viewers:
    """Properties of the viewers. Row i is viewer id i + 1."""

    created_s: F64  # [V]
    language: I32  # [V]
    second_language: I32  # [V] NO_LANGUAGE if none
    region: I32  # [V]
    segment: I32  # [V]
    activity: F64  # [V] relative number of sessions per day
    early_taste: F32  # [V, T] about 1 for a loved topic, negative for a disliked one
    late_taste: F32  # [V, T]
    drift_at_s: F64  # [V] time at which late taste weighs as much as early taste
    style: F32  # [V, S] unit norm
    reactivity: F32  # [V] factor of the rates of likes, shares and similar outcomes
    profile_topics: I32  # [V, P] topics in the logging policy's profile; partly wrong
    profile_weights: F32  # [V, P]


@dataclass(frozen=True)
class Creators:
    """Properties of the creators. Row i is creator id i + 1."""

    created_s: F64  # [C]
    followers: NDArray[np.int64]  # [C]
    quality: F32  # [C]
    topics: I32  # [C, 2]
    style: F32  # [C, S]
    language: I32  # [C]
    productivity: F64  # [C]


@dataclass(frozen=True)
class Videos:
    """Properties of the videos. Row i is video id i + 1; rows are sorted by upload time."""

    uploaded_s: F64  # [M]
    creator: I32  # [M] row of creators
    duration_ms: I32  # [M]
    topic: I32  # [M] the main one
    topics: F32  # [M, T]
    style: F32  # [M, S]
    quality: F32  # [M] about standard normal
    language: I32  # [M] NO_LANGUAGE for videos without speech
    titles: list[str]
    visual: F32  # [M, VISUAL_DIM]
    audio: F32
    text: F32
    has_visual: Bools  # [M]
    has_audio: Bools
    has_text: Bools


def _unit(values: F32 | F64) -> F32:
    norm = np.linalg.norm(values, axis=-1, keepdims=True)
    scaled: F32 = (values / np.maximum(norm, 1e-12)).astype(np.float32)
    return scaled


def _choice(rng: Generator, shares: F64, size: int) -> I32:
    picked: I32 = np.searchsorted(np.cumsum(shares / shares.sum()), rng.random(size), side="right").astype(np.int32)
    return np.minimum(picked, len(shares) - 1)


def _arrivals(rng: Generator, size: int, at_start: float, config: SimulationConfig, before_d: float) -> F64:
    early = rng.random(size) < at_start
    past_s = config.start_s - rng.exponential(before_d / 3, size).clip(0.01, before_d) * DAY_S
    during_s = config.start_s + rng.random(size) * (config.end_s - config.start_s)
    times: F64 = np.floor(np.where(early, past_s, during_s))
    return times


def _draw_upload_times(rng: Generator, config: SimulationConfig) -> F64:
    """Draws ``config.videos`` uploads before the end of the log and their continuation at the same rate, sorted."""
    before = _arrivals(rng, config.videos, config.videos_at_start_ratio, config, 30.0)
    during = before >= config.start_s
    before[during] = _daily_cycle_times(rng, int(during.sum()), config.start_s, config.days)
    per_day = config.videos * (1.0 - config.videos_at_start_ratio) / config.days
    later = _daily_cycle_times(rng, int(rng.poisson(per_day * LIVE_DAYS)), config.end_s, LIVE_DAYS)
    return np.sort(np.concatenate([before, np.maximum(later, config.end_s + 1.0)]))


def _daily_cycle_times(rng: Generator, size: int, from_s: float, days: int) -> F64:
    """Draws independent times within whole days from ``from_s`` on, in whole seconds, with the uploads' daily cycle."""
    at_h = np.linspace(0.0, 24.0, 24 * 60 + 1)
    hour = from_s / 3600.0 + at_h
    density = 1.0 + UPLOAD_CYCLE * np.cos((hour - UPLOAD_PEAK_H) / 24.0 * 2 * np.pi)
    until = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]))])
    times: F64 = rng.integers(0, days, size) * DAY_S + 3600.0 * np.interp(rng.random(size) * until[-1], until, at_h)
    return np.floor(from_s + times)


def draw_topic_shares(rng: Generator) -> F64:
    weights = 1.0 / (np.arange(TOPICS) + 10.0)
    shares: F64 = rng.permutation(weights / weights.sum())
    return shares


def _taste(rng: Generator, size: int, shares: F64) -> F32:
    """Draws a few liked topics with decreasing weights and a few disliked topics."""
    order = np.argsort(-(np.log(shares) + rng.gumbel(size=(size, TOPICS))), axis=1)
    taste = np.zeros((size, TOPICS), dtype=np.float32)
    loved = np.sort(rng.uniform(0.25, 1.0, (size, _OWN_TOPICS)), axis=1)[:, ::-1]
    loved[:, 0] = 1.0
    np.put_along_axis(taste, order[:, :_OWN_TOPICS], loved.astype(np.float32), axis=1)
    disliked = rng.uniform(-0.6, -0.1, (size, _DISLIKES)).astype(np.float32)
    np.put_along_axis(taste, order[:, -_DISLIKES:], disliked, axis=1)
    return taste


def draw_viewers(rng: Generator, config: SimulationConfig, shares: F64) -> Viewers:
    """Draws ``config.viewers`` viewers."""
    size = config.viewers
    language = _choice(rng, _LANGUAGE_SHARES, size)
    region_at = np.cumsum(_REGION_BY_LANGUAGE[language], axis=1)
    early, late = _taste(rng, size, shares), _taste(rng, size, shares)
    late = (0.5 * early + 0.5 * late).astype(np.float32)
    late /= late.max(axis=1, keepdims=True)
    believed = early + rng.normal(0, 0.35, early.shape).astype(np.float32)
    profile = np.argsort(-believed, axis=1)[:, :_OWN_TOPICS].astype(np.int32)
    weights = rng.dirichlet(np.full(_OWN_TOPICS, 2.0), size).astype(np.float32)
    span_s = config.end_s - config.start_s
    return Viewers(
        created_s=_arrivals(rng, size, config.viewers_at_start_ratio, config, 120.0),
        language=language,
        second_language=np.where(rng.random(size) < 0.45, 0, NO_LANGUAGE).astype(np.int32),
        region=(rng.random(size)[:, None] > region_at).sum(axis=1).clip(max=len(REGIONS) - 1).astype(np.int32),
        segment=_choice(rng, _SEGMENT_SHARES, size),
        activity=rng.lognormal(0.0, 0.6, size),
        early_taste=early,
        late_taste=late,
        drift_at_s=config.start_s + rng.uniform(-0.5, 1.5, size) * span_s,
        style=_unit(rng.normal(size=(size, STYLE_DIM))),
        reactivity=rng.lognormal(-0.1, 0.45, size).astype(np.float32),
        profile_topics=profile,
        profile_weights=weights,
    )


def draw_creators(rng: Generator, config: SimulationConfig, shares: F64) -> Creators:
    """Draws ``config.creators`` creators."""
    size = config.creators
    quality = rng.normal(0, 0.7, size)
    return Creators(
        created_s=np.floor(config.start_s - rng.uniform(130, 700, size) * DAY_S),
        followers=rng.lognormal(4.5 + 0.8 * quality, 1.3).astype(np.int64),
        quality=quality.astype(np.float32),
        topics=np.stack([_choice(rng, shares, size), _choice(rng, shares, size)], axis=1),
        style=_unit(rng.normal(size=(size, STYLE_DIM))),
        language=_choice(rng, _LANGUAGE_SHARES, size),
        productivity=rng.lognormal(0.0, 1.0, size),
    )


def draw_videos(rng: Generator, config: SimulationConfig, creators: Creators, shares: F64) -> Videos:
    """Draws ``config.videos`` videos that are uploaded before the end of the log, then those of the days after it."""
    uploaded_s = _draw_upload_times(rng, config)
    size = len(uploaded_s)
    creator = _choice(rng, creators.productivity, size)
    creator_topic = creators.topics[creator, (rng.random(size) < 0.3).astype(np.int64)]
    topic = np.where(rng.random(size) < 0.12, _choice(rng, shares, size), creator_topic).astype(np.int32)
    side_topic = _choice(rng, shares, size)
    rows = np.arange(size)
    topics = np.zeros((size, TOPICS), dtype=np.float32)
    topics[rows, side_topic] = rng.uniform(0.0, 0.4, size)
    topics[rows, topic] = rng.uniform(0.8, 1.0, size)
    style = _unit(creators.style[creator] + rng.normal(0, 0.3, (size, STYLE_DIM)))
    word = rng.integers(0, len(_TITLE_WORDS), size)
    speechless = rng.random(size) < 0.25
    language = np.where(speechless, NO_LANGUAGE, creators.language[creator]).astype(np.int32)
    return Videos(
        uploaded_s=uploaded_s,
        creator=creator,
        duration_ms=(1000 * rng.lognormal(np.log(15.0), 0.35, size).clip(5, 60)).astype(np.int32),
        topic=topic,
        topics=topics,
        style=style,
        quality=(creators.quality[creator] + rng.normal(0, 0.7, size)).astype(np.float32),
        language=language,
        titles=[f"{_TITLE_WORDS[w]} {TOPIC_NAMES[t]} #{i + 1}" for i, w, t in zip(rows, word, topic, strict=True)],
        **_embeddings(rng, config, topics, style),
    )


def _embeddings(rng: Generator, config: SimulationConfig, topics: F32, style: F32) -> dict[str, Any]:
    """Draws embeddings: random linear maps of topics and style with noise. Some are poor, some are missing."""
    size = len(topics)
    embeddings: dict[str, Any] = {}
    for name, width, topic_weight, style_weight, missing in (
        ("visual", VISUAL_DIM, 1.0, 0.8, config.missing_visual_ratio),
        ("audio", AUDIO_DIM, 0.5, 1.0, config.missing_audio_ratio),
        ("text", TEXT_DIM, 1.2, 0.3, config.missing_text_ratio),
    ):
        content = np.concatenate([topic_weight * topics, style_weight * style], axis=1)
        clean = _unit(content @ rng.normal(size=(content.shape[1], width)))
        noise = _unit(rng.normal(size=(size, width)))
        share = np.where(rng.random(size) < config.poor_embedding_ratio, 2.0, 0.35)[:, None]
        embeddings[name] = _unit(clean + share * noise)
        embeddings[f"has_{name}"] = rng.random(size) >= missing
    return embeddings
