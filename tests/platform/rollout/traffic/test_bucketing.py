"""Assignment to arms is uniform, sticky, monotone and independent between salts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from reelway.platform.contracts.ids import MAX_ID
from reelway.platform.errors import ConfigError
from reelway.platform.rollout.traffic.bucketing import BUCKETS, arm_of, arms_of, bucket_of, buckets_of

MILLION = np.arange(1_000_000, dtype=np.int64)
ALPHA = 1e-4
"""Significance level. The tests are deterministic, so it only bounds how unusual the hash may be."""


@pytest.mark.parametrize("salt", ["", "rollout-7", "ü"])
def test_consecutive_viewers_fill_the_buckets_evenly(salt: str) -> None:
    counts = np.bincount(buckets_of(MILLION, salt), minlength=BUCKETS)
    p = stats.chisquare(counts).pvalue
    assert ALPHA < p < 1 - ALPHA  # a distribution that is too even is suspicious, too


def test_ids_with_equal_low_bits_fill_the_buckets_evenly() -> None:
    counts = np.bincount(buckets_of(MILLION * 4096, "x"), minlength=BUCKETS)
    assert ALPHA < stats.chisquare(counts).pvalue < 1 - ALPHA


def test_salts_assign_independently() -> None:
    first, second = buckets_of(MILLION, "a") * 20 // BUCKETS, buckets_of(MILLION, "b") * 20 // BUCKETS
    table = np.bincount(first * 20 + second, minlength=400).reshape(20, 20)
    assert stats.chi2_contingency(table).pvalue > ALPHA


@given(st.integers(0, MAX_ID), st.text(max_size=20))
def test_vectorised_bucket_equals_the_scalar_bucket(viewer: int, salt: str) -> None:
    assert bucket_of(viewer, salt) == buckets_of(np.array([viewer]), salt)[0]


@given(st.integers(0, MAX_ID), st.integers(0, BUCKETS), st.integers(0, BUCKETS))
def test_growing_arm_keeps_its_viewers(viewer: int, one: int, other: int) -> None:
    before, after = sorted((one, other))
    if arm_of(viewer, "s", {"canary": before, "stable": BUCKETS - before}) == "canary":
        assert arm_of(viewer, "s", {"canary": after, "stable": BUCKETS - after}) == "canary"


def test_arm_shares_match_the_weights() -> None:
    weights = {"canary": 500, "holdout": 100, "stable": 9400}
    shares = np.bincount(arms_of(MILLION, "s", weights), minlength=3) / len(MILLION)
    assert shares == pytest.approx([0.05, 0.01, 0.94], abs=0.001)


@given(st.integers(0, MAX_ID))
def test_vectorised_arm_equals_the_scalar_arm(viewer: int) -> None:
    weights = {"canary": 2500, "holdout": 0, "stable": 7500}
    assert list(weights)[arms_of(np.array([viewer]), "s", weights)[0]] == arm_of(viewer, "s", weights)


def test_bucket_assignment_is_pinned() -> None:
    assert [bucket_of(viewer, "reelway") for viewer in (0, 1, 2, 1_000_000, MAX_ID)] == PINNED


PINNED = [73, 6376, 962, 3611, 1014]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "sum to 0"),
        ({"a": 5000}, "sum to 5000"),
        ({"a": -1, "b": 10_001}, "outside"),
        ({"a": 1, "b": 2}, "sum to 3"),
    ],
)
def test_weights_that_do_not_cover_all_buckets_are_rejected(weights: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        arm_of(1, "s", weights)
