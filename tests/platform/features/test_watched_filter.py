"""Watched filters: every watched video is recognised, and few others are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reelway.platform.contracts.blend import MAX_WATCHED_DAYS
from reelway.platform.features.watched_filter import (
    FILTER_BYTES,
    HASHES,
    LIVE_GENERATIONS,
    add_to_filter,
    as_filter,
    bit_positions,
    estimated_count,
    generation_at,
    is_watched,
    live_generations,
    positions_by_filter,
)

DAY_S = 86_400.0
VIDEO_IDS = st.integers(0, 2**53 - 1)


def filters_of(*generations: np.ndarray) -> np.ndarray:
    return np.stack([as_filter(add_to_filter(b"", bit_positions(ids))) for ids in generations])


@given(st.lists(VIDEO_IDS, min_size=1, max_size=200), st.integers(0, 199))
def test_filter_recognises_every_added_video(ids: list[int], split: int) -> None:
    videos = np.array(ids, dtype=np.int64)
    bits = add_to_filter(add_to_filter(b"", bit_positions(videos[:split])), bit_positions(videos[split:]))
    assert is_watched(as_filter(bits)[None], videos).all()
    assert len(bits) == FILTER_BYTES


def test_four_full_generations_report_under_one_percent() -> None:
    """The stated rate: 1,200 videos in each live generation."""
    rng = np.random.default_rng(1)
    filters = filters_of(*(rng.integers(0, 2**53, 1_200) for _ in range(LIVE_GENERATIONS)))
    unwatched = rng.integers(0, 2**53, 200_000)
    rate = float(is_watched(filters, unwatched).mean())
    assert 0.003 < rate < 0.01
    dense = filters_of(*(np.arange(g * 1_200, (g + 1) * 1_200) for g in range(LIVE_GENERATIONS)))
    assert float(is_watched(dense, np.arange(10**6, 10**6 + 200_000)).mean()) < 0.01  # consecutive ids are no worse


def test_bit_positions_are_stable_across_versions() -> None:
    """Stored filters outlive the process: a change of the hash would forget what was watched."""
    positions = bit_positions(np.array([0, 1, 2**53 - 1]))
    assert positions.shape == (3, HASHES)
    assert (positions[:, 0] < 8 * FILTER_BYTES).all()
    assert positions[:2, :3].tolist() == STABLE


STABLE = [[3503, 13800, 7713], [7361, 2734, 14491]]


def test_estimate_is_close_to_the_number_of_videos() -> None:
    rng = np.random.default_rng(2)
    filters = filters_of(rng.integers(0, 2**53, 1_000), rng.integers(0, 2**53, 30))
    assert estimated_count(filters) == pytest.approx(1_030, rel=0.05)
    assert estimated_count(filters[:0]) == 0


@given(st.floats(0, 4e9), st.floats(0, MAX_WATCHED_DAYS * DAY_S))
def test_live_generations_cover_the_last_days(now_s: float, age_s: float) -> None:
    assert generation_at(now_s - age_s) in live_generations(now_s)
    assert len(live_generations(now_s)) == LIVE_GENERATIONS


def test_watches_are_grouped_by_viewer_and_generation() -> None:
    viewers, videos = np.array([1, 2, 1, 1]), np.array([10, 10, 11, 10])
    times_s = np.array([0.0, 0.0, 11 * DAY_S, 1.0])
    grouped = {(v, g): set(p.tolist()) for v, g, p in positions_by_filter(viewers, videos, times_s)}
    bits = {video: set(bit_positions(np.array([video]))[0].tolist()) for video in (10, 11)}
    assert grouped == {(1, 0): bits[10], (2, 0): bits[10], (1, 1): bits[11]}
