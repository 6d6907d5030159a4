"""The array containers that the stages take and return: one value per stage call.

::

    ViewerQuery ─ retrieve ─► Candidates ─► RankingInput ─ rank ─► values ─► ScoredCandidates ─ rerank ─► Slate

A container is pickled when the stages are Ray Serve deployments. It therefore holds a few numpy arrays and scalars, and
never an object per candidate. Rows are rows of the release's video table, which every stage maps into memory. A
candidate costs 13 bytes in ``Candidates``.

To add an input to ranking, change two files: add a field to ``RankingInput`` here and fill it in ``RankingInput.of``;
then pass the field to the model in ``stages/ranking.py``. Code that transports the containers stays unchanged.
"""

# Shapes: H history, C candidates, D embedding, S slate, L liked videos of the history, R shown videos, G filters

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final, get_args

import numpy as np
from numpy.typing import NDArray

from reelway.platform.contracts.blend import SourceName
from reelway.platform.features.assembly import ViewerArrays
from reelway.platform.features.viewer_memory import NO_FILTERS, NO_IDS

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]
Rows = NDArray[np.int32]
Codes = NDArray[np.int8]

SOURCES: Final[tuple[SourceName, ...]] = get_args(SourceName)
"""All sources; the code of a source in an array is its index here."""
NOT_RANKED: Final = np.float32(-np.inf)
"""Value of a candidate that the ranking process does not have: an upload that it has not read yet."""
SOURCE_CODES: Final[dict[SourceName, int]] = {name: code for code, name in enumerate(SOURCES)}


@dataclass(frozen=True, slots=True)
class Exclusions:
    """What is not shown to the viewer, apart from the history: the viewer's memory under the release's policy."""

    shown_rows: Rows  # [R] each once, longest ago first
    watched: U8  # [G, FILTER_BYTES] see ``watched_filter``
    blocked_creators: I64
    blocked_topics: I64

    def __bool__(self) -> bool:
        return any(
            len(part) > 0 for part in (self.shown_rows, self.watched, self.blocked_creators, self.blocked_topics)
        )


NO_EXCLUSIONS: Final = Exclusions(np.empty(0, dtype=np.int32), NO_FILTERS, NO_IDS, NO_IDS)


@dataclass(frozen=True, slots=True)
class ViewerQuery:
    """One viewer at the moment of the request. The input of retrieval."""

    arrays: ViewerArrays  # batch of 1
    history_rows: Rows  # [H] oldest first; only videos that the release has
    history_weights: F32  # [H]
    region: str | None
    now_s: float
    seed: int  # seed of every random choice in this request
    exclusions: Exclusions = NO_EXCLUSIONS
    count: int = 0  # videos requested; retrieval returns at least so many candidates if there are so many videos
    language: str | None = None
    followed_creators: I64 = field(default_factory=lambda: NO_IDS)


@dataclass(frozen=True, slots=True)
class Candidates:
    """The candidates that retrieval returns, best first, and how many proposals were filtered out."""

    rows: Rows  # [C]
    source: Codes  # [C] codes of SOURCES
    similarity: F32  # [C] inner product with the viewer's embedding; 0 in fallbacks
    trigger_rows: Rows  # [C] the watched video that led to the candidate, -1 if none did
    viewer_embedding: F32  # [1, D]
    filtered_counts: dict[str, int] = field(default_factory=dict)  # reason -> proposals

    def __len__(self) -> int:
        return len(self.rows)

    def followed_by(self, rows: Rows, embedding: F32) -> Candidates:
        """Returns the candidates with more rows at the end. Their source is ``popular``, as that of fallbacks is.

        Args:
            embedding: embeddings of the rows, ``[C, D]``.
        """
        return replace(
            self,
            rows=np.concatenate([self.rows, rows]),
            source=np.concatenate([self.source, np.full(len(rows), SOURCE_CODES["popular"], dtype=np.int8)]),
            similarity=np.concatenate([self.similarity, embedding @ self.viewer_embedding[0]]),
            trigger_rows=np.concatenate([self.trigger_rows, np.full(len(rows), -1, dtype=np.int32)]),
        )

    def values_by_position(self) -> F32:
        """Returns values that keep the candidates in their present order: 1 for the first, falling towards 0."""
        return np.linspace(1.0, 0.0, len(self), endpoint=False, dtype=np.float32)

    def to_slate(self, count: int) -> Slate:
        """Returns the first ``count`` candidates in their present order."""
        chosen = slice(0, count)
        return Slate(
            self.rows[chosen],
            self.source[chosen],
            self.trigger_rows[chosen],
            self.values_by_position()[chosen],
            np.ones(len(self.rows[chosen]), dtype=np.float32),
        )


@dataclass(frozen=True, slots=True)
class RankingInput:
    """The input of ranking: the candidates and those arrays of the viewer that the ranker takes."""

    viewer_dense: F32  # [1, ...]
    viewer_categories: I64  # [1, ...]
    viewer_embedding: F32  # [1, D]
    rows: Rows  # [C]
    similarity: F32  # [C]
    now_s: float
    timeout_s: float | None = None  # how long the caller waits for the values; None: without limit

    @classmethod
    def of(cls, query: ViewerQuery, candidates: Candidates) -> RankingInput:
        """Selects the ranker's inputs from the viewer and the candidates."""
        return cls(
            viewer_dense=query.arrays.viewer_dense,
            viewer_categories=query.arrays.viewer_categories,
            viewer_embedding=candidates.viewer_embedding,
            rows=candidates.rows,
            similarity=candidates.similarity,
            now_s=query.now_s,
        )

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, mask: NDArray[np.bool_]) -> RankingInput:
        """Returns the candidates where ``mask`` is true."""
        return replace(self, rows=self.rows[mask], similarity=self.similarity[mask])


@dataclass(frozen=True, slots=True)
class ScoredCandidates:
    """The input of re-ranking: the candidates with their values, in any order."""

    rows: Rows  # [C]
    source: Codes  # [C]
    trigger_rows: Rows  # [C]
    value: F32  # [C]
    liked_rows: Rows  # [L] videos that the viewer watched with a positive weight, to explain the choice with
    count: int  # videos requested
    seed: int  # seed of the exploration

    @classmethod
    def of(cls, query: ViewerQuery, candidates: Candidates, value: F32, count: int) -> ScoredCandidates:
        """Combines the candidates with the values that ranking gave them. Candidates ``NOT_RANKED`` are left out."""
        scored = cls(
            rows=candidates.rows,
            source=candidates.source,
            trigger_rows=candidates.trigger_rows,
            value=value,
            liked_rows=query.history_rows[query.history_weights > 0],
            count=count,
            seed=query.seed,
        )
        ranked = value != NOT_RANKED
        return scored if ranked.all() else scored.where(ranked)

    def where(self, mask: NDArray[np.bool_]) -> ScoredCandidates:
        """Returns the candidates where ``mask`` is true."""
        return replace(
            self, rows=self.rows[mask], source=self.source[mask], trigger_rows=self.trigger_rows[mask],
            value=self.value[mask],
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.rows)

    def top_by_value(self) -> Slate:
        """Returns the ``count`` best candidates by value alone: the slate without re-ranking."""
        best = np.argsort(-self.value, kind="stable")[: self.count]
        return Slate(
            rows=self.rows[best],
            source=self.source[best],
            trigger_rows=self.trigger_rows[best],
            score=self.value[best],
            propensity=np.ones(len(best), dtype=np.float32),
        )


@dataclass(frozen=True, slots=True)
class Slate:
    """The ordered videos of a response, before titles, reasons and tokens are added."""

    rows: Rows  # [S]
    source: Codes  # [S]
    trigger_rows: Rows  # [S]
    score: F32  # [S]
    propensity: F32  # [S] probability of this video at this position; 1 if the position was not drawn at random
    cap_violations: int = 0  # positions that break the per-creator cap because no other candidate was left

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, mask: NDArray[np.bool_]) -> Slate:
        """Returns the videos where ``mask`` is true, in their order."""
        return replace(
            self, rows=self.rows[mask], source=self.source[mask], trigger_rows=self.trigger_rows[mask],
            score=self.score[mask], propensity=self.propensity[mask],
        )  # fmt: skip
