"""The recognition of repeated outcomes: against a plain set, and its bound."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from reelway.serving.outcomes.recent_outcomes import RecentOutcomes

BATCHES = st.lists(st.lists(st.integers(-5, 5), max_size=8), max_size=12)


@given(BATCHES)
def test_outcome_is_new_exactly_once(batches: list[list[int]]) -> None:
    recent, known = RecentOutcomes(), set[int]()
    for batch in batches:
        ids = np.array(batch, np.int64)
        expected = []
        for one in batch:
            expected.append(one not in known)
            known.add(one)
        new = recent.are_new(ids)
        assert new.tolist() == expected
        recent.add(ids[new])


def test_memory_is_bounded_and_keeps_the_newest_half() -> None:
    recent = RecentOutcomes(max_ids=100)
    for start in range(0, 1_000, 10):
        recent.add(np.arange(start, start + 10))
    assert not recent.are_new(np.arange(950, 1_000)).any()
    assert recent.are_new(np.arange(0, 900)).all()


def test_unacknowledged_outcome_stays_new() -> None:
    recent = RecentOutcomes()
    ids = np.array([7])
    assert recent.are_new(ids).all()
    assert recent.are_new(ids).all()
