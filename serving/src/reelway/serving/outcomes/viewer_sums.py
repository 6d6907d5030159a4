"""The arithmetic of sums clustered by viewer: what a batch of impressions and outcomes adds. Pure functions on arrays.

If a viewer's totals change by (dx, dy), the sums over viewers grow by ``sum_xx += dx (2x + dx)``,
``sum_yy += dy (2y + dy)``, ``sum_xy += dx y + x dy + dx dy``. Every term is at least 0, so the counters never decrease
and nothing cancels. Up to rounding, the result equals the sums over all events at once.
"""

# Shapes: R rows, U viewers (of one arm each), S slices, M metrics, C = 1 + M columns: x, then y of each metric

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Final

import numpy as np
from numpy.typing import NDArray

from reelway.platform.rollout.evidence import ArmStatistics
from reelway.platform.rollout.metric_names import EXPOSURE_STATISTICS, METRIC_STATISTICS, OUTCOME_METRICS
from reelway.platform.rollout.policy import Slice
from reelway.platform.tokens import ALL_SLICES, SLICE_BITS

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]

SLICES: Final = (Slice.OVERALL, *SLICE_BITS)
METRICS: Final = OUTCOME_METRICS
COLUMNS_PER_VIEWER: Final = 1 + len(METRICS)
_EXPOSURES: Final = len(EXPOSURE_STATISTICS)
SUMS_PER_ARM: Final = _EXPOSURES + len(METRIC_STATISTICS) * len(METRICS)
"""Numbers per slice of an arm: the exposure statistics, then sum_y, sum_yy, sum_xy of every metric."""

_MEMBER: Final = np.array(
    [[True, *(bool(mask & bit) for bit in SLICE_BITS.values())] for mask in range(ALL_SLICES + 1)]
)  # [mask, S]
_PRESENCE_BITS: Final = 1 << np.arange(len(SLICES), dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class TotalsDelta:
    """R rows to add to viewer totals. An impression adds to column 0, an outcome to its metric's column."""

    key: I64  # identifies the viewer and its arm
    slices: U8  # tokens.SLICE_BITS
    column: I64
    amount: F64  # times the overlap weight
    impressions: I64  # number of impressions in the row; 0 for outcomes

    @classmethod
    def joined(cls, parts: Sequence[TotalsDelta]) -> TotalsDelta:
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def take(self, rows: NDArray[np.bool_]) -> TotalsDelta:
        return TotalsDelta(*(getattr(self, field.name)[rows] for field in fields(self)))


@dataclass(frozen=True, slots=True)
class ViewerTotals:
    """Totals of U viewers. ``present`` has a bit per slice in which the viewer had an impression or outcome."""

    totals: F64  # [U, S, C]
    present: U8

    @classmethod
    def unknown(cls, viewers: int) -> ViewerTotals:
        return cls(np.zeros((viewers, len(SLICES), COLUMNS_PER_VIEWER)), np.zeros(viewers, np.uint8))


def apply_delta(
    before: ViewerTotals, additions: TotalsDelta, key_U: I64, arm_U: I64, arms: int
) -> tuple[ViewerTotals, F64]:
    """Adds rows to the totals of their viewers.

    Args:
        key_U: all keys of the additions, ascending.
        arm_U: the arm of each viewer, 0..arms-1.

    Returns:
        The new totals, and the growth of each arm's sums, ``[arms, S, SUMS_PER_ARM]``.
    """
    viewers, viewer_R = len(key_U), np.searchsorted(key_U, additions.key)
    delta_USC = np.empty_like(before.totals)
    seen_US = np.zeros((viewers, len(SLICES)), bool)
    shown_US = np.zeros((viewers, len(SLICES)))
    flat_R = viewer_R * COLUMNS_PER_VIEWER + additions.column
    for part in range(len(SLICES)):
        rows = np.flatnonzero(_MEMBER[additions.slices, part])
        summed = np.bincount(flat_R[rows], additions.amount[rows], minlength=viewers * COLUMNS_PER_VIEWER)
        delta_USC[:, part] = summed.reshape(viewers, COLUMNS_PER_VIEWER)
        owner = viewer_R[rows]
        seen_US[owner, part] = True
        shown_US[:, part] = np.bincount(owner, additions.impressions[rows], minlength=viewers)
    present_U = before.present | (seen_US @ _PRESENCE_BITS).astype(np.uint8)
    new_US = seen_US & ((before.present[:, None] & _PRESENCE_BITS) == 0)
    growth_USK = _growth(before.totals, delta_USC, new_US, shown_US)
    growth = np.zeros((arms, len(SLICES), SUMS_PER_ARM))
    for arm in range(arms):
        growth[arm] = growth_USK[arm_U == arm].sum(axis=0)
    return ViewerTotals(before.totals + delta_USC, present_U), growth


def _growth(totals_USC: F64, delta_USC: F64, new_US: NDArray[np.bool_], shown_US: F64) -> F64:
    x, y = totals_USC[:, :, :1], totals_USC[:, :, 1:]
    dx, dy = delta_USC[:, :, :1], delta_USC[:, :, 1:]
    growth = np.empty((*new_US.shape, SUMS_PER_ARM))
    growth[:, :, 0], growth[:, :, 1] = new_US, shown_US
    growth[:, :, 2:3], growth[:, :, 3:4] = dx, dx * (2.0 * x + dx)
    growth[:, :, _EXPOSURES::3] = dy
    growth[:, :, _EXPOSURES + 1 :: 3] = dy * (2.0 * y + dy)
    growth[:, :, _EXPOSURES + 2 :: 3] = dx * y + x * dy + dx * dy
    return growth


def statistics_of(sums_SK: F64) -> dict[Slice, dict[str, ArmStatistics]]:
    """One arm's sums as ``ArmStatistics``, by slice and metric."""
    statistics: dict[Slice, dict[str, ArmStatistics]] = {}
    for slice_, row in zip(SLICES, sums_SK.tolist(), strict=True):
        viewers, impressions, sum_x, sum_xx = row[:_EXPOSURES]
        statistics[slice_] = {
            metric: ArmStatistics(viewers, impressions, sum_x, sum_y, sum_xx, sum_yy, sum_xy)
            for metric, sum_y, sum_yy, sum_xy in zip(
                METRICS, row[_EXPOSURES::3], row[_EXPOSURES + 1 :: 3], row[_EXPOSURES + 2 :: 3], strict=True
            )
        }
    return statistics
