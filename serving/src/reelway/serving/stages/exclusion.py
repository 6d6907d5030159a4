"""The rows that an index search may return, and the rows that complete a slate when nearly everything was shown."""

# Shapes: N videos of the table, C candidates

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np

from reelway.platform.features.viewer_memory import NO_IDS
from reelway.serving.stages.arrays import U8, Exclusions, Rows, ViewerQuery
from reelway.serving.stages.filtering import ALLOWED, SEEN, SHOWN, WATCHED, kinds_of
from reelway.serving.video_table import VideoTable

_CACHED: Final = 256
"""Blocked topics whose rows are kept."""
_SAMPLED: Final = 4096
"""Rows of the table among which a completing video is looked for."""


class SearchableRows:
    """Finds the rows that an index search may return, as FAISS's bitmap: one bit per row, low bit first."""

    def __init__(self, table: VideoTable) -> None:
        self._all: U8 = np.full(-(-len(table) // 8), 0xFF, dtype=np.uint8)
        self._table = table
        table.rows_of_creators(NO_IDS)  # sorts the table by creator now, not at a request
        self._topic = table.topic.base
        self._without_topic = lru_cache(_CACHED)(self._bits_without_topic)

    def bits(self, exclusions: Exclusions) -> U8 | None:
        """Returns the bitmap without shown and blocked rows; ``None`` if there are none. Watched rows remain."""
        if not exclusions:
            return None
        bits = self._all.copy()
        rows = exclusions.shown_rows
        if len(exclusions.blocked_creators):
            rows = np.concatenate([rows, self._table.rows_of_creators(exclusions.blocked_creators)[0]])
        rows = rows[rows < len(self._table)]
        np.bitwise_and.at(bits, rows >> 3, ~(1 << (rows & 7)).astype(np.uint8))
        for topic in exclusions.blocked_topics.tolist():
            bits &= self._without_topic(topic)
        return bits

    def _bits_without_topic(self, topic: int) -> U8:
        return np.packbits(self._topic != topic, bitorder="little")


def completing_rows(chosen: Rows, query: ViewerQuery, table: VideoTable) -> Rows:
    """Returns rows that complete ``chosen`` to the requested slate, best first.

    The order is:

    1. videos that were never shown, at random from the whole table;
    2. shown videos, those that were shown longest ago first;
    3. videos that were watched to the end or are in the history.

    Videos that the viewer blocked or disliked, or that may not be served, never complete a slate.
    """
    missing = query.count - len(chosen)
    if missing <= 0:
        return chosen[:0]
    rng = np.random.default_rng(query.seed)
    videos = len(table)
    drawn = rng.permutation(videos) if videos <= _SAMPLED else rng.integers(0, videos, _SAMPLED)
    drawn = drawn[table.uploaded_at_s[drawn] <= query.now_s].astype(np.int32)
    rows = table.servable_rows(np.concatenate([drawn, query.exclusions.shown_rows, query.history_rows]))
    kind = kinds_of(rows, query, table)
    from_memory = np.arange(len(rows)) >= len(drawn)
    tier = np.full(len(rows), 3)
    tier[(kind == WATCHED) | (kind == SEEN)] = 2
    tier[(kind == SHOWN) & from_memory] = 1
    tier[kind == ALLOWED] = 0
    by_tier = rows[np.argsort(tier, kind="stable")[: int((tier < 3).sum())]]
    _, first = np.unique(by_tier, return_index=True)
    distinct = by_tier[np.sort(first)]
    return distinct[~np.isin(distinct, chosen)][:missing]
