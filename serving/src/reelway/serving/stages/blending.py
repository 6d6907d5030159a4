"""Many sources, one list: places by quota, no video twice, nothing lost that another source could have filled."""

# Shapes: P proposals of all sources, C candidates, Q sources

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from reelway.serving.stages.arrays import Rows

Places = NDArray[np.int64]


def whole_quotas(shares: Sequence[float], candidates: int) -> Places:
    """Shares that sum to 1 as whole places that sum to ``candidates`` (largest remainder). Shapes: ``[Q]``."""
    exact = np.asarray(shares, dtype=np.float64) * candidates
    places = np.floor(exact + 1e-9).astype(np.int64)
    by_remainder = np.argsort(-(exact - places), kind="stable")
    places[by_remainder[: candidates - int(places.sum())]] += 1
    return places


def first_proposals(rows: Rows) -> NDArray[np.bool_]:
    """Which of the concatenated proposals are the first to name their video. Shapes: ``[P] -> [P]``."""
    first = np.zeros(len(rows), dtype=np.bool_)
    first[np.unique(rows, return_index=True)[1]] = True
    return first


def places_taken(available: Places, quotas: Places) -> Places:
    """How many places each source fills. What one cannot fill the next ones do, and after the last the first.

    Shapes: ``[Q], [Q] -> [Q]``; the sum is ``min(sum(quotas), sum(available))``.
    """
    taken = np.zeros_like(quotas)
    spare = 0
    for q, quota in enumerate(quotas):
        taken[q] = min(available[q], quota + spare)
        spare += quota - taken[q]
    for q in range(len(quotas)):
        more = min(available[q] - taken[q], spare)
        taken[q] += more
        spare -= more
    return taken


def blend(source: NDArray[np.int64], quotas: Places) -> NDArray[np.int64]:
    """Places of the chosen proposals, best first.

    The order mixes the sources in proportion to what each got, so that any beginning of the list is a fair sample
    of all: what is shown when ranking is not there to order it.

    Args:
        source: index of each proposal's source, ascending, best first within a source; no video twice. ``[P]``
        quotas: places per source. ``[Q]``
    """
    available = np.bincount(source, minlength=len(quotas))
    taken = places_taken(available, quotas)
    starts = np.concatenate([[0], np.cumsum(available)[:-1]])
    rank = np.arange(len(source)) - starts[source]
    chosen = np.flatnonzero(rank < taken[source])
    place = (rank[chosen] + 0.5) / taken[source[chosen]]
    return chosen[np.argsort(place, kind="stable")]
