"""Assignment of viewers to arms: a pure function of salt, viewer and weights, the same on every router.

Sticky and monotone: a viewer's bucket never changes under one salt, and a growing arm keeps its viewers. There is no
state and no randomness.
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
"""One bucket per basis point, the smallest possible weight."""
_SPLITMIX_INCREMENT: Final = 0x9E3779B97F4A7C15
_UINT64_MASK: Final = 0xFFFFFFFFFFFFFFFF


def bucket_of(viewer_id: int, salt: str) -> int:
    """Returns the viewer's bucket, 0..9999.

    Another salt gives an independent assignment, so that two rollouts do not start with the same viewers.
    """
    return _mix(_mix((viewer_id + _SPLITMIX_INCREMENT) & _UINT64_MASK) ^ _salt_bits(salt)) % BUCKETS


def buckets_of(viewer_ids: NDArray[np.int64], salt: str) -> NDArray[np.int64]:
    """Returns the buckets of viewers: vectorised ``bucket_of``. Shapes: ``[N] -> [N]``."""
    with np.errstate(over="ignore"):
        spread = mix64(viewer_ids.astype(np.uint64) + np.uint64(_SPLITMIX_INCREMENT))
    return (mix64(spread ^ np.uint64(_salt_bits(salt))) % np.uint64(BUCKETS)).astype(np.int64)


def arm_of(viewer_id: int, salt: str, weights: Mapping[str, int]) -> str:
    """Returns the arm of a viewer.

    Args:
        weights: arm -> basis points with a sum of 10000. Arms occupy buckets in the given order. For a monotone ramp
            the growing arm comes first and the arm that it takes viewers from comes last.

    Raises:
        ConfigError: if there is no arm, a weight is outside 0..10000, or the sum is not 10000.
    """
    check_weights(weights)
    bucket = bucket_of(viewer_id, salt)
    end = 0
    for arm, weight in weights.items():
        end += weight
        if bucket < end:
            return arm
    raise AssertionError("the weights cover all buckets")


def arms_of(viewer_ids: NDArray[np.int64], salt: str, weights: Mapping[str, int]) -> NDArray[np.int64]:
    """Returns the arms of viewers as indices into ``weights``: vectorised ``arm_of``. Shapes: ``[N] -> [N]``."""
    check_weights(weights)
    ends = np.cumsum(list(weights.values()))
    return np.searchsorted(ends, buckets_of(viewer_ids, salt), side="right").astype(np.int64)


def check_weights(weights: Mapping[str, int]) -> None:
    """Checks that the weights cover all buckets.

    Raises:
        ConfigError: if they do not, as in ``arm_of``.
    """
    for arm, weight in weights.items():
        if not 0 <= weight <= BUCKETS:
            raise ConfigError(f"weight {weight} of arm {arm} is outside 0..{BUCKETS} basis points; change the weight")
    if (total := sum(weights.values())) != BUCKETS:
        raise ConfigError(
            f"weights {dict(weights)} sum to {total} basis points, expected {BUCKETS}; adjust the last arm"
        )


@lru_cache(maxsize=256)
def _salt_bits(salt: str) -> int:
    return int.from_bytes(hashlib.blake2b(salt.encode(), digest_size=8).digest(), "little")


def _mix(value: int) -> int:
    """Applies ``mix64`` to one Python integer."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _UINT64_MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _UINT64_MASK
    return value ^ (value >> 31)
