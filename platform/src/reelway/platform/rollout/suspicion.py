"""Compares the audiences of the two arms, to detect invented viewers and forged outcomes. Pure functions.

Both arms draw their viewers from the same traffic, so at equal times they have equal shares of everything that the
release does not cause. A difference is a suspicion: it holds the rollout, and it is never a reason to roll back or
promote. Every viewer counts with ``sequential.overlap_weight`` at its first impression of the rollout, so the arms
are comparable over the ramp, and a viewer that moves from stable to the canary counts once.

- ``new_viewers``: the arms have different (weighted) numbers of new viewers. A release cannot cause this, because a
  viewer is assigned before its first slate. Somebody picks viewer ids of one arm, or slates of one arm are missing.
  The arm's outcomes are not trusted: neither harm nor its absence counts.
- ``silent_viewers``: the shares of viewers without any outcome differ. They are invented viewers who only ask, or
  viewers who leave because of what the canary shows. The metrics do not tell, because silent viewers are not in them;
  a user must look. Harm among the others still rolls back.
- ``saturated_viewers``: the shares of viewers with the same outcome on nearly every impression differ: forged outcomes.
  They are not in the metrics either.
- ``idle_viewers``: the shares of impressions of viewers who report but watch nothing differ. They are in the metrics,
  because a canary that shows bad videos has such viewers. Harm that they alone explain does not roll back, unless the
  excess is more than ``MAX_FORGED_SHARE`` of the impressions (``explained_harm``).

The tests are one-sided confidence sequences like those of the outcome metrics (``sequential``), with a margin. Their
``alpha`` is divided over all checks and both sides.
"""

# Shapes: any that broadcast, one value per rollout

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from reelway.platform.rollout.sequential import Estimate, ratio_estimate, rejection_boundary

F64 = NDArray[np.float64]

SuspicionName = Literal["new_viewers", "silent_viewers", "saturated_viewers", "idle_viewers"]

MINIMUM_VIEWERS: Final = 200
"""New viewers of each arm from which on the audiences are compared: burn-in of the asymptotic tests."""
TUNED_FOR: Final = {"new_viewers": 0.5, "silent_viewers": 0.05, "saturated_viewers": 0.05, "idle_viewers": 0.05}
"""Difference beyond the margin that is noticed with the fewest viewers. At a weight of 1 %, an attacker with 1 % of the
requests doubles the canary's viewers."""
LEAST_SHARE_VARIANCE: Final = 0.01
"""Variance of one viewer's membership below which an estimate of it is not trusted: few members were seen."""
MAX_FORGED_SHARE: Final = 0.4
"""Largest excess of idle viewers' impressions on the canary that may be forged. A larger one is harm. An attacker
with a tenth of the accounts, each of which counts as often as one viewer can, has a third of the impressions."""
NOTABLE_EXCESS: Final = 0.01
"""Smallest excess of idle viewers that may explain harm, if it is also ``NOTABLE_ERRORS`` standard errors."""
NOTABLE_ERRORS: Final = 3.0


class GroupWeights(NamedTuple):
    """Sums over some of an arm's viewers: of their weights, and of the squares of their weights."""

    sum_w: float | F64 = 0.0
    sum_ww: float | F64 = 0.0


NOBODY: Final = GroupWeights()


@dataclass(frozen=True, slots=True)
class Audience:
    """All viewers of an arm since the rollout began, by group; see ``metric_names.AUDIENCE_GROUPS``.

    ``evidence`` and ``idle`` are weighted by impressions (``ArmStatistics.sum_x``), the other groups by the overlap
    weight of the viewers' first impressions.
    """

    viewers: float | F64 = 0.0
    all: GroupWeights = NOBODY
    silent: GroupWeights = NOBODY
    saturated: GroupWeights = NOBODY
    evidence: GroupWeights = NOBODY
    idle: GroupWeights = NOBODY


@dataclass(frozen=True, slots=True)
class Comparison:
    """One check of both arms: the values, their difference with its confidence sequences, and the finding."""

    name: SuspicionName
    stable: F64
    canary: F64
    difference: F64
    error: F64
    low: F64
    high: F64
    suspected: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class SuspicionVerdict:
    """One comparison of the arms' audiences. ``suspected``: viewers or outcomes may be forged."""

    name: SuspicionName
    suspected: bool
    stable: float
    canary: float
    low: float
    high: float
    sentence: str


_SUSPICION_TEXT: Final[dict[SuspicionName, str]] = {
    "new_viewers": "the canary's number of new viewers is not the one that its traffic weight explains",
    "silent_viewers": "the shares of viewers that reported no outcome differ",
    "saturated_viewers": "the shares of viewers with the same outcome on nearly every impression differ",
    "idle_viewers": "the shares of impressions of viewers that report outcomes but watch nothing differ",
}

CHECKS: Final[tuple[SuspicionName, ...]] = ("new_viewers", "silent_viewers", "saturated_viewers", "idle_viewers")
TAINTS_HARM: Final = frozenset[SuspicionName]({"new_viewers"})
"""Suspicions under which established harm does not roll back."""


def compare_audiences(stable: Audience, canary: Audience, *, alpha: float, margin: float) -> tuple[Comparison, ...]:
    """Returns all checks in the order of ``CHECKS``.

    Args:
        alpha: probability of any suspicion in a rollout whose arms have equal audiences.
        margin: difference that is not suspicious: relative for the numbers of new viewers, else of shares.
    """
    known = (np.asarray(stable.viewers) >= MINIMUM_VIEWERS) & (np.asarray(canary.viewers) >= MINIMUM_VIEWERS)
    each = alpha / (2 * len(CHECKS))
    sides = [_Side.of_numbers(stable, canary)]
    for group, whole in (("silent", "all"), ("saturated", "all"), ("idle", "evidence")):
        shares = [group_share(arm.viewers, *getattr(arm, whole), *getattr(arm, group)) for arm in (stable, canary)]
        difference = share_difference(shares[0], shares[1])
        sides.append(_Side(shares[0].value, shares[1].value, difference.value, difference.variance))
    return tuple(side.judged(name, known, each, margin) for name, side in zip(CHECKS, sides, strict=True))


def group_share(
    viewers: ArrayLike, sum_w: ArrayLike, sum_ww: ArrayLike, group_w: ArrayLike, group_ww: ArrayLike
) -> Estimate:
    """Returns the weighted share of a group and its variance, at least that of a share of 1 %. NaN without viewers."""
    share = ratio_estimate(viewers, sum_w, group_w, sum_ww, group_ww, group_ww)
    with np.errstate(divide="ignore", invalid="ignore"):
        least = LEAST_SHARE_VARIANCE * np.asarray(sum_ww, float) / np.asarray(sum_w, float) ** 2
    return Estimate(share.value, np.maximum(share.variance, least), share.viewers)


def share_difference(stable: Estimate, canary: Estimate) -> Estimate:
    """Returns the canary's share less stable's."""
    return Estimate(
        canary.value - stable.value, canary.variance + stable.variance, np.minimum(canary.viewers, stable.viewers)
    )


def explained_harm(idle: Estimate, overall: Estimate, stable_value: F64, lower_is_better: NDArray[np.bool_]) -> F64:
    """Returns the relative harm that the canary's excess of idle viewers explains; 0 if the excess is not notable.

    An idle viewer has nothing of what is good, and at most one outcome per impression of what is bad. With the share d
    more of their impressions, a good metric of value m falls by ``d m``, and a bad one rises by at most ``d (1 - m)``.

    Args:
        idle: canary's share of idle viewers' impressions less stable's, on the metric's slice.
        overall: the same on all impressions. Forged viewers may all be in one slice, so it is this share that
            ``MAX_FORGED_SHARE`` limits.
        stable_value: the metric's value on stable, per impression.
    """
    excess = idle.value
    with np.errstate(divide="ignore", invalid="ignore"):
        notable = excess > np.maximum(NOTABLE_EXCESS, NOTABLE_ERRORS * np.sqrt(idle.variance))
        real = overall.value - NOTABLE_ERRORS * np.sqrt(overall.variance) > MAX_FORGED_SHARE
        factor = np.where(lower_is_better, np.maximum(1.0 - stable_value, 0.0) / stable_value, 1.0)
        return np.where(notable & ~real, excess * factor, 0.0)


def suspicion_verdict(one: Comparison) -> SuspicionVerdict:
    """Returns the comparison as numbers and a sentence."""
    stable, canary, low, high = (float(value) for value in (one.stable, one.canary, one.low, one.high))
    if one.name == "new_viewers":
        numbers = f"canary {canary / stable - 1.0:+.1%} against stable" if stable > 0 else "no viewers on stable"
        ends = f"{low:+.1%}..{high:+.1%}"
    else:
        numbers = f"canary {canary:.1%}, stable {stable:.1%}"
        ends = f"{max(100 * low, -100):+.1f}..{min(100 * high, 100):+.1f} percentage points"
    finding = "suspected forgery" if bool(one.suspected) else "not suspicious"
    text = f": {_SUSPICION_TEXT[one.name]}" if bool(one.suspected) else ""
    sentence = f"{one.name.replace('_', ' ')}: {finding}{text} ({numbers}, at any time within {ends})"
    return SuspicionVerdict(one.name, bool(one.suspected), stable, canary, low, high, sentence)


class _Side(NamedTuple):
    stable: F64
    canary: F64
    difference: F64
    variance: F64

    @classmethod
    def of_numbers(cls, stable: Audience, canary: Audience) -> _Side:
        """Compares numbers of new viewers. Both expectations are equal, and a sum of squares is a sum's variance."""
        ours, theirs = np.asarray(canary.all.sum_w, float), np.asarray(stable.all.sum_w, float)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = ours / theirs
            variance = (canary.all.sum_ww + ratio**2 * stable.all.sum_ww) / theirs**2
        return cls(theirs, ours, ratio - 1.0, variance)

    def judged(self, name: SuspicionName, known: NDArray[np.bool_], alpha: float, margin: float) -> Comparison:
        usable = known & np.isfinite(self.difference) & np.isfinite(self.variance) & (self.variance > 0)
        variance = np.where(usable, self.variance, 1.0)
        error = np.sqrt(variance)
        width = rejection_boundary(variance, TUNED_FOR[name], alpha) * error
        low, high = self.difference - width, self.difference + width
        return Comparison(
            name, self.stable, self.canary, np.where(usable, self.difference, 0.0), error, low, high,
            usable & ((low > margin) | (high < -margin)),
        )  # fmt: skip
