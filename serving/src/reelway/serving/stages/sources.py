"""The candidate sources. Each source proposes rows of the video table, best first, and does not filter them.

A source is asked for more rows than its quota, to replace those that filters or other sources take away.
"""

# Shapes: P proposals, D embedding, H history, K neighbours per video

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import faiss
import numpy as np
from numpy.typing import NDArray

from reelway.platform.contracts.release_files import INDEX_OVERFETCH
from reelway.serving.stages.arrays import F32, U8, Rows, ViewerQuery
from reelway.serving.stages.index_selection import accepts_selector, select_rows
from reelway.serving.video_table import ABSENT, VideoTable

NO_ROWS: Final = np.empty(0, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class SourceCandidates:
    """The proposals of one source, best first."""

    rows: Rows  # [P]
    similarity: F32 | None = None  # [P] None: the source computes no similarity
    trigger_rows: Rows | None = None  # [P] None: no watched video led to the proposals


@dataclass(frozen=True, slots=True)
class SourceQuery:
    """The input of a source: the viewer and the largest number of proposals."""

    viewer: ViewerQuery
    viewer_embedding: F32  # [1, D]
    limit: int  # includes as many proposals as filters may take away
    searchable: U8 | None = None  # bit per row: whether an index search may return it; None: all rows
    search_limit: int = 0  # ``limit`` for a search that leaves out the other rows


class CandidateSource(Protocol):
    """A source of candidates."""

    def propose(self, query: SourceQuery) -> SourceCandidates:
        """Returns at most ``query.limit`` videos."""
        ...


class AnnSource:
    """Proposes the videos with the largest inner product of viewer and video embedding.

    The results of an index with uncompressed vectors are used unchanged. A compressing index is asked for
    ``INDEX_OVERFETCH`` times as many videos, which are scored again with the exact embeddings of the video table. That
    table is memory-mapped anyway, so the index needs no exact copy of its own.

    Args:
        index: FAISS index whose ids are rows of the video table.
        embedding: embeddings of the video table, ``[N, D]``.
        probes: lists that an inverted-file index searches; None: as many as the release was built with. Other indexes
            ignore it.
    """

    def __init__(self, index: faiss.Index, embedding: F32, probes: int | None = None) -> None:
        self._index = index
        self._embedding = embedding
        self._is_exact = isinstance(faiss.downcast_index(index), faiss.IndexFlat | faiss.IndexIVFFlat)
        inverted = faiss.try_extract_index_ivf(index)
        if inverted and probes:
            inverted.nprobe = min(probes, inverted.nlist)
        self._can_skip_rows = accepts_selector(index)

    def propose(self, query: SourceQuery) -> SourceCandidates:
        searched, parameters = query.limit, None
        if query.searchable is not None and self._can_skip_rows:
            searched, parameters = query.search_limit, select_rows(self._index, query.searchable)
        limit = searched if self._is_exact else INDEX_OVERFETCH * searched
        similarity, rows = self._index.search(query.viewer_embedding, min(limit, self._index.ntotal), params=parameters)
        candidates = rows[0][rows[0] >= 0].astype(np.int32)
        if self._is_exact:
            return SourceCandidates(candidates, similarity[0][: len(candidates)])
        exact = self._embedding.take(candidates, axis=0) @ query.viewer_embedding[0]
        best = np.argsort(-exact)[:searched]
        return SourceCandidates(candidates[best], exact[best])


class FreshSource:
    """Proposes new uploads, newest first: a video without engagement can only be found by its age."""

    def __init__(self, table: VideoTable, fresh_hours: float) -> None:
        uploaded_at_s = table.uploaded_at_s.base
        self._newest_first = np.argsort(-uploaded_at_s, kind="stable").astype(np.int32)
        self._uploaded_before = -uploaded_at_s[self._newest_first]  # ascending
        self._fresh_s = fresh_hours * 3600

    def propose(self, query: SourceQuery) -> SourceCandidates:
        first = np.searchsorted(self._uploaded_before, -query.viewer.now_s, side="left")  # excludes future uploads
        last = np.searchsorted(self._uploaded_before, -(query.viewer.now_s - self._fresh_s), side="right")
        return SourceCandidates(self._newest_first[first : min(last, first + query.limit)])


class NeighbourSource:
    """Proposes neighbours of the videos that this viewer liked most recently, by co-watches or by content.

    A video that was uploaded after the release was built has no neighbours.

    Args:
        neighbours: rows of the neighbours of each row, ``[N, K]``, best first, padded with ``ABSENT``.
        triggers: number of most recently liked videos whose neighbours are proposed.
    """

    def __init__(self, neighbours: NDArray[np.int32], triggers: int = 20) -> None:
        self._neighbours = neighbours
        self._triggers = triggers

    def propose(self, query: SourceQuery) -> SourceCandidates:
        liked = query.viewer.history_rows[query.viewer.history_weights > 0]
        liked = liked[liked < len(self._neighbours)][-self._triggers :][::-1]  # latest first
        if not len(liked):
            return SourceCandidates(NO_ROWS, trigger_rows=NO_ROWS)
        # The best neighbour of every trigger first, then the second best: one trigger cannot fill the list alone.
        rows = self._neighbours[liked].T.ravel()
        trigger_rows = np.tile(liked, self._neighbours.shape[1])
        present = rows != ABSENT
        return SourceCandidates(rows[present][: query.limit], trigger_rows=trigger_rows[present][: query.limit])
