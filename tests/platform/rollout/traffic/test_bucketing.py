"""Assignment to arms: uniform, sticky, monotone, independent between salts."""

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
"""These tests are deterministic; the level says how unusual a hash may look."""


@pytest.mark.parametrize("salt", ["", "rollout-7", "ü"])
def test_a_million_consecutive_viewers_fill_the_buckets_evenly(salt: str) -> None:
    counts = np.bincount(buckets_of(MILLION, salt), minlength=BUCKETS)
    p = stats.chisquare(counts).pvalue
    assert ALPHA < p < 1 - ALPHA  # too even is suspicious as well


def test_viewers_whose_ids_share_their_low_bits_are_spread_as_evenly() -> None:
    counts = np.bincount(buckets_of(MILLION * 4096, "x"), minlength=BUCKETS)
    assert ALPHA < stats.chisquare(counts).pvalue < 1 - ALPHA


def test_two_salts_assign_independently() -> None:
    first, second = buckets_of(MILLION, "a") * 20 // BUCKETS, buckets_of(MILLION, "b") * 20 // BUCKETS
    table = np.bincount(first * 20 + second, minlength=400).reshape(20, 20)
    assert stats.chi2_contingency(table).pvalue > ALPHA


@given(st.integers(0, MAX_ID), st.text(max_size=20))
def test_one_viewer_alone_gets_the_same_bucket_as_among_many(viewer: int, salt: str) -> None:
    assert bucket_of(viewer, salt) == buckets_of(np.array([viewer]), salt)[0]


@given(st.integers(0, MAX_ID), st.integers(0, BUCKETS), st.integers(0, BUCKETS))
def test_an_arm_that_grows_keeps_everybody_it_had(viewer: int, one: int, other: int) -> None:
    before, after = sorted((one, other))
    if arm_of(viewer, "s", {"canary": before, "stable": BUCKETS - before}) == "canary":
        assert arm_of(viewer, "s", {"canary": after, "stable": BUCKETS - after}) == "canary"


def test_weights_are_met_within_sampling_error() -> None:
    weights = {"canary": 500, "holdout": 100, "stable": 9400}
    shares = np.bincount(arms_of(MILLION, "s", weights), minlength=3) / len(MILLION)
    assert shares == pytest.approx([0.05, 0.01, 0.94], abs=0.001)


@given(st.integers(0, MAX_ID))
def test_the_vectorised_arm_is_the_scalar_one(viewer: int) -> None:
    weights = {"canary": 2500, "holdout": 0, "stable": 7500}
    assert list(weights)[arms_of(np.array([viewer]), "s", weights)[0]] == arm_of(viewer, "s", weights)


def test_assignment_never_changes_between_versions_of_this_code() -> None:
    assert [bucket_of(viewer, "reelway") for viewer in (0, 1, 2, 1_000_000, MAX_ID)] == PINNED


PINNED = [73, 6376, 962, 3611, 1014]


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({}, "sum to 0"),
        ({"a": 5000}, "sum to 5000"),
        ({"a": -1, "b": 10_001}, "outside"),
        ({"a": 1, "b": 2}, "sum to 3"),
    ],
)
def test_weights_that_leave_viewers_without_an_arm_are_refused(weights: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        arm_of(1, "s", weights)
