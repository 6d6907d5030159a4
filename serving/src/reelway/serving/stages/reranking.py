"""Re-ranking: which of the ranked candidates make the slate, and in which order.

| rule                     | where it comes from                                                        |
|--------------------------|----------------------------------------------------------------------------|
| value, less redundancy   | MMR (Carbonell and Goldstein 1998) over the embeddings of the best ones     |
| at most n per creator    | a creator's n best stay; given up, and counted, only to fill the slate      |
| exploration places       | drawn evenly from what was not chosen, fresh uploads first; propensity kept |
"""

# Shapes: C candidates, E eligible, M head that MMR looks at, S slate, D embedding

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from reelway.platform.contracts.blend import RerankingBlend
from reelway.serving.stages.arrays import F32, SOURCE_CODES, Codes, Rows, Slate
from reelway.serving.video_table import VideoTable

Places = NDArray[np.int64]

CLOSE: Final = 0.3
"""A watched video explains a recommendation when the cosine of their embeddings is at least this."""


class Reranking:
    """The stage: ``rerank`` is the whole of it."""

    def __init__(self, table: VideoTable, settings: RerankingBlend) -> None:
        self._table = table
        self._settings = settings

    def rerank(
        self, rows: Rows, source: Codes, because: Rows, value: F32, liked_rows: Rows, *, count: int, seed: int
    ) -> Slate:
        """The slate: ``count`` videos, or all candidates where there are fewer.

        Args:
            rows, source, because, value: the candidates, in any order, ``[C]``.
            liked_rows: what the viewer watched with a positive weight, to explain the choice by.
            seed: of the exploration.
        """
        count = min(count, len(rows))
        by_value = np.argsort(-value, kind="stable")
        known_creator = self._table.creator_id[rows[by_value]]
        occurrence = occurrences(known_creator)
        within_cap = (occurrence < self._settings.max_per_creator) | (known_creator < 0)
        eligible_E = by_value[within_cap]
        over_cap = by_value[~within_cap]

        explored = min(self._settings.exploration_slots, count, max(len(eligible_E) - (count - 1), 0))
        chosen = self._diverse(rows, value, eligible_E, count - explored)
        drawn, propensity = self._explore(source, eligible_E, chosen, explored, seed)
        relaxed = max(count - len(chosen) - len(drawn), 0)
        chosen = np.concatenate([chosen, over_cap[:relaxed]])
        order, chance = _interleave(chosen, drawn, propensity)
        return Slate(
            rows=rows[order],
            source=source[order],
            because=self._explained(rows[order], because[order], liked_rows),
            score=value[order],
            propensity=chance,
            relaxed=relaxed,
        )

    def _diverse(self, rows: Rows, value: F32, eligible_E: Places, count: int) -> Places:
        """Greedy MMR over the best eligible candidates; at diversity 0 this is the order of value."""
        head_M = eligible_E[: max(self._settings.head, count)]
        diversity = self._settings.diversity
        if diversity == 0.0 or len(head_M) == 0:
            return head_M[:count]
        worth_M = value[head_M]
        spread = float(worth_M[0] - worth_M[-1])
        score_M = (1.0 - diversity) * ((worth_M - worth_M[-1]) / spread if spread > 0 else np.zeros_like(worth_M))
        embedding_MD = self._table.embedding[rows[head_M]]
        penalty_MM = diversity * np.maximum(embedding_MD @ embedding_MD.T, 0.0)
        redundant_M = np.zeros_like(score_M)
        picks = np.empty(min(count, len(head_M)), dtype=np.int64)
        for place in range(len(picks)):
            picks[place] = best = int(np.argmax(score_M - redundant_M))
            np.maximum(redundant_M, penalty_MM[best], out=redundant_M)
            score_M[best] = -np.inf
        return head_M[picks]

    def _explore(
        self, source: Codes, eligible_E: Places, chosen: Places, explored: int, seed: int
    ) -> tuple[Places, float]:
        """Some of what was not chosen, each with the same chance; and that chance for any one place."""
        if not explored:
            return chosen[:0], 1.0
        rest = eligible_E[~np.isin(eligible_E, chosen)]
        fresh = rest[source[rest] == SOURCE_CODES["fresh"]]
        pool = fresh if len(fresh) >= explored else rest
        drawn = np.random.default_rng(seed).choice(pool, size=min(explored, len(pool)), replace=False)
        return drawn, 1.0 / max(len(pool), 1)

    def _explained(self, rows: Rows, because: Rows, liked_rows: Rows) -> Rows:
        """Where no source named a watched video, the closest liked one if it is close enough."""
        if not len(liked_rows) or not len(rows):
            return because
        cosine = self._table.embedding[rows] @ self._table.embedding[liked_rows].T
        closest = cosine.argmax(axis=1)
        near = (because < 0) & (cosine[np.arange(len(rows)), closest] >= CLOSE)
        return np.where(near, liked_rows[closest], because).astype(np.int32)


def occurrences(values: NDArray[np.int64]) -> Places:
    """How often each value occurred before. Shapes: ``[C] -> [C]``."""
    order = np.argsort(values, kind="stable")
    grouped = values[order]
    starts = np.flatnonzero(np.concatenate([[True], grouped[1:] != grouped[:-1]])) if len(values) else order
    lengths = np.diff(np.concatenate([starts, [len(values)]]))
    counts = np.empty(len(values), dtype=np.int64)
    counts[order] = np.arange(len(values)) - np.repeat(starts, lengths)
    return counts


def _interleave(chosen: Places, drawn: Places, propensity: float) -> tuple[Places, F32]:
    """The explored places spread evenly over the slate, the rest in their order around them."""
    total = len(chosen) + len(drawn)
    at = (np.arange(1, len(drawn) + 1) * total) // (len(drawn) + 1)
    is_drawn = np.zeros(total, dtype=np.bool_)
    is_drawn[at] = True
    order = np.empty(total, dtype=np.int64)
    order[is_drawn], order[~is_drawn] = drawn, chosen
    return order, np.where(is_drawn, propensity, 1.0).astype(np.float32)
