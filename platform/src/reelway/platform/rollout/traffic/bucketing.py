"""Which arm a viewer is on: a pure function of salt, viewer and weights, so that every router says the same.

Sticky and monotone: a viewer's bucket never changes under one salt, and an arm that grows keeps everybody it had.
Nothing is remembered and nothing is drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from reelway.platform.errors import ConfigError
from reelway.platform.features.hashing import mix64

BUCKETS: Final = 10_000
"""Weights are basis points, so a bucket is the smallest share that can be given."""
_GOLDEN: Final = 0x9E3779B97F4A7C15
_WHOLE: Final = 0xFFFFFFFFFFFFFFFF


def bucket_of(viewer_id: int, salt: str) -> int:
    """The viewer's bucket, 0..9999. Another salt shuffles anew, so two rollouts don't share their early viewers."""
    return _mix(_mix((viewer_id + _GOLDEN) & _WHOLE) ^ _salt_bits(salt)) % BUCKETS


def buckets_of(viewer_ids: NDArray[np.int64], salt: str) -> NDArray[np.int64]:
    """``bucket_of`` for many. Shapes: ``[N] -> [N]``."""
    with np.errstate(over="ignore"):
        spread = mix64(viewer_ids.astype(np.uint64) + np.uint64(_GOLDEN))
    return (mix64(spread ^ np.uint64(_salt_bits(salt))) % np.uint64(BUCKETS)).astype(np.int64)


def arm_of(viewer_id: int, salt: str, weights: Mapping[str, int]) -> str:
    """The arm that the viewer is on.

    Args:
        weights: arm -> basis points, summing to 10000. Arms take buckets in the order given and the last one has what
            is left: put the arm that ramps first and the one that it takes from last.

    Raises:
        ConfigError: no arm, a weight outside 0..10000, or another sum.
    """
    check_weights(weights)
    bucket = bucket_of(viewer_id, salt)
    end = 0
    for arm, weight in weights.items():
        end += weight
        if bucket < end:
            return arm
    raise AssertionError("weights that sum to all buckets leave none over")


def arms_of(viewer_ids: NDArray[np.int64], salt: str, weights: Mapping[str, int]) -> NDArray[np.int64]:
    """Positions in ``weights`` of many viewers' arms. Shapes: ``[N] -> [N]``. Raises like ``arm_of``."""
    check_weights(weights)
    ends = np.cumsum(list(weights.values()))
    return np.searchsorted(ends, buckets_of(viewer_ids, salt), side="right").astype(np.int64)


def check_weights(weights: Mapping[str, int]) -> None:
    """Refuse weights that do not share out all buckets.

    Raises:
        ConfigError: see ``arm_of``.
    """
    for arm, weight in weights.items():
        if not 0 <= weight <= BUCKETS:
            raise ConfigError(f"weight {weight} of {arm} is outside 0..{BUCKETS} basis points; change its weight")
    if (total := sum(weights.values())) != BUCKETS:
        raise ConfigError(
            f"weights {dict(weights)} sum to {total} basis points, expected {BUCKETS}; give the rest to the last arm"
        )


@lru_cache(maxsize=256)
def _salt_bits(salt: str) -> int:
    return int.from_bytes(hashlib.blake2b(salt.encode(), digest_size=8).digest(), "little")


def _mix(value: int) -> int:
    """``mix64`` for one Python integer."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WHOLE
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WHOLE
    return value ^ (value >> 31)
