"""Stable hash codes of ids and category values. Python's own ``hash`` is salted per process and therefore not used."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from reelway.platform.contracts.feature_names import ID_HASHES

MISSING_ID: Final = -1
_SALTS: Final = tuple(np.uint64(0x9E3779B97F4A7C15 * (i + 1) & 0xFFFFFFFFFFFFFFFF) for i in range(ID_HASHES))


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Applies SplitMix64's finaliser (Steele, Lea, Flood 2014): a bijection on 64 bits that spreads similar values."""
    with np.errstate(over="ignore"):
        mixed = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def id_codes(ids: NDArray[np.int64], buckets: int) -> NDArray[np.int64]:
    """Returns codes in 1..buckets-1 for each of ID_HASHES hash functions; 0 for negative (missing) ids.

    Shapes: ``[...] -> [..., ID_HASHES]``.
    """
    raw = np.asarray(ids, dtype=np.int64)
    unsigned = raw.view(np.uint64) if raw.flags.c_contiguous else raw.copy().view(np.uint64)
    codes = np.empty((*raw.shape, ID_HASHES), dtype=np.int64)
    with np.errstate(over="ignore"):
        for i, salt in enumerate(_SALTS):
            codes[..., i] = (mix64(unsigned + salt) % np.uint64(buckets - 1)).astype(np.int64) + 1
    codes[raw < 0] = 0
    return codes


@lru_cache(maxsize=65_536)
def category_code(value: str | None, buckets: int) -> int:
    """Returns the code of a category value in 1..buckets-1, 0 if it is missing."""
    if not value:
        return 0
    return zlib.crc32(value.encode()) % (buckets - 1) + 1


def category_codes(values: Iterable[str | None], buckets: int) -> NDArray[np.int64]:
    """Returns ``category_code`` of each value. Shapes: ``[N] -> [N]``."""
    return np.fromiter((category_code(value, buckets) for value in values), dtype=np.int64)
