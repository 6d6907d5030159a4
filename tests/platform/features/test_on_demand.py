"""Request-time features: the clock on a circle, ages, and missing times."""

from __future__ import annotations

import numpy as np
import pytest

from reelway.platform.contracts.feature_names import REQUEST_CONTEXT
from reelway.platform.features.on_demand import account_age_d, cyclic_time, hours_since_upload, request_context

MONDAY_MIDNIGHT_S = 4 * 86_400.0  # 1970-01-05


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
