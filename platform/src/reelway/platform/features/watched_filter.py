"""Bloom filters of the videos that a viewer watched to the end.

A viewer has one filter per generation of ``GENERATION_DAYS`` days, so that old videos leave with their filter. A filter
of 2 KiB that holds 1,200 videos reports an unwatched video as watched with probability 0.2 %; with four live filters
of that size the probability is below 1 % (Bloom, 1970: ``(1 - exp(-k n / m))^k`` per filter). A viewer with more videos
gets more false reports, which cost candidates only: a watched video is always recognised.
"""

# Shapes: G generations, P videos, K hash functions

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from reelway.platform.contracts.blend import MAX_WATCHED_DAYS
from reelway.platform.features.hashing import mix64

I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]
U64 = NDArray[np.uint64]

GENERATION_DAYS: Final = 10
"""A watched video is recognised for up to so many days longer than ``MAX_WATCHED_DAYS``."""
LIVE_GENERATIONS: Final = MAX_WATCHED_DAYS // GENERATION_DAYS + 1
FILTER_BYTES: Final = 2048
HASHES: Final = 7
_DAY_S: Final = 86_400.0
_BITS: Final = np.uint64(8 * FILTER_BYTES)
_STEPS: Final = np.arange(HASHES, dtype=np.uint64)


def generation_at(time_s: float) -> int:
    """Returns the number of the generation in which a video watched at this time is stored."""
    return int(time_s // (GENERATION_DAYS * _DAY_S))


def live_generations(now_s: float) -> range:
    """Returns the generations that may hold a video of the last ``MAX_WATCHED_DAYS`` days, oldest first."""
    newest = generation_at(now_s)
    return range(newest - LIVE_GENERATIONS + 1, newest + 1)


def bit_positions(video_ids: NDArray[np.integer[Any]]) -> I64:
    """Returns the bits of each video in a filter. Shapes: ``[P] -> [P, K]``.

    Derives K hash functions from two (Kirsch, Mitzenmacher: Less Hashing, Same Performance, 2006).
    """
    return _positions(*_hashes(video_ids)).astype(np.int64)


def _hashes(video_ids: NDArray[np.integer[Any]]) -> tuple[U64, U64]:
    first = mix64(np.asarray(video_ids).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return first, (first >> np.uint64(32)) | np.uint64(1)


def _positions(first: U64, second: U64) -> U64:
    with np.errstate(over="ignore"):
        positions: U64 = (first[:, None] + _STEPS * second[:, None]) % _BITS
    return positions


def positions_by_filter(
    viewer_ids: I64, video_ids: I64, watched_at_s: NDArray[np.float64]
) -> Iterator[tuple[int, int, I64]]:
    """Groups watches by filter: yields viewer, generation and the bits to set, each once."""
    generations = (watched_at_s // (GENERATION_DAYS * _DAY_S)).astype(np.int64)
    for viewer_id, generation in np.unique(np.stack([viewer_ids, generations], axis=1), axis=0).tolist():
        of_filter = (viewer_ids == viewer_id) & (generations == generation)
        yield viewer_id, generation, np.unique(bit_positions(video_ids[of_filter]))


def add_to_filter(bits: bytes, positions: NDArray[np.int64]) -> bytes:
    """Returns a filter with these bits set. Bit 0 is the highest bit of the first byte, as in Redis."""
    filled = as_filter(bits).copy()
    flat = positions.ravel()
    np.bitwise_or.at(filled, flat >> 3, (0x80 >> (flat & 7)).astype(np.uint8))
    return filled.tobytes()


def as_filter(bits: bytes) -> U8:
    """Returns a stored filter as an array ``[FILTER_BYTES]``. Zero bytes at its end may be absent."""
    filter_ = np.zeros(FILTER_BYTES, dtype=np.uint8)
    filter_[: len(bits)] = np.frombuffer(bits, dtype=np.uint8)[:FILTER_BYTES]
    return filter_


def is_watched(filters: U8, video_ids: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Returns which videos one of the filters reports. Shapes: ``[G, FILTER_BYTES], [P] -> [P]``."""
    watched = np.zeros(len(video_ids), dtype=np.bool_)
    if not len(filters) or not len(video_ids):
        return watched
    # Most videos fail at the first hash function of every filter, so only the rest is looked up by all.
    first, second = _hashes(video_ids)
    possible = np.flatnonzero(_is_set(filters, first % _BITS).any(axis=0))
    if len(possible):
        found = _is_set(filters, _positions(first[possible], second[possible]))
        watched[possible] = found.all(axis=2).any(axis=0)
    return watched


def _is_set(filters: U8, positions: NDArray[np.unsignedinteger[Any]]) -> NDArray[np.bool_]:
    """Shapes: ``[G, FILTER_BYTES], [...] -> [G, ...]``."""
    bit = (np.uint8(0x80) >> (positions & np.uint64(7)).astype(np.uint8)).astype(np.uint8)
    set_bits: NDArray[np.bool_] = (filters.take((positions >> np.uint64(3)).astype(np.intp), axis=1) & bit) != 0
    return set_bits


def estimated_count(filters: U8) -> int:
    """Returns about how many videos the filters hold, from their numbers of set bits (Swamidass, Baldi, 2007)."""
    bits = 8 * FILTER_BYTES
    filled = np.minimum(np.bitwise_count(filters).sum(axis=1, dtype=np.int64), bits - 1)
    return int(np.rint(-bits / HASHES * np.log1p(-filled / bits)).sum())
