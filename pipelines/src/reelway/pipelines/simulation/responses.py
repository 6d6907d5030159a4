"""Draws viewers' responses from the probability of enjoyment, and converts them to events.

A viewer examines a slate from the top and leaves at some position, earlier if the videos disappoint. Lower positions
are therefore examined less often (position bias). A video that was not examined has no outcome.
"""

# Shapes: B requests, S slate; N = B * S impressions, E outcomes

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reelway.pipelines.datasets.columns import dictionary_column, time_column
from reelway.platform.contracts.events import IMPRESSIONS, OUTCOMES, OutcomeType

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Bools = NDArray[np.bool_]

SCROLL_MS: Final = 400.0
_CONTINUE_IF_BORED, _CONTINUE_IF_PLEASED = 0.93, 0.995
"""Probability of continuing after a video that was not enjoyed or was enjoyed."""
_SKIPPED_MS: Final = 1_900.0
"""Mean watch time of a video that was not enjoyed."""
_SKIPPED_AT_MOST, _ENJOYED_AT_LEAST = 0.65, 0.75
"""Limits of the watched ratio of a video that was not enjoyed or was enjoyed."""
ENJOYED_RATIO: Final = 0.7
"""A watched ratio from here on means that the video was enjoyed."""
FLAGS: Final = ("like", "share", "save", "follow", "comment", "skip", "not_interested", "report")


@dataclass(frozen=True)
class Responses:
    """Responses to each position of each slate, ``[B, S]``. Without ``examined`` there is no response."""

    present: Bools  # not a pad
    examined: Bools
    enjoyed: Bools
    watch_ms: F32
    shown_ms: F32  # after the request
    like: Bools
    share: Bools
    save: Bools
    follow: Bools
    comment: Bools
    skip: Bools
    not_interested: Bools
    report: Bools

    @property
    def watch_s_per_impression(self) -> float:
        """Mean watched seconds over all positions with a video, examined or not."""
        return float(self.watch_ms.sum(dtype=np.float64) / 1000.0 / max(int(self.present.sum()), 1))


def expected_watch_ms(enjoy_probability: F32, duration_ms: F32) -> F32:
    """Returns the mean of ``watch_ms`` if the video is examined, consistent with ``draw_responses``."""
    bored: F32 = np.minimum(np.float32(_SKIPPED_MS), 0.5 * duration_ms)
    mean: F32 = enjoy_probability * 0.95 * duration_ms + (1 - enjoy_probability) * bored
    return mean


def attention(chance_2BS: F32, present: Bools, enjoy_probability: F32) -> tuple[Bools, Bools]:
    """Returns which positions are examined and which of them are enjoyed, ``[B, S]``, from uniform draws."""
    enjoy_chance, stay_chance = chance_2BS
    enjoyed = enjoy_chance < enjoy_probability
    stay = stay_chance < np.where(enjoyed, np.float32(_CONTINUE_IF_PLEASED), np.float32(_CONTINUE_IF_BORED))
    examined = present.copy()
    examined[:, 1:] &= np.logical_and.accumulate(stay, axis=1)[:, :-1]
    return examined, enjoyed & examined


def draw_responses(
    rng: np.random.Generator,
    *,
    present: Bools,
    examined: Bools,
    enjoyed: Bools,
    enjoy_probability: F32,
    duration_ms: F32,
    quality: F32,
    reactivity: F32,
) -> Responses:
    """Draws the responses that follow from ``attention``. Shapes ``[B, S]``, ``reactivity`` ``[B]``."""

    def chance() -> F32:
        return rng.random(enjoy_probability.shape, dtype=np.float32)

    ratio = _ENJOYED_AT_LEAST + 0.4 * chance()  # beyond 1 the video loops
    bored_ms = np.minimum(
        rng.standard_exponential(enjoy_probability.shape, dtype=np.float32) * _SKIPPED_MS,
        _SKIPPED_AT_MOST * duration_ms,
    )
    watch_ms: F32 = np.where(enjoyed, ratio * duration_ms, np.maximum(bored_ms, 150.0)).astype(np.float32)
    watch_ms[~examined] = 0.0
    spent_ms = np.where(examined, watch_ms + np.float32(SCROLL_MS), np.float32(1.0))
    shown_ms = np.zeros_like(watch_ms)
    np.cumsum(spent_ms[:, :-1], axis=1, out=shown_ms[:, 1:])

    bored = examined & ~enjoyed
    rate = reactivity[:, None] * (0.3 + 0.7 * enjoy_probability)
    disgust = np.float32(1.0) - enjoy_probability
    return Responses(
        present=present,
        examined=examined,
        enjoyed=enjoyed,
        watch_ms=watch_ms,
        shown_ms=shown_ms,
        like=enjoyed & (chance() < 0.4 * rate),
        share=enjoyed & (chance() < 0.08 * rate),
        save=enjoyed & (chance() < 0.1 * rate),
        follow=enjoyed & (chance() < 0.06 * rate * (1.0 + 0.5 * np.clip(quality, -1, 2))),
        comment=enjoyed & (chance() < 0.07 * rate),
        skip=bored & (watch_ms < np.minimum(3_000.0, 0.4 * duration_ms)),
        not_interested=bored & (chance() < 0.04 * disgust**4),
        report=bored & (chance() < 0.003 * disgust**4 * np.exp(-0.7 * quality)),
    )


@dataclass(frozen=True)
class ShownSlates:
    """Requests and their slates, for the event tables. ``[B]`` or ``[B, S]``."""

    request_id: I64  # [B]
    viewer_ids: I64  # [B]
    slates: I64  # [B, S]
    time_s: F64  # [B]
    propensity: F32  # [B, S]
    source: NDArray[np.integer[Any]]  # [B, S] codes into sources
    sources: Sequence[str]
    device: NDArray[np.integer[Any]]  # [B] codes into devices
    devices: Sequence[str]
    release: str = "simulated"
    arm: str = "stable"


def responses_to_events(
    shown: ShownSlates, responses: Responses, *, first_impression_id: int = 0, first_outcome_id: int = 0
) -> tuple[pa.Table, pa.Table]:
    """Returns the impressions and outcomes tables, each sorted by time, then id. Pads have no row."""
    row, position = np.nonzero(responses.present)
    request_us = np.rint(shown.time_s * 1e6).astype(np.int64)
    shown_us = request_us[row] + (responses.shown_ms[row, position].astype(np.float64) * 1000).astype(np.int64)
    impression_id = np.arange(first_impression_id, first_impression_id + len(row), dtype=np.int64)
    order = np.argsort(shown_us, kind="stable")
    row, position, shown_us, impression_id = row[order], position[order], shown_us[order], impression_id[order]
    viewer, video = shown.viewer_ids[row], shown.slates[row, position]
    zeros = np.zeros(len(row), dtype=np.int32)
    impressions = {
        "impression_id": impression_id,
        "request_id": shown.request_id[row],
        "viewer_id": viewer,
        "video_id": video,
        "position": position.astype(np.int16),
        "event_time": time_column(shown_us),
        "release": dictionary_column(zeros, [shown.release]),
        "arm": dictionary_column(zeros, [shown.arm]),
        "source": dictionary_column(shown.source[row, position], shown.sources),
        "propensity": shown.propensity[row, position],
        "device": dictionary_column(shown.device[row], shown.devices),
    }
    watch_ms = responses.watch_ms[row, position]
    flags = [getattr(responses, name)[row, position] for name in FLAGS]
    outcomes = _outcomes(impression_id, viewer, video, shown_us, watch_ms,
                         responses.examined[row, position], flags, first_outcome_id)  # fmt: skip
    return pa.table(impressions, schema=IMPRESSIONS), outcomes


def _outcomes(
    impression_id: I64,
    viewer: I64,
    video: I64,
    shown_us: I64,
    watch_ms: F32,
    examined: Bools,
    flags: Sequence[Bools],
    first_id: int,
) -> pa.Table:
    """Returns a watch outcome per examined video at its end, and a row per flag shortly after; inputs ``[N]``."""
    hits = [np.flatnonzero(examined), *(np.flatnonzero(flag) for flag in flags)]
    kind = np.repeat(np.arange(len(hits), dtype=np.int32), [len(hit) for hit in hits])
    row = np.concatenate(hits)
    end_us = shown_us + 1000 + (watch_ms.astype(np.float64) * 1000).astype(np.int64)
    at_us = end_us[row] + 1000 * kind
    order = np.argsort(at_us, kind="stable")
    row, kind, at_us = row[order], kind[order], at_us[order]
    return pa.table(
        {
            "outcome_id": np.arange(first_id, first_id + len(row), dtype=np.int64),
            "impression_id": impression_id[row],
            "viewer_id": viewer[row],
            "video_id": video[row],
            "type": dictionary_column(kind, [OutcomeType.WATCH.value, *FLAGS]),
            "value": np.where(kind == 0, watch_ms[row], np.float32(1.0)).astype(np.float32),
            "event_time": time_column(at_us),
        },
        schema=OUTCOMES,
    )
