"""Viewers for simulated rollouts. They differ from each other, return, and are counted as the service counts.

Their contributions are bounded and some are no evidence, with the constants of ``serving.outcomes.viewer_sums``. A
viewer's class may change with its second session, so a second session also changes what the first one contributed.

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
from reelway.serving.outcomes.viewer_sums import (
    JUDGED_FROM,
    LARGEST_PER_IMPRESSION,
    MAX_IMPRESSIONS,
    METRICS,
    SATURATED_ABOVE,
)

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
LINEAR = N_X + N_Y + N_X
"""Columns of sums: x, y, and x of idle viewers."""
QUADRATIC = N_X + 2 * N_Y + N_X
"""Columns of products: xx, yy, xy, and xx of idle viewers."""


COUNTS = ("evidence", "new_evidence", "impressions", "silent", "saturated")
WATCH_S_AT_MOST = float(LARGEST_PER_IMPRESSION[METRICS.index("watch_s_per_impression")])
NEVER_REPORTS = 0.05
"""Share of viewers whose client reports no outcomes."""
_LIMITS = {name: float(limit) for name, limit in zip(METRICS, SATURATED_ABOVE, strict=True)}


@dataclass(frozen=True)
class Cohorts:
    """Sums over one cohort per rollout. First axis: rollouts.

    ``linear`` holds what first sessions add, the change that second sessions make to it, and what they add themselves;
    ``pairs`` the products of sessions (1,1), the change of these, (1,2) + (2,1), and (2,2).
    """

    arrived: F32  # [rollouts]
    counts: F32  # [rollouts, first sessions and the change by second ones, COUNTS]
    linear: F32  # [rollouts, 3, LINEAR]
    pairs: F32  # [rollouts, 4, QUADRATIC]


class Population:
    """The viewers of one arm. ``change`` multiplies a metric's rate: {"long_watch_rate": 0.9}."""

    def __init__(self, seed: int, change: Mapping[str, float] | None = None) -> None:
        rng = np.random.default_rng(seed)
        new, self.sessions = _viewers(rng, POOL, dict(change or {}))
        self._fill(rng, _rows(new, self.sessions, rng.random(POOL) >= NEVER_REPORTS))

    @classmethod
    def forged(cls, impressions: int, *, long_watch: float, skip: float, reports: bool = True) -> Population:
        """Returns viewers that somebody invented, all of whom do the same on every impression of one session.

        Args:
            long_watch: 1 for a watch of twice the duration and a like of every video, 0 for none.
            skip: whether they skip every video.
            reports: whether they report at all.
        """
        first = np.zeros((1, N_X + N_Y))
        first[:, 0], first[:, 1], first[:, 2], first[:, 3] = (
            impressions, impressions, impressions // 5, impressions // 4
        )  # fmt: skip
        for row, (metric, part) in enumerate(TESTS):
            x = first[:, X_OF[part]]
            rate = {"long_watch_rate": long_watch, "watch_s_per_impression": 40.0 * long_watch, "skip_rate": skip}
            first[:, N_X + row] = x * rate.get(metric, long_watch if metric == "like_rate" else 0.0)
        population = cls.__new__(cls)
        population.sessions = (first, np.zeros_like(first))
        population.rows = _rows(np.ones(1, bool), population.sessions, np.full(1, reports))
        return population

    def _fill(self, rng: np.random.Generator, rows: F32) -> None:
        self.rows = rows
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
        if len(self.rows) == 1:  # all viewers are equal
            return _split(viewers, viewers[:, None].astype(np.float32) * self.rows)
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
        return _split(viewers, sums)


def _split(viewers: NDArray[np.int64], sums: F32) -> Cohorts:
    """Returns sums of rows ``[rollouts, columns]`` as cohorts."""
    ends = np.cumsum([2 * len(COUNTS), 3 * LINEAR, 4 * QUADRATIC])
    return Cohorts(
        viewers.astype(np.float32),
        sums[:, : ends[0]].reshape(-1, 2, len(COUNTS)),
        sums[:, ends[0] : ends[1]].reshape(-1, 3, LINEAR),
        sums[:, ends[1] : ends[2]].reshape(-1, 4, QUADRATIC),
    )


def _viewers(rng: np.random.Generator, n: int, change: dict[str, float]) -> tuple[NDArray[np.bool_], tuple[F64, F64]]:
    """Returns who is new, and x and y of both sessions, ``[n, N_X + N_Y]``. Half of the viewers return."""

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
        seconds = np.minimum(seconds, WATCH_S_AT_MOST * x)
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
    return new, (sessions[0].astype(np.float64), sessions[1].astype(np.float64))


def _rows(new: NDArray[np.bool_], sessions: tuple[F64, F64], reports: NDArray[np.bool_]) -> F32:
    """Returns one row per viewer: the columns of ``Cohorts`` one after the other."""
    first, second = sessions
    classes = [_classes(done, reports) for done in (first, first + second)]
    factors = [
        c["evidence"] * np.minimum(1.0, MAX_IMPRESSIONS / np.maximum(done[:, 0], 1.0))
        for c, done in zip(classes, (first, first + second), strict=True)
    ]
    counts = [
        np.stack([c["evidence"], c["evidence"] * new, factor * done[:, 0], c["silent"], c["saturated"]], axis=1)
        for c, factor, done in zip(classes, factors, (first, first + second), strict=True)
    ]
    one, two = (_factors(factor, c["idle"]) for c, factor in zip(classes, factors, strict=True))
    linear = [one[0] * _sums(first), (two[0] - one[0]) * _sums(first), two[0] * _sums(second)]
    pairs = [
        one[1] * _products(first, first), (two[1] - one[1]) * _products(first, first),
        two[1] * 2 * _symmetric(first, second), two[1] * _products(second, second),
    ]  # fmt: skip
    return np.concatenate([counts[0], counts[1] - counts[0], *linear, *pairs], axis=1).astype(np.float32)


def _factors(factor: F64, idle: NDArray[np.bool_]) -> tuple[F64, F64]:
    """Returns the factors of each column of ``LINEAR`` and ``QUADRATIC``."""
    factors = []
    for columns, power in ((LINEAR, 1), (QUADRATIC, 2)):
        every = np.repeat(factor[:, None] ** power, columns, axis=1)
        every[:, columns - N_X :] *= idle[:, None]
        factors.append(every)
    return factors[0], factors[1]


def _sums(done: F64) -> F64:
    return np.concatenate([done, done[:, :N_X]], axis=1)


def _classes(done: F64, reports: NDArray[np.bool_]) -> dict[str, NDArray[np.bool_]]:
    """Returns the classes of ``viewer_sums.classify_viewers``, over the metrics of the default policy."""
    overall = {metric: N_X + row for row, (metric, part) in enumerate(TESTS) if part is Slice.OVERALL}
    judged = reports & (done[:, 0] >= JUDGED_FROM)
    saturated = judged & np.any([done[:, row] > _LIMITS[name] * done[:, 0] for name, row in overall.items()], axis=0)
    pleased = (done[:, overall["long_watch_rate"]] > 0) | (done[:, overall["like_rate"]] > 0)
    return {
        "silent": ~reports, "saturated": saturated, "idle": judged & ~saturated & ~pleased,
        "evidence": reports & ~saturated,
    }  # fmt: skip


def _products(a: F64, b: F64) -> F64:
    xa, ya, xb, yb = a[:, :N_X], a[:, N_X:], b[:, :N_X], b[:, N_X:]
    return np.concatenate([xa * xb, ya * yb, xa[:, X_ROW] * yb, xa * xb], axis=1)


def _symmetric(a: F64, b: F64) -> F64:
    return 0.5 * (_products(a, b) + _products(b, a))
