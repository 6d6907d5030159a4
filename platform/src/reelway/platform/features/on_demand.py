"""Request-time features, computed by the same functions in Feast's on-demand view, training and serving.

An unknown time is NaN, and so is every value computed from it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_DAY_S = 86_400.0
_WEEK_S = 7 * _DAY_S
_EPOCH_WEEKDAY_S = 3 * _DAY_S  # 1970-01-01 was a Thursday; the week starts on Monday


def cyclic_time(request_time_s: Floats) -> dict[str, Floats]:
    """Returns hour of day and day of week (UTC) as points on the unit circle. Input: Unix seconds ``[B]``."""
    hour = 2 * np.pi * np.mod(request_time_s, _DAY_S) / _DAY_S
    weekday = 2 * np.pi * np.mod(request_time_s + _EPOCH_WEEKDAY_S, _WEEK_S) / _WEEK_S
    return {
        "hour_sin": np.sin(hour),
        "hour_cos": np.cos(hour),
        "weekday_sin": np.sin(weekday),
        "weekday_cos": np.cos(weekday),
    }


def account_age_d(request_time_s: Floats, created_at_s: Floats) -> Floats:
    """Returns days since the viewer's account was created, never negative."""
    return np.maximum(request_time_s - created_at_s, 0.0) / _DAY_S


def hours_since_upload(request_time_s: Floats, uploaded_at_s: Floats) -> Floats:
    """Returns hours since the video's upload, never negative."""
    return np.maximum(request_time_s - uploaded_at_s, 0.0) / 3600.0


def request_context(request_time_s: Floats, created_at_s: Floats, uploaded_at_s: Floats) -> dict[str, Floats]:
    """Returns all of ``REQUEST_CONTEXT``. Shapes: three ``[B]`` in Unix seconds -> ``[B]`` each."""
    return {
        **cyclic_time(request_time_s),
        "account_age_d": account_age_d(request_time_s, created_at_s),
        "hours_since_upload": hours_since_upload(request_time_s, uploaded_at_s),
    }
