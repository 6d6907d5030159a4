"""Many sources, one list: places by quota, no video twice, nothing lost that another source could have filled."""

# Shapes: P proposals of all sources, C candidates, Q sources

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Places = NDArray[np.int64]


def whole_quotas(shares: Sequence[float], candidates: int) -> Places:
    """Shares that sum to 1 as whole places that sum to ``candidates`` (largest remainder). Shapes: ``[Q]``."""
    exact = np.asarray(shares, dtype=np.float64) * candidates
    places = np.floor(exact + 1e-9).astype(np.int64)
    by_remainder = np.argsort(-(exact - places), kind="stable")
    places[by_remainder[: candidates - int(places.sum())]] += 1
    return places


def blend(video: Places, source: Places, quotas: Places) -> Places:
    """Places of the chosen proposals, best first.

    Sources take in turn, each its quota and what the ones before it could not fill; what is still empty after the last
    one is offered to all again. A video goes to the first source that takes it: one that is proposed far down by one
    source and high up by another is not lost to the first one's quota.

    The order mixes the sources in proportion to what each got, so that any beginning of the list is a fair sample of
    all: what is shown when ranking is not there to order it.

    Args:
        video: what each proposal proposes, best first within a source, as small numbers: work grows with the largest,
            so rows of a catalogue are numbered anew first. ``[P]``
        source: index of each proposal's source, ascending. ``[P]``
        quotas: places per source. ``[Q]``
    """
    bounds = np.searchsorted(source, np.arange(len(quotas) + 1))
    videos = int(video.max(initial=-1)) + 1
    where_first = np.empty(videos, dtype=np.int64)
    offered = []
    for start, end in itertools.pairwise(bounds):
        mine = np.arange(start, end)
        where_first[video[start:end][::-1]] = mine[::-1]  # the last write wins: the first proposal of each video
        offered.append(mine[where_first[video[start:end]] == mine])
    gone = np.zeros(videos, dtype=np.bool_)
    taken: list[list[Places]] = [[] for _ in quotas]
    spare = 0
    for round_quotas in (quotas, np.zeros_like(quotas)):
        for q, quota in enumerate(round_quotas.tolist()):
            takes = offered[q][~gone[video[offered[q]]]][: quota + spare]
            gone[video[takes]] = True
            taken[q].append(takes)
            spare += quota - len(takes)
        if not spare:
            break
    chosen = [np.concatenate(parts) for parts in taken]
    place = np.concatenate([(np.arange(len(mine)) + 0.5) / max(len(mine), 1) for mine in chosen])
    return np.concatenate(chosen)[np.argsort(place, kind="stable")].astype(np.int64)
