"""The arithmetic of sums clustered by viewer: what a batch of impressions and outcomes adds. Pure functions on arrays.

A viewer's totals determine the viewer's contribution to its arm's sums (``contributions``). A batch changes the
totals, and the sums grow by the contributions after it less those before it. Up to rounding, the result equals the
sums over all events at once, in any order. Sums may decrease, when a viewer stops being evidence.

**What counts as evidence.** No viewer may decide a rollout, honest or not:

- A viewer counts from its first outcome on (``silent`` before). A client that only asks, and never reports, is none.
- A viewer's totals count as those of at most ``MAX_IMPRESSIONS`` impressions: with n impressions, both x and y are
  multiplied by ``MAX_IMPRESSIONS / n``. The viewer's own rate stays, its share of the arm is bounded. The factor does
  not depend on traffic weights, so the arms remain comparable over the ramp.
- A total is at most ``LARGEST_PER_IMPRESSION`` times the viewer's impressions: one like per impression, 60 s of a
  watch. Outcomes without an impression therefore count nothing until the impression is read.
- A viewer that does the same on nearly every impression (``SATURATED_ABOVE``, from ``JUDGED_FROM`` impressions on) is
  not evidence: ``saturated``. Nobody watches nine of ten videos to the end, or likes half of them.

Viewers that are no evidence are counted (``AUDIENCE_STATISTICS``) and compared between the arms
(``rollout.suspicion``), as are ``idle`` viewers, who report but watch nothing. Decision 0026 has the reasons.
"""

# Shapes: R rows, U viewers (of one arm each), S slices, M metrics, A audience statistics, C columns of a viewer:
# impressions, x, then y of each metric

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Final

import numpy as np
from numpy.typing import NDArray

from reelway.platform.rollout.evidence import ArmStatistics
from reelway.platform.rollout.metric_names import (
    AUDIENCE_STATISTICS,
    EXPOSURE_STATISTICS,
    METRIC_STATISTICS,
    OUTCOME_METRICS,
)
from reelway.platform.rollout.policy import Slice
from reelway.platform.tokens import ALL_SLICES, SLICE_BITS

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]
Bools = NDArray[np.bool_]

SLICES: Final = (Slice.OVERALL, *SLICE_BITS)
METRICS: Final = OUTCOME_METRICS
COLUMNS_PER_VIEWER: Final = 2 + len(METRICS)
X_COLUMN: Final = 1
FIRST_METRIC_COLUMN: Final = 2
_EXPOSURES: Final = len(EXPOSURE_STATISTICS)
SUMS_PER_ARM: Final = _EXPOSURES + len(METRIC_STATISTICS) * len(METRICS)
"""Numbers per slice of an arm: the exposure statistics, then sum_y, sum_yy, sum_xy of every metric."""
AUDIENCE_PER_ARM: Final = len(AUDIENCE_STATISTICS)

MAX_IMPRESSIONS: Final = 50
"""A viewer's totals count as those of at most this many impressions in the whole rollout, hence in any look at it."""
JUDGED_FROM: Final = 5
"""Impressions from which on a viewer may be saturated or idle."""
_WATCH_S: Final = METRICS.index("watch_s_per_impression")
LARGEST_PER_IMPRESSION: Final = np.where(np.arange(len(METRICS)) == _WATCH_S, 60.0, 1.0)
"""Bound of a viewer's total per impression, by metric: seconds of a watch, or one outcome."""
_UNLIMITED: Final = 1e12
_SATURATED_ABOVE: Final = {"long_watch_rate": 0.9, "watch_s_per_impression": _UNLIMITED, "skip_rate": _UNLIMITED}
SATURATED_ABOVE: Final = np.array([_SATURATED_ABOVE.get(metric, 0.5) for metric in METRICS])
"""A viewer's total per impression above which it is saturated, by metric. Unlimited: a displeased viewer skips all."""
_PLEASED: Final = np.array(
    [METRICS.index(f"{kind}_rate") for kind in ("long_watch", "like", "share", "save", "follow")]
)

_MEMBER: Final = np.array(
    [[True, *(bool(mask & bit) for bit in SLICE_BITS.values())] for mask in range(ALL_SLICES + 1)]
)  # [mask, S]


@dataclass(frozen=True, slots=True)
class TotalsDelta:
    """R rows to add to viewer totals. An impression adds to x, an outcome to its metric's column."""

    key: I64  # identifies the viewer and its arm
    slices: U8  # tokens.SLICE_BITS
    column: I64  # X_COLUMN, or FIRST_METRIC_COLUMN and following
    amount: F64  # times the overlap weight
    impressions: I64  # number of impressions in the row; 0 for outcomes
    outcomes: I64  # number of outcomes in the row; 0 for impressions and for the second row of a long watch
    weight: F64  # overlap weight

    @classmethod
    def joined(cls, parts: Sequence[TotalsDelta]) -> TotalsDelta:
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def take(self, rows: NDArray[np.bool_]) -> TotalsDelta:
        return TotalsDelta(*(getattr(self, field.name)[rows] for field in fields(self)))


@dataclass(frozen=True, slots=True)
class ViewerTotals:
    """Totals of U viewers."""

    totals: F64  # [U, S, C]
    outcomes: I64  # [U]
    arrival: F64  # [U] overlap weight of the viewer's first impression of the rollout; 0 if it was on another arm

    @classmethod
    def unknown(cls, viewers: int) -> ViewerTotals:
        return cls(np.zeros((viewers, len(SLICES), COLUMNS_PER_VIEWER)), np.zeros(viewers, np.int64), np.zeros(viewers))

    @property
    def shown(self) -> Bools:
        """Whether the viewer had an impression. Shape: ``[U]``."""
        return np.asarray(self.totals[:, 0, 0] > 0)


@dataclass(frozen=True, slots=True)
class ViewerClasses:
    """Which viewers are evidence, and which are not and why. All shapes: ``[U]``. Viewers without impressions: none."""

    silent: Bools
    saturated: Bools
    idle: Bools
    evidence: Bools  # includes the idle ones


def classify_viewers(viewers: ViewerTotals) -> ViewerClasses:
    """Returns the class of each viewer, from its totals over all slices."""
    overall = viewers.totals[:, 0]
    impressions, x, y = overall[:, 0], overall[:, X_COLUMN], overall[:, FIRST_METRIC_COLUMN:]
    shown, reports = impressions > 0, viewers.outcomes > 0
    judged = shown & reports & (impressions >= JUDGED_FROM)
    saturated = judged & (y > SATURATED_ABOVE * x[:, None]).any(axis=1)
    idle = judged & (x > 0) & ~saturated & ~(y[:, _PLEASED] > 0).any(axis=1)
    return ViewerClasses(shown & ~reports, saturated, idle, shown & reports & ~saturated)


def contributions(viewers: ViewerTotals) -> tuple[F64, F64]:
    """Returns what each viewer contributes: to its arm's sums ``[U, S, SUMS_PER_ARM]`` and audience ``[U, A]``."""
    classes, totals = classify_viewers(viewers), viewers.totals
    impressions = totals[:, 0, 0]
    factor = np.minimum(1.0, MAX_IMPRESSIONS / np.maximum(impressions, 1.0))
    counted_US = classes.evidence[:, None] & (totals[:, :, 0] > 0)
    scale_US1 = (factor[:, None] * counted_US)[:, :, None]
    x = totals[:, :, X_COLUMN : X_COLUMN + 1] * scale_US1
    y = np.minimum(totals[:, :, FIRST_METRIC_COLUMN:] * scale_US1, LARGEST_PER_IMPRESSION * x)
    sums = np.empty((*counted_US.shape, SUMS_PER_ARM))
    sums[:, :, 0], sums[:, :, 1] = counted_US, totals[:, :, 0] * scale_US1[:, :, 0]
    idle_x = x * classes.idle[:, None, None]
    sums[:, :, 2:_EXPOSURES] = np.concatenate([x, x * x, idle_x, idle_x * x], axis=2)
    sums[:, :, _EXPOSURES::3] = y
    sums[:, :, _EXPOSURES + 1 :: 3] = y * y
    sums[:, :, _EXPOSURES + 2 :: 3] = x * y
    groups = np.stack([np.ones(len(impressions)), classes.silent, classes.saturated], axis=1)
    weighted = groups * viewers.arrival[:, None]
    counts = [viewers.shown, impressions, viewers.outcomes, impressions * (1.0 - factor)]
    audience = np.concatenate([np.stack(counts, axis=1), weighted, weighted * viewers.arrival[:, None]], axis=1)
    return sums, audience


def apply_delta(before: ViewerTotals, additions: TotalsDelta, key_U: I64, elsewhere_U: Bools) -> ViewerTotals:
    """Adds rows to the totals of their viewers.

    Args:
        key_U: all keys of the additions, ascending.
        elsewhere_U: whether the viewer was on another arm of the rollout before its first impression on this one.
    """
    viewers, viewer_R = len(key_U), np.searchsorted(key_U, additions.key)
    totals = before.totals.copy()
    flat_R = viewer_R * COLUMNS_PER_VIEWER + additions.column
    for part in range(len(SLICES)):
        rows = np.flatnonzero(_MEMBER[additions.slices, part])
        summed = np.bincount(flat_R[rows], additions.amount[rows], minlength=viewers * COLUMNS_PER_VIEWER)
        totals[:, part] += summed.reshape(viewers, COLUMNS_PER_VIEWER)
        totals[:, part, 0] += np.bincount(viewer_R[rows], additions.impressions[rows], minlength=viewers)
    outcomes = before.outcomes + np.bincount(viewer_R, additions.outcomes, minlength=viewers).astype(np.int64)
    arrival = before.arrival.copy()
    impressions = np.flatnonzero(additions.impressions > 0)
    shown_U, first = np.unique(viewer_R[impressions], return_index=True)
    fresh = ~before.shown[shown_U] & ~elsewhere_U[shown_U]
    arrival[shown_U[fresh]] = additions.weight[impressions[first[fresh]]]
    return ViewerTotals(totals, outcomes, arrival)


def growth_by_arm(before: ViewerTotals, after: ViewerTotals, arm_U: I64, arms: int) -> tuple[F64, F64]:
    """Returns how much the sums ``[arms, S, SUMS_PER_ARM]`` and audience statistics ``[arms, A]`` of each arm grow.

    Args:
        arm_U: the arm of each viewer, 0..arms-1.
    """
    sums = np.zeros((arms, len(SLICES), SUMS_PER_ARM))
    audience = np.zeros((arms, AUDIENCE_PER_ARM))
    changes = [new - old for new, old in zip(contributions(after), contributions(before), strict=True)]
    for arm in range(arms):
        sums[arm], audience[arm] = (change[arm_U == arm].sum(axis=0) for change in changes)
    return sums, audience


def without_rounding(sums_SK: F64) -> F64:
    """Returns sums without the rounding errors of subtractions: none is negative, or positive without a viewer."""
    return np.maximum(sums_SK, 0.0) * (sums_SK[:, :1] > 0.5)


def statistics_of(sums_SK: F64) -> dict[Slice, dict[str, ArmStatistics]]:
    """One arm's sums as ``ArmStatistics``, by slice and metric."""
    statistics: dict[Slice, dict[str, ArmStatistics]] = {}
    for slice_, row in zip(SLICES, sums_SK.tolist(), strict=True):
        viewers, impressions, sum_x, sum_xx, idle_x, idle_xx = row[:_EXPOSURES]
        statistics[slice_] = {
            metric: ArmStatistics(viewers, impressions, sum_x, sum_y, sum_xx, sum_yy, sum_xy, idle_x, idle_xx)
            for metric, sum_y, sum_yy, sum_xy in zip(
                METRICS, row[_EXPOSURES::3], row[_EXPOSURES + 1 :: 3], row[_EXPOSURES + 2 :: 3], strict=True
            )
        }
    return statistics
