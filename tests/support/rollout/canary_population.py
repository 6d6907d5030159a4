"""Viewers for simulated rollouts. They differ from each other, return, and are counted as the service counts.

Thousands of rollouts at once are drawn as sums over viewers. A pool of simulated viewers, each with two sessions and
all cross products between them, is summed into blocks. A cohort of K viewers consists of a few blocks and a few single
viewers from the pool. From ``GAUSSIAN_FROM`` viewers on, it is a Gaussian with the pool's moments, so only sums over
thousands of independent viewers are approximated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reelway.platform.rollout.policy import Slice

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

POOL = 60_000
BLOCKS = ((256, 6_000), (16, 20_000))
GAUSSIAN_FROM = 4_096

# (metric, slice) -> (row of x, row of y); the rows of x come first.
X_OF = {Slice.OVERALL: 0, Slice.NEW_VIEWERS: 1, Slice.NEW_VIDEOS: 2, Slice.SMALL_CREATORS: 3}
TESTS: tuple[tuple[str, Slice], ...] = (
    ("long_watch_rate", Slice.OVERALL),
    ("long_watch_rate", Slice.NEW_VIEWERS),
    ("long_watch_rate", Slice.NEW_VIDEOS),
    ("long_watch_rate", Slice.SMALL_CREATORS),
    ("watch_s_per_impression", Slice.OVERALL),
    ("watch_s_per_impression", Slice.NEW_VIEWERS),
    ("like_rate", Slice.OVERALL),
    ("skip_rate", Slice.OVERALL),
    ("not_interested_rate", Slice.OVERALL),
    ("report_rate", Slice.OVERALL),
)
X_ROW = np.array([X_OF[part] for _, part in TESTS])
N_X, N_Y = len(X_OF), len(TESTS)
LINEAR = N_X + N_Y
QUADRATIC = N_X + 2 * N_Y


@dataclass(frozen=True)
class Cohorts:
    """Sums over one cohort per rollout. First axis: rollouts. ``pairs`` holds sessions (1,1), (1,2) + (2,1), (2,2)."""

    viewers: F32  # [rollouts, 2]: all, new
    linear: F32  # [rollouts, 2 sessions, LINEAR]
    pairs: F32  # [rollouts, 3, QUADRATIC]


class Population:
    """The viewers of one arm. ``change`` multiplies a metric's rate: {"long_watch_rate": 0.9}."""

    def __init__(self, seed: int, change: Mapping[str, float] | None = None) -> None:
        rng = np.random.default_rng(seed)
        self.rows = _viewers(rng, POOL, dict(change or {}))
        self.blocks = [
            (size, np.stack([self.rows[i].sum(0) for i in rng.integers(0, POOL, (count, size))]))
            for size, count in BLOCKS
        ]
        centred = self.rows.astype(np.float64)
        self.mean = centred.mean(0)
        covariance = np.cov(centred, rowvar=False)
        values, vectors = np.linalg.eigh(covariance)
        self.root = (vectors * np.sqrt(np.maximum(values, 0.0))).astype(np.float32)

    def cohorts(self, rng: np.random.Generator, viewers: NDArray[np.int64]) -> Cohorts:
        """Draws one cohort of this many viewers for each rollout."""
        sums = np.zeros((len(viewers), self.rows.shape[1]), dtype=np.float32)
        large = viewers >= GAUSSIAN_FROM
        if large.any():
            k = viewers[large, None]
            noise = rng.standard_normal((int(large.sum()), self.rows.shape[1]), dtype=np.float32) @ self.root.T
            sums[large] = k * self.mean + np.sqrt(k) * noise
        left = np.where(large, 0, viewers)
        for size, block in (*self.blocks, (1, self.rows)):
            count = left // size
            left = left - count * size
            for taken in range(int(count.max(initial=0))):
                where = np.flatnonzero(count > taken)
                sums[where] += block[rng.integers(0, len(block), len(where))]
        ends = np.cumsum([1, 2 * LINEAR, 3 * QUADRATIC])
        return Cohorts(
            np.stack([viewers.astype(np.float32), sums[:, 0]], axis=1),
            sums[:, ends[0] : ends[1]].reshape(-1, 2, LINEAR),
            sums[:, ends[1] : ends[2]].reshape(-1, 3, QUADRATIC),
        )


def _viewers(rng: np.random.Generator, n: int, change: dict[str, float]) -> F32:
    """Returns rows of (is new, x and y of both sessions, products of all session pairs). Half of the viewers return."""

    def rate(metric: str) -> float:
        return change.get(metric, 1.0)

    new = rng.random(n) < 0.3
    pace = rng.gamma(2.0, np.where(new, 4.0, 6.0))
    long_watch = np.clip(rng.beta(4.0, 6.0, n) * np.where(new, 0.9, 1.0) * rate("long_watch_rate"), 0, 1)
    watch_s = 12.0 * rng.gamma(6.0, 1 / 6.0, n) * rate("watch_s_per_impression")
    like = 0.03 * rng.gamma(1.0, 1.0, n) * rate("like_rate")
    skip = np.clip(rng.beta(3.0, 7.0, n) * rate("skip_rate"), 0, 1)
    annoyed = rng.gamma(0.5, 2.0, n)
    sessions = []
    for number in range(2):
        x = 1 + rng.poisson(pace)
        if number == 1:
            x = np.where(rng.random(n) < 0.5, x, 0)
        x_video, x_creator = rng.binomial(x, 0.2), rng.binomial(x, 0.25)
        watched, seconds = rng.binomial(x, long_watch), rng.gamma(1.5 * np.maximum(x, 1e-9), watch_s / 1.5)
        sessions.append(
            np.stack(
                [
                    x, x * new, x_video, x_creator,
                    watched, watched * new, rng.binomial(x_video, 0.95 * long_watch),
                    rng.binomial(x_creator, 0.95 * long_watch), seconds, seconds * new,
                    rng.poisson(x * like), rng.binomial(x, skip),
                    rng.poisson(x * 0.002 * annoyed * rate("not_interested_rate")),
                    rng.poisson(x * 0.0004 * annoyed * rate("report_rate")),
                ],
                axis=1,
            )
        )  # fmt: skip
    first, second = sessions
    pairs = [_products(first, first), 2 * _symmetric(first, second), _products(second, second)]
    return np.concatenate([new[:, None], first, second, *pairs], axis=1).astype(np.float32)


def _products(a: F64, b: F64) -> F64:
    xa, ya, xb, yb = a[:, :N_X], a[:, N_X:], b[:, :N_X], b[:, N_X:]
    return np.concatenate([xa * xb, ya * yb, xa[:, X_ROW] * yb], axis=1)


def _symmetric(a: F64, b: F64) -> F64:
    return 0.5 * (_products(a, b) + _products(b, a))
