"""Where candidates come from. Each source proposes rows of the video table, best first; none of them filters.

A source is asked for more than its quota, so that what the filters and the other sources take away can be made up.
"""

# Shapes: P proposals, D embedding, H history, K neighbours per video

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import faiss
import numpy as np
from numpy.typing import NDArray

from reelway.platform.contracts.release_files import INDEX_OVERFETCH
from reelway.serving.stages.arrays import F32, Rows, ViewerQuery
from reelway.serving.video_table import ABSENT, VideoTable

NONE: Final = np.empty(0, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class Proposal:
    """What one source proposes, best first. ``similarity`` and ``because`` are absent where a source has none."""

    rows: Rows  # [P]
    similarity: F32 | None = None
    because: Rows | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """What a source is asked: for whom, and at most how many."""

    viewer: ViewerQuery
    viewer_embedding: F32  # [1, D]
    wanted: int


class Source(Protocol):
    """One source of candidates."""

    def propose(self, ask: Ask) -> Proposal:
        """At most ``ask.wanted`` videos."""
        ...


class AnnSource:
    """The videos nearest to the viewer by inner product of the two towers.

    An index that keeps the vectors whole answers by itself. One that compresses them proposes ``INDEX_OVERFETCH`` times
    as many, which are scored again with the embeddings of the video table: these are mapped anyway, so the index needs
    no copy of them.

    Args:
        index: FAISS index whose ids are rows of the video table.
        embedding: the video table's, ``[N, D]``.
        probes: lists that an inverted-file index looks into; None for as many as the release was built with. Other
            indexes ignore it.
    """

    def __init__(self, index: faiss.Index, embedding: F32, probes: int | None = None) -> None:
        self._index = index
        self._embedding = embedding
        self._is_exact = isinstance(faiss.downcast_index(index), faiss.IndexFlat | faiss.IndexIVFFlat)
        inverted = faiss.try_extract_index_ivf(index)
        if inverted and probes:
            inverted.nprobe = min(probes, inverted.nlist)

    def propose(self, ask: Ask) -> Proposal:
        wanted = ask.wanted if self._is_exact else INDEX_OVERFETCH * ask.wanted
        similarity, rows = self._index.search(ask.viewer_embedding, min(wanted, self._index.ntotal))
        found = rows[0][rows[0] >= 0].astype(np.int32)
        if self._is_exact:
            return Proposal(found, similarity[0][: len(found)])
        exact = self._embedding.take(found, axis=0) @ ask.viewer_embedding[0]
        best = np.argsort(-exact)[: ask.wanted]
        return Proposal(found[best], exact[best])


class ListSource:
    """A list made offline, the same for everybody or one for each region.

    Args:
        everybody: rows, best first.
        by_region: rows for a region; where a region's list ends, everybody's goes on.
    """

    def __init__(self, everybody: Rows, by_region: Mapping[str, Rows] | None = None) -> None:
        self._everybody = everybody
        self._by_region = {region: np.concatenate([rows, everybody]) for region, rows in (by_region or {}).items()}

    def propose(self, ask: Ask) -> Proposal:
        region = ask.viewer.region
        rows = self._everybody if region is None else self._by_region.get(region, self._everybody)
        return Proposal(rows[: ask.wanted])


class FreshSource:
    """New uploads, newest first. A cold video has no engagement to be found by, so it is found by its age."""

    def __init__(self, table: VideoTable, fresh_hours: float) -> None:
        self._newest_first = np.argsort(-table.uploaded_at_s, kind="stable").astype(np.int32)
        self._uploaded_before = -table.uploaded_at_s[self._newest_first]  # ascending
        self._fresh_s = fresh_hours * 3600

    def propose(self, ask: Ask) -> Proposal:
        first = np.searchsorted(self._uploaded_before, -ask.viewer.now_s, side="left")  # not uploaded in the future
        last = np.searchsorted(self._uploaded_before, -(ask.viewer.now_s - self._fresh_s), side="right")
        return Proposal(self._newest_first[first : min(last, first + ask.wanted)])


class NeighbourSource:
    """Videos that were liked by those who liked what this viewer liked lately (item to item).

    Args:
        neighbours: rows of neighbours for each row, ``[N, K]``, best first, ``ABSENT`` where there are fewer.
        triggers: how many of the latest watched videos are looked at.
    """

    def __init__(self, neighbours: NDArray[np.int32], triggers: int = 20) -> None:
        self._neighbours = neighbours
        self._triggers = triggers

    def propose(self, ask: Ask) -> Proposal:
        liked = ask.viewer.history_rows[ask.viewer.history_weights > 0][-self._triggers :][::-1]  # latest first
        if not len(liked):
            return Proposal(NONE, because=NONE)
        # Neighbour by neighbour over all triggers, so that one watched video doesn't fill the list alone.
        rows = self._neighbours[liked].T.ravel()
        because = np.tile(liked, self._neighbours.shape[1])
        present = rows != ABSENT
        return Proposal(rows[present][: ask.wanted], because=because[present][: ask.wanted])
