"""A large catalogue with embeddings like those of a trained two-tower model, generated without training.

Embeddings of a trained model are unit vectors around a common mean, whose length is 0.88 in the demo's release. They
form topics and styles of unequal size. Variance within a style decreases from direction to direction, so a few dozen of
64 directions have most of it. A viewer's embedding is the mean of watched videos of two to six styles. Such a viewer is
harder to search for than one of a trained viewer tower, which is close to the videos that it was trained with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]

TOPICS: Final = 32
STYLES: Final = 24
_BLOCK: Final = 100_000
_WATCHED: Final = 30


@dataclass(frozen=True)
class Catalogue:
    """Unit vectors of videos ``[N, D]`` and viewers ``[Q, D]``."""

    videos: F32
    viewers: F32


def make_catalogue(videos: int, viewers: int, width: int = 64, seed: int = 0) -> Catalogue:
    """Returns a catalogue. The same arguments give the same catalogue."""
    rng = np.random.default_rng(seed)
    falling = np.arange(1, width + 1, dtype=np.float32) ** -0.5
    falling /= np.linalg.norm(falling)

    def drawn(rows: int) -> F32:
        values: F32 = rng.standard_normal((rows, width), dtype=np.float32) * falling
        return values

    mean = rng.standard_normal(width, dtype=np.float32)
    mean /= np.linalg.norm(mean)
    styles = TOPICS * STYLES
    centres = mean + np.repeat(0.45 * drawn(TOPICS), STYLES, axis=0) + 0.3 * drawn(styles)
    style = rng.choice(styles, videos, p=rng.dirichlet(np.full(styles, 0.5)))
    embedding = np.empty((videos, width), dtype=np.float32)
    for start in range(0, videos, _BLOCK):
        part = slice(start, min(start + _BLOCK, videos))
        embedding[part] = _unit(centres[style[part]] + 0.35 * drawn(part.stop - start))
    return Catalogue(embedding, _viewers(embedding, style, viewers, rng))


def _viewers(embedding: F32, style: NDArray[np.int64], viewers: int, rng: np.random.Generator) -> F32:
    known = min(len(style), 2 * _BLOCK)
    taste = np.empty((viewers, embedding.shape[1]), dtype=np.float32)
    for i in range(viewers):
        liked = style[rng.integers(known, size=rng.integers(2, 7))]
        watched = rng.choice(np.flatnonzero(np.isin(style[:known], liked)), _WATCHED)
        taste[i] = embedding[watched].mean(axis=0)
    return _unit(taste)


def _unit(vectors: F32) -> F32:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
