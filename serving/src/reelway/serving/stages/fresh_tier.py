"""The fresh tier: sources that add the uploads since the release was built to the release's own proposals.

The search over the uploads is exact: at most ``OVERLAY_CAPACITY`` inner products, which is one pass over 10 MB. The
next release has the uploads in its index.
"""

# Shapes: P proposals, M rows of the table's extension, D embedding

from __future__ import annotations

import numpy as np

from reelway.serving.stages.arrays import F32
from reelway.serving.stages.sources import CandidateSource, SourceCandidates, SourceQuery
from reelway.serving.video_table import VideoTable


class AnnWithUploads:
    """Proposes the videos with the largest inner product: those of the index and those of the fresh tier.

    Args:
        index: source of the release's own videos; its proposals have a similarity.
        table: the video table.
    """

    def __init__(self, index: CandidateSource, table: VideoTable) -> None:
        self._index = index
        self._table = table

    def propose(self, query: SourceQuery) -> SourceCandidates:
        built = self._index.propose(query)
        uploads = self._table.uploads
        if not uploads.rows or built.similarity is None:
            return built
        similarity: F32 = self._table.embedding.added[: uploads.rows] @ query.viewer_embedding[0]
        similarity[uploads.replaced] = -np.inf
        is_full = len(built.rows) >= query.limit
        added = np.flatnonzero(similarity > (built.similarity[-1] if is_full else -np.inf))
        if not len(added):
            return built
        if (surplus := len(added) - query.limit) > 0:
            added = added[np.argpartition(similarity[added], surplus)[surplus:]]
        rows = np.concatenate([built.rows, (added + len(self._table)).astype(np.int32)])
        similarity = np.concatenate([built.similarity, similarity[added]])
        best = np.argsort(-similarity, kind="stable")[: query.limit]
        return SourceCandidates(rows[best], similarity[best])


class FreshWithUploads:
    """Proposes new uploads, newest first: those of the release and later ones.

    Args:
        built: source of the release's own videos.
        table: the video table.
        fresh_hours: age up to which a video is new.
    """

    def __init__(self, built: CandidateSource, table: VideoTable, fresh_hours: float) -> None:
        self._built = built
        self._table = table
        self._fresh_s = fresh_hours * 3600

    def propose(self, query: SourceQuery) -> SourceCandidates:
        built = self._built.propose(query)
        uploads, now_s = self._table.uploads, query.viewer.now_s
        first = np.searchsorted(uploads.uploaded_before, -now_s, side="left")  # excludes future uploads
        last = np.searchsorted(uploads.uploaded_before, -(now_s - self._fresh_s), side="right")
        added = uploads.newest_first[first : min(last, first + query.limit)]
        if not len(added):
            return built
        rows = np.concatenate([added, built.rows])
        newest = np.argsort(-self._table.uploaded_at_s[rows], kind="stable")[: query.limit]
        return SourceCandidates(rows[newest])
