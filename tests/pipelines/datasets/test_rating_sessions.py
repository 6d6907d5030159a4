"""Grouping of ratings into requests."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from reelway.pipelines.datasets.ratings import MAX_SESSION_RATINGS, SESSION_GAP_US, session_starts

HOUR_US = 3_600_000_000


def test_pause_of_more_than_an_hour_starts_a_request():
    time_us = np.array([0, HOUR_US, 2 * HOUR_US + 1])
    assert session_starts(np.zeros(3, dtype=np.int64), time_us).tolist() == [0, 0, 2]


def test_viewers_share_no_request():
    assert session_starts(np.array([7, 8, 7, 8]), np.arange(4)).tolist() == [0, 1, 0, 1]


def test_long_session_is_split_into_pages():
    request = session_starts(
        np.zeros(2 * MAX_SESSION_RATINGS + 1, dtype=np.int64), np.arange(2 * MAX_SESSION_RATINGS + 1)
    )
    assert request.tolist() == [0] * MAX_SESSION_RATINGS + [MAX_SESSION_RATINGS] * MAX_SESSION_RATINGS + [
        2 * MAX_SESSION_RATINGS
    ]


def test_empty_ratings_have_no_requests():
    assert session_starts(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)).tolist() == []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4 * HOUR_US)), max_size=120))
def test_requests_equal_a_simple_reference(events):
    events.sort(key=lambda event: event[1])
    viewer = np.array([v for v, _ in events], dtype=np.int64)
    time_us = np.array([t for _, t in events], dtype=np.int64)
    expected, sessions = [], {}
    for row, (who, when) in enumerate(events):
        first, last, size = sessions.get(who, (row, when, 0))
        if when - last > SESSION_GAP_US or size == MAX_SESSION_RATINGS:
            first, size = row, 0
        sessions[who] = (first, when, size + 1)
        expected.append(first)
    assert session_starts(viewer, time_us).tolist() == expected
