"""Sequential tests of canary against stable that are valid at any time.

A canary is evaluated every few seconds, so a test at a fixed horizon would reject too often. The functions compute on
sufficient statistics and broadcast: one call tests a dozen metrics or ten thousand simulated rollouts.

**Estimand.** Per arm, over viewers i with totals (x_i, y_i): ``theta = E[y] / E[x]`` (a plain mean is x_i = 1). Only
viewers that report outcomes are among them, and their totals are bounded, so that none of them decides (decision
0026). The tested effect is the relative difference ``theta_canary / theta_stable - 1``. The viewer is the randomised
unit and therefore the cluster. The delta method gives the variance (Deng, Lu, Litz 2017). Lindon, Ham, Tingley,
Bojinov, "Rapid regression detection in software deployments", arXiv 2205.14762, test releases at Netflix at any time,
too.

**Boundary.** One-sided normal mixture: with score S and variance clock V,
``e(S, V) = 2 sqrt(r/(V+r)) exp(S^2 / (2(V+r))) Phi(S / sqrt(V+r))``
is a non-negative supermartingale of mean at most 1 under "no drift upwards" (Howard, Ramdas, McAuliffe, Sekhon 2021,
"Time-uniform, nonparametric, nonasymptotic confidence sequences", Prop. 6), so ``P(ever e >= 1/alpha) <= alpha``
(Ville). It is the mixture SPRT of Robbins 1970 and Johari, Koomen, Pekelis, Walsh 2022 ("Always valid inference"). Here
``V = 1/se^2`` (information), ``S = effect/se^2`` and ``r = 1/scale^2``: a half-normal prior on the size of the effect.
Estimated variances make the test asymptotic: Waudby-Smith, Arbour, Sinha, Kennedy, Ramdas 2024 ("Time-uniform central
limit theory and asymptotic confidence sequences", arXiv 2103.06476) and, with a burn-in like the minimum exposure used
here, Bibaut, Kallus, Lindon 2022 (arXiv 2212.14411). Betting (Waudby-Smith, Ramdas 2023) would be an alternative for
bounded outcomes of few viewers, but it requires rows instead of counters.

**Viewers return during the test.** The totals of a viewer grow over time, so the score does not have independent
increments: a viewer with many likes so far will probably like more. A martingale argument therefore does not apply.
Instead, the estimates at different times are jointly Gaussian in the limit. If ``Cov(D_s, D_t) >= Var(D_t)`` for s < t,
their correlation is at least ``sqrt(V_s / V_t)``, that of the Brownian motion that the boundary assumes. By Slepian's
lemma (1962) higher correlations at equal variances make a one-sided crossing *less* likely, so the level holds.

- Equality: a viewer counts once (its window closes), or its increments are independent.
- Strictly greater: viewers differ from each other (random effects), and viewers who arrived earlier have at time t at
  least as much activity as the others. Inspection bias has this effect, because frequent viewers arrive first.
- Can fail: late cohorts with much more activity than all earlier ones. A test simulates six times as much.

The dependence costs power, not validity.

**The ramp.** Weights change in steps and rates change over the day, so pooling arms over steps would compare the
canary's evening with stable's morning (Simpson; Crook, Frasca, Kohavi, Longbotham 2009). Impressions therefore enter
x and y times ``overlap_weight``: both arms then have the same distribution over time (overlap weights: Li, Morgan,
Zaslavsky 2018) and a viewer stays one cluster through the whole rollout. No test restarts at a step, so neither steps
nor reconciles spend alpha.

**Finite samples.** The guarantee is asymptotic in the number of viewers and requires about a finite third moment. It
depends on ``minimum_viewers`` and is checked by simulation down to that number. ``log_tail_bound``, for guardrails, is
exact for independent requests at any sample size (Chernoff 1952; Hoeffding 1963).

**Not used: variance reduction with pre-period data** (CUPED; Deng, Xu, Kohavi, Walker 2013). It would require three
more counters per metric and the history of each viewer at counting time. ``bench_canary`` prints its potential saving
in the simulated population, where half of the viewers have a history. New viewers, who are affected first, have none.
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
    """A value and its variance, clustered by viewer. Both are NaN without data."""

    value: F64
    variance: F64
    viewers: F64


def overlap_weight(canary_bp: int, stable_bp: int, *, canary: bool) -> float:
    """Returns the weight of an impression in x and, times the outcome, in y, at the traffic weights it was served with.

    It is the other arm's share of the two: at 1 % a canary impression counts 0.99 and a stable one 0.01; at 50 % both
    count 0.5. Constant traffic weights give a constant factor without effect. 0 if one of the arms has no traffic,
    because there is nothing to compare with.

    Raises:
        ValueError: if a weight is outside 0..10000.
    """
    if not (0 <= canary_bp <= BASIS_POINTS and 0 <= stable_bp <= BASIS_POINTS):
        raise ValueError(f"weights {canary_bp} and {stable_bp} basis points, expected 0..{BASIS_POINTS} each")
    both = canary_bp + stable_bp
    return (stable_bp if canary else canary_bp) / both if both else 0.0


def ratio_estimate(
    viewers: ArrayLike, sum_x: ArrayLike, sum_y: ArrayLike, sum_xx: ArrayLike, sum_yy: ArrayLike, sum_xy: ArrayLike
) -> Estimate:
    """Returns ``sum y / sum x`` with its delta-method variance; each viewer is one cluster.

    ``Var = n/(n-1) * sum (y_i - theta x_i)^2 / (sum x_i)^2``. NaN for fewer than 2 viewers or no x.
    """
    n, x, y = np.asarray(viewers, float), np.asarray(sum_x, float), np.asarray(sum_y, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        theta = y / x
        residual = np.asarray(sum_yy) - 2.0 * theta * np.asarray(sum_xy) + theta**2 * np.asarray(sum_xx)
        variance = np.maximum(residual, 0.0) * (n / (n - 1.0)) / x**2
    known = (n >= 2) & (x > 0)
    return Estimate(np.where(known, theta, np.nan), np.where(known, variance, np.nan), n)


def relative_difference(canary: Estimate, stable: Estimate) -> Estimate:
    """Returns ``canary / stable - 1`` with its delta-method variance (independent arms). NaN if stable is not positive.

    A canary without variation (all viewers at 0) uses stable's variance per viewer, so that a complete collapse can be
    tested.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = canary.value / stable.value
        stable_variance = stable.variance * stable.viewers / canary.viewers
        canary_variance = np.where(canary.variance > 0, canary.variance, stable_variance)
        variance = (canary_variance + ratio**2 * stable.variance) / stable.value**2
    known = (stable.value > 0) & np.isfinite(ratio)
    return Estimate(
        np.where(known, ratio - 1.0, np.nan),
        np.where(known & (variance > 0), variance, np.nan),
        np.minimum(canary.viewers, stable.viewers),
    )


def log_normal_cdf(z: ArrayLike) -> F64:
    """Returns ``log Phi(z)``, with a relative error of Phi below 1.2e-7 in both tails.

    Source: Press et al., Numerical Recipes, ``erfcc``.
    """
    u = -np.asarray(z, float) / math.sqrt(2.0)
    t = 1.0 / (1.0 + 0.5 * np.abs(u))
    series = np.zeros_like(t)
    for c in (0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418, 0.37409196,
              1.00002368):  # fmt: skip
        series = t * series + c
    log_erfc = np.log(t) - u * u - 1.26551223 + t * series
    return np.where(u >= 0, log_erfc - LOG2, np.log1p(-0.5 * np.exp(np.minimum(log_erfc, 0.0))))


def log_e_value(effect: ArrayLike, variance: ArrayLike, scale: ArrayLike) -> F64:
    """Returns the log of the e-process against "the effect is not positive"; ``log(1/alpha)`` rejects at any time.

    Args:
        effect: estimate of the effect minus the bound under test.
        variance: current variance of the estimate.
        scale: effect size that is detected with the fewest viewers; any positive value is valid.
    """
    variance = np.asarray(variance, float)
    prior = np.asarray(scale, float) ** 2 / variance
    shrunk = np.asarray(effect, float) / np.sqrt(variance) * np.sqrt(prior / (1.0 + prior))
    return np.asarray(LOG2 - 0.5 * np.log1p(prior) + 0.5 * shrunk**2 + log_normal_cdf(shrunk))


def rejection_boundary(variance: ArrayLike, scale: ArrayLike, alpha: ArrayLike) -> F64:
    """Returns the standard errors beyond a bound at which ``log_e_value`` reaches ``log(1/alpha)``.

    Uses Newton's method, starting above the root; a test compares the result with ``log_e_value``.
    """
    prior = np.asarray(scale, float) ** 2 / np.asarray(variance, float)
    target = -np.log(np.asarray(alpha, float)) - LOG2 + 0.5 * np.log1p(prior)
    z = np.sqrt(2.0 * np.maximum(target + LOG2, 1e-12))
    for _ in range(6):
        log_cdf = log_normal_cdf(z)
        slope = z + np.exp(-0.5 * z**2 - 0.5 * math.log(2.0 * math.pi) - log_cdf)
        z = z - (0.5 * z**2 + log_cdf - target) / slope
    return np.asarray(z * np.sqrt((1.0 + prior) / prior))


def lower_confidence_sequence(estimate: Estimate, scale: ArrayLike, alpha: ArrayLike) -> F64:
    """Returns a one-sided confidence sequence: with probability 1 - alpha the true value is above it at all times."""
    return estimate.value - rejection_boundary(estimate.variance, scale, alpha) * np.sqrt(estimate.variance)


def upper_confidence_sequence(estimate: Estimate, scale: ArrayLike, alpha: ArrayLike) -> F64:
    """Returns a one-sided confidence sequence: with probability 1 - alpha the true value is below it at all times."""
    return estimate.value + rejection_boundary(estimate.variance, scale, alpha) * np.sqrt(estimate.variance)


def log_tail_bound(events: ArrayLike, trials: ArrayLike, limit: ArrayLike) -> F64:
    """Returns the log of an upper bound on ``P(at least this many events)`` if the true ratio is ``limit`` (Chernoff).

    ``-n KL(k/n || p)`` if k/n exceeds p, else 0 (no evidence of a breach).
    """
    k, n, p = np.asarray(events, float), np.asarray(trials, float), np.asarray(limit, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.where(n > 0, k / n, 0.0)
        divergence = np.where(q > 0, q * np.log(q / p), 0.0)
        divergence = divergence + np.where(q < 1, (1.0 - q) * np.log((1.0 - q) / (1.0 - p)), 0.0)
    return np.where(q > p, -n * divergence, 0.0)
