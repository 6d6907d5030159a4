"""Request-time features: the clock on a circle, ages, missing times, and the session in the viewer's history."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reelway.platform.contracts.feature_names import REQUEST_CONTEXT, SESSION_FEATURES
from reelway.platform.features.on_demand import (
    account_age_d,
    cyclic_time,
    hours_since_upload,
    request_context,
    session_features,
)

MONDAY_MIDNIGHT_S = 4 * 86_400.0  # 1970-01-05
NOW_S = 1_700_000_000.0
MINUTE_S = 60.0

# One viewer's history: minutes before the request (negative: after it) and weight. Equal and limiting ages are likely.
Ages = st.one_of(st.sampled_from([-1.0, 0.0, 5.0, 10.0, 11.0, 30.0, 40.0, 60.0, 61.0]), st.integers(-5, 90).map(float))
Weights = st.sampled_from([-3.0, -0.5, 0.7, 1.0, 5.0])
Histories = st.lists(st.lists(st.tuples(Ages, Weights), max_size=8), min_size=1, max_size=5)


def test_monday_midnight_is_the_start_of_both_circles() -> None:
    values = cyclic_time(np.array([MONDAY_MIDNIGHT_S]))
    assert [values[name][0] for name in ("hour_sin", "hour_cos", "weekday_sin", "weekday_cos")] == pytest.approx(
        [0.0, 1.0, 0.0, 1.0], abs=1e-9
    )


def test_six_in_the_morning_is_a_quarter_of_the_day_circle() -> None:
    assert cyclic_time(np.array([MONDAY_MIDNIGHT_S + 6 * 3600]))["hour_sin"][0] == pytest.approx(1.0)
    around = cyclic_time(np.array([MONDAY_MIDNIGHT_S - 60, MONDAY_MIDNIGHT_S + 60]))
    assert abs(np.diff(around["hour_cos"])[0]) < 1e-9
    assert abs(np.diff(around["hour_sin"])[0]) < 0.01


def test_ages_have_their_units_without_negative_values() -> None:
    now = np.array([200_000.0])
    assert account_age_d(now, np.array([200_000.0 - 2 * 86_400]))[0] == 2.0
    assert hours_since_upload(now, np.array([200_000.0 - 7200]))[0] == 2.0
    assert account_age_d(now, now + 5)[0] == 0.0
    assert hours_since_upload(now, now + 5)[0] == 0.0


def test_unknown_time_gives_nan() -> None:
    values = request_context(np.array([1e9]), np.array([np.nan]), np.array([np.nan]))
    assert np.isnan(values["account_age_d"][0])
    assert np.isnan(values["hours_since_upload"][0])
    assert np.isfinite(values["hour_sin"][0])


def test_request_context_has_the_names_in_contract_order() -> None:
    assert tuple(request_context(*(np.zeros(2) for _ in range(3)))) == REQUEST_CONTEXT


def padded(histories: list[list[tuple[float, float]]], length: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Returns times and weights ``[B, length]``, padded in front."""
    times_s, weights = np.full((len(histories), length), np.nan), np.zeros((len(histories), length))
    for row, history in enumerate(histories):
        for slot, (age_min, weight) in enumerate(history, length - len(history)):
            times_s[row, slot], weights[row, slot] = NOW_S - age_min * MINUTE_S, weight
    return times_s, weights


def session_of(*history: tuple[float, float]) -> list[float]:
    """Returns one viewer's session features from (minutes before the request, weight), oldest first."""
    times_s, weights = padded([list(history)])
    values = session_features(np.array([NOW_S]), times_s, weights)
    assert tuple(values) == SESSION_FEATURES
    return [float(column[0]) for column in values.values()]


def looped_session(history: list[tuple[float, float]]) -> list[float]:
    """The rules of ``session_features`` for one viewer, event by event."""
    past = [(age_min, -slot, weight) for slot, (age_min, weight) in enumerate(history) if age_min >= 0]
    session: list[float] = []
    newer_min = 0.0
    for age_min, _, weight in sorted(past):  # newest first; of equal ages the later slot first
        if age_min - newer_min > 30:
            break
        session.append(weight)
        newer_min = age_min
    recent = [weight for age_min, _, weight in past if age_min <= 10]
    half = len(session) // 2
    trend = (sum(session[:half]) - sum(session[len(session) - half :])) / half if half else 0.0
    return [len(session), sum(weight > 0 for weight in recent), sum(weight < 0 for weight in recent), trend]


def test_session_ends_at_the_first_gap_above_30_minutes() -> None:
    assert session_of((71.0, 1.0), (40.0, 1.0), (10.0, 1.0))[0] == 2
    assert session_of((70.0, 1.0), (40.0, 1.0), (10.0, 1.0))[0] == 3
    assert session_of((31.0, 1.0), (30.5, 1.0)) == [0, 0, 0, 0]


def test_session_counts_watched_with_skipped_events_of_ten_minutes() -> None:
    assert session_of((12.0, -2.0), (11.0, 1.0), (10.0, 1.0), (3.0, -0.5), (2.0, 2.0), (0.0, -0.5))[1:3] == [2, 2]


def test_session_trend_compares_the_newer_with_the_older_half() -> None:
    assert session_of((4.0, 1.0))[3] == 0
    assert session_of((4.0, -0.5), (3.0, 1.0))[3] == 1.5
    assert session_of((5.0, 2.0), (4.0, 5.0), (3.0, -0.5))[3] == -2.5
    assert session_of((90.0, 5.0), (4.0, 1.0), (3.0, 1.0), (2.0, 1.0), (1.0, -0.5))[3] == -0.75


def test_session_ignores_events_after_the_request() -> None:
    assert session_of((4.0, -0.5), (-1.0, 5.0)) == session_of((4.0, -0.5)) == [1, 0, 1, 0]


def test_session_is_zero_without_a_history() -> None:
    assert session_of() == [0, 0, 0, 0]


def test_event_of_unknown_weight_is_no_event() -> None:
    assert session_of((4.0, np.nan), (3.0, 1.0)) == [1, 1, 0, 0]


@given(histories=Histories)
def test_session_of_a_batch_equals_a_loop_over_viewers(histories: list[list[tuple[float, float]]]) -> None:
    values = session_features(np.full(len(histories), NOW_S), *padded(histories))
    batch = np.column_stack([values[name] for name in SESSION_FEATURES])
    np.testing.assert_allclose(batch, [looped_session(history) for history in histories], rtol=0, atol=1e-12)


@given(histories=Histories, slots=st.sets(st.integers(0, 12), min_size=8, max_size=8))
def test_session_is_independent_of_the_slots_of_padding(
    histories: list[list[tuple[float, float]]], slots: set[int]
) -> None:
    times_s, weights = padded(histories)
    spread_times_s, spread_weights = np.full((len(histories), 13), np.nan), np.full((len(histories), 13), 9.0)
    spread_times_s[:, sorted(slots)], spread_weights[:, sorted(slots)] = times_s, weights
    now_s = np.full(len(histories), NOW_S)
    spread = session_features(now_s, spread_times_s, spread_weights)
    for name, values in session_features(now_s, times_s, weights).items():
        np.testing.assert_array_equal(spread[name], values, err_msg=name)
