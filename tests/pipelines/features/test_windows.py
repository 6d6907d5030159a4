"""Window sums compared with a brute-force count, and the edges of a window."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reelway.pipelines.features.windows import ALL_TIME_US, window_sums

SMALL = st.integers(min_value=-30, max_value=30)
EVENTS = st.lists(st.tuples(st.integers(0, 4), SMALL, st.tuples(SMALL, SMALL)), max_size=40)
QUESTIONS = st.lists(st.tuples(st.integers(0, 5), SMALL), max_size=12)
WINDOWS = st.lists(st.integers(1, 50), min_size=1, max_size=3)


def ints(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)


@settings(max_examples=150, deadline=None)
@given(EVENTS, QUESTIONS, WINDOWS)
def test_sums_equal_a_brute_force_count(events, requested, windows) -> None:
    sums = window_sums(
        ints([e for e, _, _ in events]), ints([t for _, t, _ in events]),
        ints([v for _, _, v in events]).reshape(-1, 2), ints([e for e, _ in requested]),
        ints([t for _, t in requested]), windows,
    )  # fmt: skip
    for m, (entity, time) in enumerate(requested):
        for w, window in enumerate(windows):
            inside = [v for e, t, v in events if e == entity and time - window < t <= time]
            assert sums[m, w].tolist() == [sum(v[0] for v in inside), sum(v[1] for v in inside)]


@settings(max_examples=50, deadline=None)
@given(EVENTS, QUESTIONS, st.randoms())
def test_sums_do_not_depend_on_the_order_of_events(events, requested, random) -> None:
    def sums(rows):
        return window_sums(
            ints([e for e, _, _ in rows]), ints([t for _, t, _ in rows]), ints([v for _, _, v in rows]).reshape(-1, 2),
            ints([e for e, _ in requested]), ints([t for _, t in requested]), [7],
        )  # fmt: skip

    shuffled = list(events)
    random.shuffle(shuffled)
    assert np.array_equal(sums(events), sums(shuffled))


def test_window_includes_its_end_but_excludes_its_start() -> None:
    ones = np.ones((3, 1), dtype=np.int64)
    sums = window_sums(ints([1, 1, 1]), ints([90, 91, 100]), ones, ints([1]), ints([100]), [10])
    assert sums[0, 0, 0] == 2


def test_large_fixed_point_values_stay_exact_beside_small_ones() -> None:
    values = ints([2**52, 1]).reshape(-1, 1)
    assert window_sums(ints([1, 2]), ints([5, 6]), values, ints([2]), ints([6]), [ALL_TIME_US])[0, 0, 0] == 1


def test_float_values_are_rejected() -> None:
    with pytest.raises(TypeError, match="values has type float64, expected integers"):
        window_sums(ints([1]), ints([1]), np.ones((1, 1)), ints([1]), ints([1]), [1])


def test_empty_window_is_rejected() -> None:
    with pytest.raises(ValueError, match="window of 0 us"):
        window_sums(ints([1]), ints([1]), ints([[1]]), ints([1]), ints([1]), [0])
