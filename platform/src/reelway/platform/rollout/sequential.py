"""Why: a canary is looked at every few seconds, so its verdict must hold at whatever moment somebody stops.

Pure arithmetic on sufficient statistics; it refuses to know what a metric means, what a policy is, or what time it
is. Everything broadcasts, so one call judges a dozen metrics or ten thousand simulated rollouts.

**Estimand.** Per arm, over viewers i with totals (x_i, y_i): ``theta = E[y] / E[x]`` (a plain mean is x_i = 1). What is
judged is the relative difference ``theta_canary / theta_stable - 1``. The viewer is the randomised unit and therefore
the cluster; the delta method gives the variance (Deng, Lu, Litz 2017; Lindon, Ham, Tingley, Bojinov, "Rapid regression
detection in software deployments", arXiv 2205.14762, judge releases at Netflix the same way: at any time).

**Boundary.** One-sided normal mixture: with score S and variance clock V,
``e(S, V) = 2 sqrt(r/(V+r)) exp(S^2 / (2(V+r))) Phi(S / sqrt(V+r))``
is a non-negative supermartingale of mean at most 1 under "no drift upwards" (Howard, Ramdas, McAuliffe, Sekhon 2021,
"Time-uniform, nonparametric, nonasymptotic confidence sequences", Prop. 6), so ``P(ever e >= 1/alpha) <= alpha``
(Ville). It is the mixture SPRT of Robbins 1970 and Johari, Koomen, Pekelis, Walsh 2022 ("Always valid inference"). Here
``V = 1/se^2`` (information), ``S = effect/se^2`` and ``r = 1/scale^2``: a half-normal prior on the size of the effect.
Plugging in estimated variances makes it asymptotic: Waudby-Smith, Arbour, Sinha, Kennedy, Ramdas 2024 ("Time-uniform
central limit theory and asymptotic confidence sequences", arXiv 2103.06476) and, with a burn-in as the minimum exposure
here, Bibaut, Kallus, Lindon 2022 (arXiv 2212.14411). Bounded outcomes with few viewers could use betting (Waudby-Smith,
Ramdas 2023) instead; that needs rows, not counters.

**A viewer's totals grow while we look.** Then the score does not have independent increments: a viewer who liked more
than average so far will go on doing so, and a martingale argument fails. What is true instead: the estimates at
different times are jointly Gaussian in the limit, and whenever ``Cov(D_s, D_t) >= Var(D_t)`` for s < t their
correlation is at least ``sqrt(V_s / V_t)``, that of the Brownian motion for which the boundary was made. By Slepian's
lemma (1962) higher correlations at equal variances make a one-sided crossing *less* likely. So the level holds.
- Equality: a viewer counts once (its window closes), or its increments are independent.
- Strictly greater: viewers differ from each other (random effects) and those seen earlier are, by t, at least as heavy
  as the rest, which is what inspection bias brings about: frequent viewers show up first.
- Can fail: late cohorts much heavier than everyone before. A test simulates one six times as heavy.
The price is power, not validity: nothing is gained from the dependence.

**The ramp.** Weights change in steps and rates change over the day, so pooling arms over steps would compare the
canary's evening with stable's morning (Simpson; Crook, Frasca, Kohavi, Longbotham 2009). Impressions therefore enter
x and y times ``overlap_weight``: both arms then have the same distribution over time (overlap weights: Li, Morgan,
Zaslavsky 2018) and a viewer stays one cluster through the whole rollout. Nothing restarts with a step, so no alpha is
spent per step, and none per look.

**Finite samples, honestly.** The guarantee is asymptotic in viewers and needs a finite third moment or so; it leans on
``minimum_viewers`` and is checked by simulation down to that number. ``ratio_tail_log_bound`` below, for guardrails, is
exact for independent requests at any size (Chernoff 1952; Hoeffding 1963).

**Left out: variance reduction with pre-period data** (CUPED; Deng, Xu, Kohavi, Walker 2013). It would need three more
counters per metric and a past of each viewer at counting time. ``bench_canary`` prints what it would save in the
simulated population, where half of the viewers have a past; new viewers, the first to suffer, never have one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

F64 = NDArray[np.float64]

LOG2 = math.log(2.0)
BASIS_POINTS = 10_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its variance, clustered by viewer. Both NaN where there is nothing to estimate from."""

    value: F64
    variance: F64
    viewers: F64


def overlap_weight(canary_bp: int, stable_bp: int, *, canary: bool) -> float:
    """What one impression adds to x (and, times the outcome, to y) under the weights it was served with.

    The other arm's share of the two: a canary impression at 1 % counts 0.99, a stable one 0.01; at 50 % both 0.5.
    Under constant weights this is a constant and changes nothing. 0 when one of the arms has no traffic, for there is
    nothing to compare with.

    Raises:
        ValueError: a weight outside 0..10000.
    """
    if not (0 <= canary_bp <= BASIS_POINTS and 0 <= stable_bp <= BASIS_POINTS):
        raise ValueError(f"weights {canary_bp} and {stable_bp} basis points, expected 0..{BASIS_POINTS} each")
    both = canary_bp + stable_bp
    return (stable_bp if canary else canary_bp) / both if both else 0.0


def ratio_estimate(
    viewers: ArrayLike, sum_x: ArrayLike, sum_y: ArrayLike, sum_xx: ArrayLike, sum_yy: ArrayLike, sum_xy: ArrayLike
) -> Estimate:
    """``sum y / sum x`` with its delta-method variance; each viewer is one cluster.

    ``Var = n/(n-1) * sum (y_i - theta x_i)^2 / (sum x_i)^2``. Fewer than 2 viewers or no x: NaN.
    """
    n, x, y = np.asarray(viewers, float), np.asarray(sum_x, float), np.asarray(sum_y, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        theta = y / x
        residual = np.asarray(sum_yy) - 2.0 * theta * np.asarray(sum_xy) + theta**2 * np.asarray(sum_xx)
        variance = np.maximum(residual, 0.0) * (n / (n - 1.0)) / x**2
    known = (n >= 2) & (x > 0)
    return Estimate(np.where(known, theta, np.nan), np.where(known, variance, np.nan), n)


def relative_difference(canary: Estimate, stable: Estimate) -> Estimate:
    """``canary / stable - 1`` with its delta-method variance (independent arms). NaN where stable is not positive.

    A canary without any variation (every viewer at 0: a collapse) borrows stable's variance per viewer, so that the
    worst release of all is not the one that cannot be judged.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = canary.value / stable.value
        borrowed = stable.variance * stable.viewers / canary.viewers
        own = np.where(canary.variance > 0, canary.variance, borrowed)
        variance = (own + ratio**2 * stable.variance) / stable.value**2
    known = (stable.value > 0) & np.isfinite(ratio)
    return Estimate(
        np.where(known, ratio - 1.0, np.nan),
        np.where(known & (variance > 0), variance, np.nan),
        np.minimum(canary.viewers, stable.viewers),
    )


def log_normal_cdf(z: ArrayLike) -> F64:
    """``log Phi(z)``, relative error of Phi below 1.2e-7 in both tails (Press et al., Numerical Recipes, erfcc)."""
    u = -np.asarray(z, float) / math.sqrt(2.0)
    t = 1.0 / (1.0 + 0.5 * np.abs(u))
    series = np.zeros_like(t)
    for c in (0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418, 0.37409196,
              1.00002368):  # fmt: skip
        series = t * series + c
    log_erfc = np.log(t) - u * u - 1.26551223 + t * series
    return np.where(u >= 0, log_erfc - LOG2, np.log1p(-0.5 * np.exp(np.minimum(log_erfc, 0.0))))


def log_evidence(effect: ArrayLike, variance: ArrayLike, scale: ArrayLike) -> F64:
    """Log of the e-process against "the effect is not positive"; at least ``log(1/alpha)`` rejects, at any time.

    Args:
        effect: estimate of the effect minus the bound under test.
        variance: its variance at this moment.
        scale: effects of about this size are found with the fewest viewers; any positive value is valid.
    """
    variance = np.asarray(variance, float)
    prior = np.asarray(scale, float) ** 2 / variance
    shrunk = np.asarray(effect, float) / np.sqrt(variance) * np.sqrt(prior / (1.0 + prior))
    return np.asarray(LOG2 - 0.5 * np.log1p(prior) + 0.5 * shrunk**2 + log_normal_cdf(shrunk))


def boundary(variance: ArrayLike, scale: ArrayLike, alpha: ArrayLike) -> F64:
    """How many standard errors the estimate must exceed a bound by for ``log_evidence`` to reach ``log(1/alpha)``.

    Newton's method from above on an increasing convex-enough function; a test holds it to ``log_evidence``.
    """
    prior = np.asarray(scale, float) ** 2 / np.asarray(variance, float)
    target = -np.log(np.asarray(alpha, float)) - LOG2 + 0.5 * np.log1p(prior)
    z = np.sqrt(2.0 * np.maximum(target + LOG2, 1e-12))
    for _ in range(6):
        log_cdf = log_normal_cdf(z)
        slope = z + np.exp(-0.5 * z**2 - 0.5 * math.log(2.0 * math.pi) - log_cdf)
        z = z - (0.5 * z**2 + log_cdf - target) / slope
    return np.asarray(z * np.sqrt((1.0 + prior) / prior))


def lower_sequence(estimate: Estimate, scale: ArrayLike, alpha: ArrayLike) -> F64:
    """One-sided confidence sequence: the truth is, at all times together, above this with probability 1 - alpha."""
    return estimate.value - boundary(estimate.variance, scale, alpha) * np.sqrt(estimate.variance)


def upper_sequence(estimate: Estimate, scale: ArrayLike, alpha: ArrayLike) -> F64:
    """The mirror image of ``lower_sequence``."""
    return estimate.value + boundary(estimate.variance, scale, alpha) * np.sqrt(estimate.variance)


def ratio_tail_log_bound(events: ArrayLike, trials: ArrayLike, limit: ArrayLike) -> F64:
    """Log of an upper bound on ``P(at least this many events)`` when the true ratio is ``limit``: exact Chernoff.

    ``-n KL(k/n || p)`` where k/n exceeds p, else 0 (no evidence of a breach).
    """
    k, n, p = np.asarray(events, float), np.asarray(trials, float), np.asarray(limit, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.where(n > 0, k / n, 0.0)
        divergence = np.where(q > 0, q * np.log(q / p), 0.0)
        divergence = divergence + np.where(q < 1, (1.0 - q) * np.log((1.0 - q) / (1.0 - p)), 0.0)
    return np.where(q > p, -n * divergence, 0.0)
