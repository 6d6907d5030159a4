"""What travels between the stages: a handful of compact arrays per request, never an object per candidate.

Rows are rows of the release's video table, which every stage has mapped; so a candidate costs 13 bytes on a hop.
"""

# Shapes: H history, C candidates, D embedding, S slate

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, get_args

import numpy as np
from numpy.typing import NDArray

from reelway.platform.contracts.blend import SourceName
from reelway.platform.features.assembly import ViewerArrays

F32 = NDArray[np.float32]
Rows = NDArray[np.int32]
Codes = NDArray[np.int8]

SOURCES: Final[tuple[SourceName, ...]] = get_args(SourceName)
"""A source's code on a hop is its place here."""
SOURCE_CODES: Final[dict[SourceName, int]] = {name: code for code, name in enumerate(SOURCES)}


@dataclass(frozen=True, slots=True)
class ViewerQuery:
    """One viewer at one moment, as the stages see them."""

    arrays: ViewerArrays  # batch of 1
    history_rows: Rows  # [H] oldest first; only videos that the release has
    history_weights: F32  # [H]
    region: str | None
    now_s: float
    seed: int  # of everything random in this request


@dataclass(frozen=True, slots=True)
class Candidates:
    """What retrieval proposes, best first, and what it left out and why."""

    rows: Rows  # [C]
    source: Codes  # [C] codes of SOURCES
    similarity: F32  # [C] inner product with the viewer; 0 where the source has none
    because: Rows  # [C] the watched video that led to it, -1 where none did
    viewer_embedding: F32  # [1, D]
    left: dict[str, int] = field(default_factory=dict)  # why -> how many proposals left on the way

    def __len__(self) -> int:
        return len(self.rows)

    def first(self, places: int) -> Slate:
        """The first ``places`` as they are, for when nothing better can be had; earlier is better."""
        chosen = slice(0, places)
        return Slate(
            self.rows[chosen],
            self.source[chosen],
            self.because[chosen],
            np.linspace(1.0, 0.0, len(self), endpoint=False, dtype=np.float32)[chosen],
            np.ones(len(self.rows[chosen]), dtype=np.float32),
        )


@dataclass(frozen=True, slots=True)
class Slate:
    """The ordered answer, before it is put into words."""

    rows: Rows  # [S]
    source: Codes  # [S]
    because: Rows  # [S]
    score: F32  # [S]
    propensity: F32  # [S] probability of this video at this place, 1 where nothing was left to chance
    relaxed: int = 0  # places that break the per-creator cap because nothing else was left

    def __len__(self) -> int:
        return len(self.rows)
