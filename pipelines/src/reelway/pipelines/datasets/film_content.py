"""Computes a topic and a text embedding from a movie's genres, year and title, without any model.

The text embedding is a fixed function of its inputs with ``TEXT_DIM`` = 32 values of unit norm:

- 0..19: one value per MovieLens genre, ``1 / sqrt(number of genres)`` each;
- 20, 21: the release decade on a quarter circle from 1900 to 2030, length 0.7 (zeros if the year is unknown);
- 22..31: the title's words by signed feature hashing (Weinberger et al. 2009), length 0.5 in total.

A movie without a known genre has topic -1 and zeros at 0..19. A movie without any known property has no embedding.
"""

# Shapes: N films, T title words of all films

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

GENRES: Final = (
    "Action", "Adventure", "Animation", "Children", "Comedy", "Crime", "Documentary", "Drama", "Fantasy", "Film-Noir",
    "Horror", "IMAX", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western", "Short",
)  # fmt: skip
"""A topic is an index into this list. Spellings of older data sets (``Children's``) map to these."""

_GENRE_INDEX: Final = {genre: i for i, genre in enumerate(GENRES)} | {"Children's": GENRES.index("Children")}
_YEAR: Final = re.compile(r"\s*\((\d{4})\)\s*$")
_WORD: Final = re.compile(r"[a-z0-9]+")
TEXT_DIM: Final = 32
_DECADE_AT, _WORDS_AT = len(GENRES), len(GENRES) + 2
_WORD_DIM: Final = TEXT_DIM - _WORDS_AT
_DECADE_LENGTH, _WORDS_LENGTH = 0.7, 0.5
_STOP_WORDS: Final = frozenset(["a", "an", "and", "for", "from", "in", "of", "on", "the", "to"])


def split_title(title: str) -> tuple[str, int | None]:
    """``"Toy Story (1995)"`` -> ``("Toy Story", 1995)``; the year is None if the title has none."""
    match = _YEAR.search(title)
    return (title[: match.start()], int(match.group(1))) if match else (title.strip(), None)


def topics(genres: Sequence[Sequence[str]]) -> NDArray[np.int32]:
    """Returns the index of each movie's first known genre, -1 if none is known."""
    known = ((_GENRE_INDEX[g] for g in film if g in _GENRE_INDEX) for film in genres)
    return np.fromiter((next(film, -1) for film in known), dtype=np.int32, count=len(genres))


def text_embeddings(
    titles: Sequence[str], years: Sequence[int | None], genres: Sequence[Sequence[str]]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Returns embeddings ``[N, TEXT_DIM]``, and ``[N]``: whether any property was known."""
    rows = len(titles)
    out = np.zeros((rows, TEXT_DIM))
    pairs = [(i, _GENRE_INDEX[g]) for i, film in enumerate(genres) for g in film if g in _GENRE_INDEX]
    if pairs:
        film, genre_index = np.array(pairs).T
        out[film, genre_index] = 1.0
    out[:, :_DECADE_AT] /= np.maximum(np.sqrt(out[:, :_DECADE_AT].sum(axis=1, keepdims=True)), 1.0)

    year = np.array([np.nan if y is None else y for y in years], dtype=np.float64)
    angle = np.clip((year // 10 * 10 - 1900) / 130, 0, 1) * (np.pi / 2)
    out[:, _DECADE_AT] = np.nan_to_num(_DECADE_LENGTH * np.cos(angle))
    out[:, _DECADE_AT + 1] = np.nan_to_num(_DECADE_LENGTH * np.sin(angle))

    hashes = [(i, zlib.crc32(w.encode())) for i, title in enumerate(titles)
              for w in _WORD.findall(title.lower()) if w not in _STOP_WORDS]  # fmt: skip
    if hashes:
        film, code = np.array(hashes, dtype=np.int64).T
        np.add.at(out, (film, _WORDS_AT + code // 2 % _WORD_DIM), np.where(code % 2, 1.0, -1.0))
    length = np.linalg.norm(out[:, _WORDS_AT:], axis=1, keepdims=True)
    out[:, _WORDS_AT:] *= _WORDS_LENGTH / np.where(length > 0, length, 1.0)

    norm = np.linalg.norm(out, axis=1, keepdims=True)
    return (out / np.where(norm > 0, norm, 1.0)).astype(np.float32), norm[:, 0] > 0
