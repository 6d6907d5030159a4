"""Blends the proposals of all sources into one list by quota, without duplicates."""

# Shapes: P proposals of all sources, C candidates, Q sources

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def whole_quotas(shares: Sequence[float], candidates: int) -> Indices:
    """Converts shares that sum to 1 into whole numbers that sum to ``candidates``. Shapes: ``[Q] -> [Q]``.

    Rounds by the largest-remainder method.
    """
    exact = np.asarray(shares, dtype=np.float64) * candidates
    positions = np.floor(exact + 1e-9).astype(np.int64)
    by_remainder = np.argsort(-(exact - positions), kind="stable")
    positions[by_remainder[: candidates - int(positions.sum())]] += 1
    return positions


def blend(video: Indices, source: Indices, quotas: Indices) -> Indices:
    """Returns the indices of the chosen proposals, best first.

    Each source in turn takes its quota and the unused quota of the sources before it. A second round offers the
    positions that are still empty to all sources. A video counts for the first source that takes it. A source whose
    quota is full does not take it, so a later source that proposes the same video still can.

    The order interleaves the sources in proportion to their numbers of chosen videos. Every prefix of the list is
    therefore a fair sample of all sources, and the list is shown in this order if ranking fails.

    Args:
        video: number of each proposal's video, best first within a source. The work grows with the largest number, so
            number the proposed videos from 0 instead of passing rows of the catalogue. ``[P]``
        source: index of each proposal's source, ascending. ``[P]``
        quotas: number of positions per source. ``[Q]``
    """
    bounds = np.searchsorted(source, np.arange(len(quotas) + 1))
    videos = int(video.max(initial=-1)) + 1
    first_index = np.empty(videos, dtype=np.int64)
    offered = []
    for start, end in itertools.pairwise(bounds):
        proposals = np.arange(start, end)
        first_index[video[start:end][::-1]] = proposals[
            ::-1
        ]  # the last write wins, so this is the first proposal of each video
        offered.append(proposals[first_index[video[start:end]] == proposals])
    used = np.zeros(videos, dtype=np.bool_)
    taken: list[list[Indices]] = [[] for _ in quotas]
    spare = 0
    for round_quotas in (quotas, np.zeros_like(quotas)):
        for q, quota in enumerate(round_quotas.tolist()):
            takes = offered[q][~used[video[offered[q]]]][: quota + spare]
            used[video[takes]] = True
            taken[q].append(takes)
            spare += quota - len(takes)
        if not spare:
            break
    chosen = [np.concatenate(parts) for parts in taken]
    relative_position = np.concatenate(
        [(np.arange(len(proposals)) + 0.5) / max(len(proposals), 1) for proposals in chosen]
    )
    return np.concatenate(chosen)[np.argsort(relative_position, kind="stable")].astype(np.int64)
