"""Re-ranking: selects and orders the slate from the ranked candidates.

| rule                        | how it works                                                                     |
|-----------------------------|----------------------------------------------------------------------------------|
| value minus redundancy      | MMR (Carbonell and Goldstein 1998) over the embeddings of the best candidates    |
| at most n videos a creator  | a creator's n best stay; the cap is broken, and counted, only to fill the slate  |
| least share of a source     | the last of other sources give way to the source's best; their creators' cap holds |
| exploration positions       | drawn uniformly from the rest, fresh uploads first; the propensity is recorded   |
"""

# Shapes: C candidates, E eligible, M head of the candidates that MMR considers, S slate, D embedding

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from reelway.platform.contracts.blend import RerankingSettings
from reelway.serving.stages.arrays import F32, SOURCE_CODES, SOURCES, Codes, Rows, ScoredCandidates, Slate
from reelway.serving.video_table import VideoTable

Indices = NDArray[np.int64]

MIN_EXPLANATION_SIMILARITY: Final = 0.3
"""Cosine similarity from which on a watched video is given as the reason of a recommendation."""


class Reranking:
    """The re-ranking stage of one release."""

    def __init__(self, table: VideoTable, settings: RerankingSettings) -> None:
        self._table = table
        self._settings = settings
        self._min_shares = {SOURCE_CODES[name]: share for name, share in settings.min_shares.items()}

    def rerank(self, candidates: ScoredCandidates) -> Slate:
        """Returns a slate of ``candidates.count`` videos, or of all candidates if there are fewer.

        Candidates that this process's table does not have yet are left out.
        """
        candidates = candidates.where(self._table.has_rows(candidates.rows))
        rows, value, count = candidates.rows, candidates.value, min(candidates.count, len(candidates))
        by_value = np.argsort(-value, kind="stable")
        known_creator = self._table.creator_id[rows[by_value]]
        occurrence = occurrences(known_creator)
        within_cap = (occurrence < self._settings.max_per_creator) | (known_creator < 0)
        eligible_E = by_value[within_cap]
        over_cap = by_value[~within_cap]

        explored = min(self._settings.exploration_slots, count, max(len(eligible_E) - (count - 1), 0))
        chosen = self._mmr_order(rows, value, eligible_E, count - explored)
        chosen = with_min_shares(chosen, eligible_E, candidates.source, self._min_shares, count)
        drawn, propensity = self._explore(candidates.source, eligible_E, chosen, explored, candidates.seed)
        cap_violations = max(count - len(chosen) - len(drawn), 0)
        chosen = np.concatenate([chosen, over_cap[:cap_violations]])
        order, chance = _interleave(chosen, drawn, propensity)
        return Slate(
            rows=rows[order],
            source=candidates.source[order],
            trigger_rows=self._with_triggers(rows[order], candidates.trigger_rows[order], candidates.liked_rows),
            score=value[order],
            propensity=chance,
            cap_violations=cap_violations,
        )

    def _mmr_order(self, rows: Rows, value: F32, eligible_E: Indices, count: int) -> Indices:
        """Returns the greedy MMR order of the best eligible candidates; with diversity 0, the order of value."""
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
        for position in range(len(picks)):
            picks[position] = best = int(np.argmax(score_M - redundant_M))
            np.maximum(redundant_M, penalty_MM[best], out=redundant_M)
            score_M[best] = -np.inf
        return head_M[picks]

    def _explore(
        self, source: Codes, eligible_E: Indices, chosen: Indices, explored: int, seed: int
    ) -> tuple[Indices, float]:
        """Draws ``explored`` of the candidates that were not chosen, uniformly.

        Returns the drawn candidates and the probability of each at one position.
        """
        if not explored:
            return chosen[:0], 1.0
        rest = eligible_E[~np.isin(eligible_E, chosen)]
        fresh = rest[source[rest] == SOURCE_CODES["fresh"]]
        pool = fresh if len(fresh) >= explored else rest
        drawn = np.random.default_rng(seed).choice(pool, size=min(explored, len(pool)), replace=False)
        return drawn, 1.0 / max(len(pool), 1)

    def _with_triggers(self, rows: Rows, trigger_rows: Rows, liked_rows: Rows) -> Rows:
        """Returns the trigger rows; a missing one becomes the nearest liked video if that is similar enough."""
        liked_rows = liked_rows[self._table.has_rows(liked_rows)]
        if not len(liked_rows) or not len(rows):
            return trigger_rows
        cosine = self._table.embedding[rows] @ self._table.embedding[liked_rows].T
        closest = cosine.argmax(axis=1)
        near = (trigger_rows < 0) & (cosine[np.arange(len(rows)), closest] >= MIN_EXPLANATION_SIMILARITY)
        return np.where(near, liked_rows[closest], trigger_rows).astype(np.int32)


def with_min_shares(
    chosen: Indices, eligible_E: Indices, source: Codes, min_shares: Mapping[int, float], count: int
) -> Indices:
    """Replaces the last chosen candidates of other sources until every source has its least share, if it can.

    A candidate gives way only if its own source keeps its least share. The best candidate of a source takes the place
    of the last one that gives way, so the first positions of the slate stay those of the highest values.

    Args:
        chosen: indices of candidates, best first.
        eligible_E: indices of all candidates that may be chosen, by value, best first.
        min_shares: code of a source -> share.
        count: length of the slate.
    """
    least, have = [0] * len(SOURCES), np.bincount(source[chosen], minlength=len(SOURCES)).tolist()
    for code, share in min_shares.items():
        least[code] = int(share * count + 1e-9)
    missing = [code for code in min_shares if have[code] < least[code]]
    if not missing:
        return chosen
    result, codes = chosen.copy(), source[chosen].tolist()
    is_rest = np.ones(len(source), dtype=np.bool_)
    is_rest[chosen] = False
    rest = eligible_E[is_rest[eligible_E]]
    source_of_rest = source[rest]
    last = len(result) - 1
    for code in missing:
        for candidate in rest[source_of_rest == code][: least[code] - have[code]].tolist():
            # A source that cannot give a video now cannot do so later, so the search never goes back.
            while last >= 0 and have[codes[last]] <= least[codes[last]]:
                last -= 1
            if last < 0:
                return result
            have[codes[last]] -= 1
            result[last] = candidate
            last -= 1
    return result


def occurrences(values: NDArray[np.int64]) -> Indices:
    """Returns how often each value occurred at earlier indices. Shapes: ``[C] -> [C]``."""
    order = np.argsort(values, kind="stable")
    grouped = values[order]
    starts = np.flatnonzero(np.concatenate([[True], grouped[1:] != grouped[:-1]])) if len(values) else order
    lengths = np.diff(np.concatenate([starts, [len(values)]]))
    counts = np.empty(len(values), dtype=np.int64)
    counts[order] = np.arange(len(values)) - np.repeat(starts, lengths)
    return counts


def _interleave(chosen: Indices, drawn: Indices, propensity: float) -> tuple[Indices, F32]:
    """Spreads the drawn candidates evenly over the slate and keeps the others in order.

    Returns the order and the propensity of each position.
    """
    total = len(chosen) + len(drawn)
    positions = (np.arange(1, len(drawn) + 1) * total) // (len(drawn) + 1)
    is_drawn = np.zeros(total, dtype=np.bool_)
    is_drawn[positions] = True
    order = np.empty(total, dtype=np.int64)
    order[is_drawn], order[~is_drawn] = drawn, chosen
    return order, np.where(is_drawn, propensity, 1.0).astype(np.float32)
