"""Blending by quota: properties for arbitrary sources, and typical cases."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reelway.serving.stages.blending import blend, whole_quotas


@st.composite
def proposals(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows and source of each proposal, and a quota per source; proposals may repeat within and between sources."""
    per_source = draw(st.lists(st.lists(st.integers(0, 40), max_size=40), min_size=1, max_size=5))
    quotas = draw(st.lists(st.integers(0, 20), min_size=len(per_source), max_size=len(per_source)))
    rows = np.array([row for one in per_source for row in one], dtype=np.int32)
    source = np.repeat(np.arange(len(per_source)), [len(one) for one in per_source])
    return rows, source, np.array(quotas, dtype=np.int64)


def blend_step_by_step(rows: np.ndarray, source: np.ndarray, quotas: np.ndarray) -> list[set[int]]:
    """Applies the blending rule proposal by proposal and returns the rows that each source gets."""
    got: list[set[int]] = [set() for _ in quotas]
    spare = 0
    for round_quotas in (quotas.tolist(), [0] * len(quotas)):
        for q, quota in enumerate(round_quotas):
            free = quota + spare
            for row in rows[source == q].tolist():
                if free and not any(row in one for one in got):
                    got[q].add(row)
                    free -= 1
            spare = free
    return got


@given(proposals())
def test_blend_matches_the_rule_applied_step_by_step(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    rows, source, quotas = case
    chosen = blend(rows, source, quotas)
    assert [set(rows[chosen[source[chosen] == q]].tolist()) for q in range(len(quotas))] == blend_step_by_step(*case)


@given(proposals())
def test_blend_fills_all_positions_with_distinct_videos(
    case: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    rows, source, quotas = case
    chosen = rows[blend(rows, source, quotas)].tolist()
    assert len(set(chosen)) == len(chosen) == min(int(quotas.sum()), len(set(rows.tolist())))


@given(proposals())
def test_blend_keeps_the_order_of_each_source(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    _, source, quotas = case
    chosen = blend(*case)
    for q in range(len(quotas)):
        source_rows = chosen[source[chosen] == q]
        assert (np.diff(source_rows) > 0).all()


def apart(*available: int) -> tuple[np.ndarray, np.ndarray]:
    """Sources with the given numbers of proposals and no common video."""
    return np.arange(sum(available), dtype=np.int32), np.repeat(np.arange(len(available)), available)


def test_every_prefix_mixes_the_sources_in_proportion() -> None:
    rows, source = apart(100, 100, 100)
    chosen = blend(rows, source, np.array([60, 30, 10]))
    assert np.bincount(source[chosen[:10]]).tolist() == [6, 3, 1]
    assert np.bincount(source[chosen[:50]]).tolist() == [30, 15, 5]


@pytest.mark.parametrize(
    ("available", "got"),
    [((2, 50, 50), [2, 13, 5]), ((50, 50, 0), [15, 5, 0]), ((50, 2, 50), [10, 2, 8])],
)
def test_unused_quota_goes_to_the_other_sources(available: tuple[int, ...], got: list[int]) -> None:
    rows, source = apart(*available)
    chosen = blend(rows, source, np.array([10, 5, 5]))
    assert np.bincount(source[chosen], minlength=3).tolist() == got


def test_shared_video_is_kept_by_the_source_that_can_take_it() -> None:
    rows = np.array([0, 1, 2, 3, 4, 4], dtype=np.int32)
    chosen = blend(rows, np.array([0, 0, 0, 0, 0, 1]), np.array([2, 1]))
    assert sorted(chosen.tolist()) == [0, 1, 5]


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=5), st.integers(1, 2000))
def test_whole_quotas_differ_from_shares_by_less_than_one(weights: list[float], candidates: int) -> None:
    shares = np.array(weights) / sum(weights)
    quotas = whole_quotas(shares.tolist(), candidates)
    assert quotas.sum() == candidates
    assert (np.abs(quotas - shares * candidates) < 1 + 1e-6).all()


def test_default_shares_of_500_candidates_are_exact() -> None:
    assert whole_quotas([0.6, 0.15, 0.1, 0.1, 0.05], 500).tolist() == [300, 75, 50, 50, 25]


@pytest.mark.parametrize("quotas", [[0], [5]])
def test_empty_sources_give_an_empty_blend(quotas: list[int]) -> None:
    assert blend(np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int64), np.array(quotas)).tolist() == []
