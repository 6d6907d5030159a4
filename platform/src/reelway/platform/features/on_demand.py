"""Request-time features, computed by the same functions in Feast's on-demand view, training and serving.

An unknown time is NaN, and so is every value computed from it. Session features are an exception: they count events,
and an event of unknown time is no event.
"""

# Shapes: B viewers (or rows), H history

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_DAY_S = 86_400.0
_WEEK_S = 7 * _DAY_S
_EPOCH_WEEKDAY_S = 3 * _DAY_S  # 1970-01-01 was a Thursday; the week starts on Monday

SESSION_GAP_S: Final = 30 * 60.0
"""Inactivity that ends a session. 30 minutes is the usual value of web analytics (Google Analytics' default), after the
25.5 minutes that Catledge and Pitkow measured ("Characterizing browsing strategies in the World-Wide Web", 1995)."""
SESSION_RECENT_S: Final = 10 * 60.0
"""Window of ``session_watched_10m`` and ``session_skipped_10m``."""


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


def session_features(request_time_s: Floats, history_times_s: Floats, history_weights: Floats) -> dict[str, Floats]:
    """Returns the viewer's current session as ``SESSION_FEATURES``, all 0 without a session.

    An event is an impression of the viewer's history, at the time it was shown. Its weight is the outcome weight of
    ``contracts.events.OUTCOME_WEIGHTS``: positive if the viewer watched long or liked the video, negative if the viewer
    skipped or rejected it. A session is the chain of latest events in which each gap, the gap to the request included,
    is at most ``SESSION_GAP_S``.

    - ``session_position``: number of events in the session, at most H;
    - ``session_watched_10m``, ``session_skipped_10m``: events of positive and of negative weight in the last 10
      minutes;
    - ``session_trend``: mean weight of the session's newer half less that of its older half, 0 for fewer than two
      events. The middle event of an odd number belongs to neither half. The history holds no seconds watched, so the
      trend is one of outcome weights and not of dwell time.

    Args:
        request_time_s: Unix seconds, ``[B]``.
        history_times_s: Unix seconds, ``[B, H]``. Padding is NaN and may be in any slot. Events of equal time are
            ordered by slot, the latest last.
        history_weights: ``[B, H]``. An event of NaN weight does not count, nor does an event after the request.
    """
    age_BH = (request_time_s[:, None] - history_times_s)[:, ::-1]
    weights_BH = history_weights[:, ::-1]
    counted_BH = (age_BH >= 0) & ~np.isnan(weights_BH)
    age_BH = np.where(counted_BH, age_BH, np.inf)
    rows_B1 = np.arange(len(age_BH))[:, None]
    newest_first_BH = np.argsort(age_BH, axis=1, kind="stable")
    age_BH = age_BH[rows_B1, newest_first_BH]
    weights_BH = np.where(counted_BH, weights_BH, 0.0)[rows_B1, newest_first_BH]

    newer_BH = np.zeros_like(age_BH)
    newer_BH[:, 1:] = age_BH[:, :-1]
    session_BH = np.logical_and.accumulate(age_BH <= newer_BH + SESSION_GAP_S, axis=1)
    position_B = session_BH.sum(axis=1)
    recent_BH = age_BH <= SESSION_RECENT_S
    half_B = position_B // 2
    rank_H = np.arange(age_BH.shape[1])
    newer_half_BH = rank_H < half_B[:, None]
    older_half_BH = session_BH & (rank_H >= (position_B - half_B)[:, None])
    change_B = (weights_BH * newer_half_BH - weights_BH * older_half_BH).sum(axis=1)
    return {
        "session_position": position_B.astype(np.float64),
        "session_watched_10m": (recent_BH & (weights_BH > 0)).sum(axis=1, dtype=np.float64),
        "session_skipped_10m": (recent_BH & (weights_BH < 0)).sum(axis=1, dtype=np.float64),
        "session_trend": change_B / np.maximum(half_B, 1),
    }
