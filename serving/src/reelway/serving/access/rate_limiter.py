"""Request rates per key in bounded memory."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Final

MAX_KEYS: Final = 50_000
"""Keys of one limiter: about 8 MB."""


class RateLimiter:
    """Token buckets, kept as the generic cell rate algorithm (ITU-T I.371): one time per key.

    The time is when the key's bucket is full again. The key that was used least recently is forgotten when there are
    too many keys; its bucket is full when it returns. So a limit never grows stricter by memory, and a client that
    controls more than ``max_keys`` addresses is not limited by address.

    Args:
        per_second: rate at which a bucket fills.
        burst: size of a bucket.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        per_second: float,
        burst: int,
        *,
        max_keys: int = MAX_KEYS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._interval_s = 1.0 / per_second
        self._tolerance_s = (burst - 1) * self._interval_s
        self._max_keys = max_keys
        self._clock = clock
        self._full_at: OrderedDict[Hashable, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._full_at)

    def take(self, key: Hashable) -> float:
        """Takes one request from the key's bucket. Returns 0, or the seconds until the next request is allowed."""
        now = self._clock()
        full_at = max(self._full_at.get(key, now), now)
        wait_s = full_at - now - self._tolerance_s
        if wait_s > 1e-9:  # below that it is rounding
            return wait_s
        self._full_at[key] = full_at + self._interval_s
        self._full_at.move_to_end(key)
        if len(self._full_at) > self._max_keys:
            self._full_at.popitem(last=False)
        return 0.0
