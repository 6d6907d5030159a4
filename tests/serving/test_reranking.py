"""Re-ranking: the per-creator cap, diversity, exploration with its propensity, and full slates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from reelway.platform.contracts.blend import RerankingSettings
from reelway.serving.stages.arrays import SOURCE_CODES, SOURCES, ScoredCandidates, Slate
from reelway.serving.stages.reranking import Reranking, occurrences, with_min_shares

NOTHING = np.empty(0, dtype=np.int32)


@dataclass
class Table:
    """The two columns of a video table that re-ranking reads."""

    creator_id: np.ndarray
    embedding: np.ndarray

    def has_rows(self, rows: np.ndarray) -> np.ndarray:
        return rows < len(self.creator_id)


def rerank(
    value: list[float],
    creators: list[int],
    *,
    count: int,
    embedding: np.ndarray | None = None,
    source: str = "ann",
    liked: np.ndarray = NOTHING,
    seed: int = 0,
    **settings: Any,
) -> Slate:
    n = len(value)
    unit = np.eye(n, max(n, 1), dtype=np.float32) if embedding is None else embedding
    stage = Reranking(Table(np.array(creators, dtype=np.int64), unit), RerankingSettings(**settings))  # type: ignore[arg-type]
    candidates = ScoredCandidates(
        rows=np.arange(n, dtype=np.int32),
        source=np.full(n, SOURCE_CODES[source], dtype=np.int8),  # type: ignore[index]
        trigger_rows=np.full(n, -1, dtype=np.int32),
        value=np.array(value, dtype=np.float32),
        liked_rows=liked,
        count=count,
        seed=seed,
    )
    return stage.rerank(candidates)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    n = draw(st.integers(0, 60))
    return {
        "value": draw(st.lists(st.floats(-5, 5, width=32), min_size=n, max_size=n)),
        "creators": draw(st.lists(st.integers(-1, 10), min_size=n, max_size=n)),
        "count": draw(st.integers(1, 40)),
        "diversity": draw(st.sampled_from([0.0, 0.15, 1.0])),
        "max_per_creator": draw(st.integers(1, 3)),
        "exploration_slots": draw(st.integers(0, 5)),
        "head": draw(st.integers(1, 50)),
    }


@given(cases(), st.integers(0, 2**32))
def test_slate_is_full_and_keeps_the_cap_if_possible(case: dict[str, Any], seed: int) -> None:
    slate = rerank(**case, seed=seed)
    n, creators = len(case["value"]), np.array(case["creators"], dtype=np.int64)
    assert len(slate) == min(case["count"], n)
    assert len(set(slate.rows.tolist())) == len(slate)
    shown = creators[slate.rows]
    by_known_creator = np.bincount(shown[shown >= 0], minlength=11)
    beyond_cap = int(np.maximum(by_known_creator - case["max_per_creator"], 0).sum())
    assert beyond_cap == slate.cap_violations
    if slate.cap_violations:  # all videos within the cap are in the slate
        possible = np.minimum(np.bincount(creators[creators >= 0], minlength=11), case["max_per_creator"])
        assert (by_known_creator >= possible).all()
        assert (shown < 0).sum() == (creators < 0).sum()
    assert ((slate.propensity > 0) & (slate.propensity <= 1)).all()
    np.testing.assert_array_equal(slate.score, np.array(case["value"], dtype=np.float32)[slate.rows])


@given(st.lists(st.integers(-2, 5), max_size=40))
def test_occurrences_count_earlier_equal_values(values: list[int]) -> None:
    actual = occurrences(np.array(values, dtype=np.int64)).tolist()
    assert actual == [values[:index].count(value) for index, value in enumerate(values)]


def test_zero_diversity_gives_the_order_of_value() -> None:
    slate = rerank([0.1, 0.9, 0.5, 0.7], [1, 2, 3, 4], count=3, diversity=0.0)
    assert slate.rows.tolist() == [1, 3, 2]


def test_near_duplicate_of_the_best_loses_its_position() -> None:
    embedding = np.array([[1, 0], [1, 0], [0, 1]], dtype=np.float32)
    values = [1.0, 0.95, 0.8]
    plain = rerank(values, [1, 2, 3], count=2, embedding=embedding, diversity=0.0)
    diverse = rerank(values, [1, 2, 3], count=2, embedding=embedding, diversity=0.5)
    assert plain.rows.tolist() == [0, 1]
    assert diverse.rows.tolist() == [0, 2]


def test_greedy_mmr_matches_its_definition() -> None:
    rng = np.random.default_rng(0)
    n, count, diversity = 30, 12, 0.4
    value = rng.random(n)
    embedding = rng.standard_normal((n, 8)).astype(np.float32)
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    scaled = (value - value.min()) / (value.max() - value.min())
    chosen: list[int] = []
    while len(chosen) < count:  # the definition, position by position
        left = [i for i in range(n) if i not in chosen]
        chosen.append(
            max(
                left,
                key=lambda i: (
                    (1 - diversity) * scaled[i]
                    - diversity * max((max(float(embedding[i] @ embedding[j]), 0.0) for j in chosen), default=0.0)
                ),
            )
        )
    slate = rerank(value.tolist(), list(range(n)), count=count, embedding=embedding, diversity=diversity)
    assert slate.rows.tolist() == chosen


def test_cap_ignores_unknown_creators() -> None:
    slate = rerank([4, 3, 2, 1], [-1, -1, -1, 5], count=3, max_per_creator=1, diversity=0.0)
    assert slate.rows.tolist() == [0, 1, 2]
    assert slate.cap_violations == 0


def test_propensity_equals_the_frequency_of_exploration() -> None:
    n, draws = 12, 4000
    value = [float(n - i) for i in range(n)]
    shown = np.zeros(n)
    for seed in range(draws):
        slate = rerank(value, list(range(n)), count=4, exploration_slots=1, diversity=0.0, seed=seed)
        (position,) = np.flatnonzero(slate.propensity < 1)
        assert position == 2
        assert slate.propensity[position] == pytest.approx(1 / 9)
        shown[slate.rows[position]] += 1
    assert shown[:3].tolist() == [0, 0, 0]
    assert shown[3:] / draws == pytest.approx(np.full(9, 1 / 9), abs=0.02)


def test_exploration_prefers_fresh_uploads() -> None:
    n = 20
    source = np.full(n, SOURCE_CODES["ann"], dtype=np.int8)
    source[[15, 17]] = SOURCE_CODES["fresh"]
    table = Table(np.arange(n), np.eye(n, dtype=np.float32))
    stage = Reranking(table, RerankingSettings(exploration_slots=2, diversity=0.0))  # type: ignore[arg-type]
    rows = np.arange(n, dtype=np.int32)
    slate = stage.rerank(ScoredCandidates(rows, source, rows * 0 - 1, -rows.astype(np.float32), NOTHING, 6, seed=3))
    assert set(slate.rows[slate.propensity < 1].tolist()) == {15, 17}
    assert slate.propensity[slate.propensity < 1].tolist() == [0.5, 0.5]


def test_equal_seed_gives_an_equal_slate() -> None:
    value = [float(i) for i in range(30)]
    slates = [rerank(value, list(range(30)), count=10, exploration_slots=3, seed=7).rows.tolist() for _ in range(2)]
    assert slates[0] == slates[1]


def test_trigger_is_the_nearest_similar_liked_video() -> None:
    embedding = np.array([[1, 0, 0], [0, 1, 0], [0.9, 0.1, 0], [0, 0, 1]], dtype=np.float32)
    liked = np.array([2], dtype=np.int32)
    slate = rerank([4, 3, 2, 1], [1, 2, 3, 4], count=2, embedding=embedding, liked=liked, diversity=0.0)
    assert slate.rows.tolist() == [0, 1]
    assert slate.trigger_rows.tolist() == [2, -1]


@given(
    st.lists(st.integers(0, 7), max_size=40), st.integers(0, 20),
    st.dictionaries(st.integers(0, 7), st.sampled_from([0.05, 0.1, 0.125]), max_size=8),
)  # fmt: skip
def test_each_source_gets_its_least_share_if_it_can(codes: list[int], count: int, shares: dict[int, float]) -> None:
    source, count = np.array(codes, dtype=np.int8), min(count, len(codes))
    eligible = np.arange(len(codes))
    chosen = eligible[:count]
    result = with_min_shares(chosen, eligible, source, shares, count)
    assert len(set(result.tolist())) == len(result) == count
    have = np.bincount(source[result], minlength=8)
    total, before = np.bincount(source, minlength=8), np.bincount(source[chosen], minlength=8)
    for code in range(8):
        least = int(shares.get(code, 0.0) * count + 1e-9)
        assert have[code] >= min(least, total[code])
        assert have[code] >= min(before[code], least)
        assert have[code] <= max(before[code], least)
        assert sorted(result[source[result] == code]) == np.flatnonzero(source == code)[: have[code]].tolist()
    kept = result[np.isin(result, chosen)]
    assert (np.diff(kept) > 0).all()  # those that stay keep their order


def test_least_share_takes_the_last_positions() -> None:
    source = np.array([SOURCE_CODES["ann"]] * 30 + [SOURCE_CODES["trending"]] * 5, dtype=np.int8)
    order = np.arange(35)
    result = with_min_shares(order[:20], order, source, {SOURCE_CODES["trending"]: 0.1}, 20)
    assert result.tolist() == [*range(18), 31, 30]


def test_default_slate_uses_every_source_that_has_candidates() -> None:
    rng = np.random.default_rng(0)
    n = 400
    source = np.where(np.arange(n) < 300, SOURCE_CODES["ann"], rng.integers(0, len(SOURCES), n)).astype(np.int8)
    candidates = ScoredCandidates(
        rows=np.arange(n, dtype=np.int32), source=source, trigger_rows=np.full(n, -1, np.int32),
        value=np.linspace(1, 0, n, dtype=np.float32), liked_rows=NOTHING, count=20, seed=0,
    )  # fmt: skip
    table = Table(np.arange(n), np.eye(n, dtype=np.float32))
    slate = Reranking(table, RerankingSettings()).rerank(candidates)  # type: ignore[arg-type]
    assert set(slate.source.tolist()) == set(range(len(SOURCES)))
    assert slate.rows[:12].tolist() == list(range(12))


def test_least_shares_above_one_are_rejected() -> None:
    with pytest.raises(ValidationError, match=r"min_shares sum to 1\.2"):
        RerankingSettings(min_shares={"ann": 0.7, "fresh": 0.5})
