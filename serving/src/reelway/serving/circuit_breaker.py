"""A timeout with a circuit breaker (Nygard, "Release It!").

After repeated timeouts the breaker opens, and calls fail immediately for a while. Without the breaker, every request
would wait for the whole budget of a stage that is down.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

T = TypeVar("T")

TRIP_AFTER_TIMEOUTS: Final = 2
"""Number of consecutive timeouts that opens the breaker."""
OPEN_S: Final = 0.5
"""How long the breaker stays open, in seconds."""


class CircuitBreaker:
    """The time budget and circuit breaker of one stage.

    Args:
        budget_ms: timeout of one call in milliseconds.
        clock: monotonic clock in seconds.
    """

    def __init__(self, budget_ms: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.budget_s = budget_ms / 1000
        self._clock = clock
        self._late = 0
        self._rests_until = -1.0

    async def __call__(self, call: Callable[[], Awaitable[T]]) -> T:
        """Returns the result of the call. Exceptions of the call propagate.

        Raises:
            TimeoutError: if the call timed out, or the breaker is open and the call was not made.
        """
        if self._clock() < self._rests_until:
            raise TimeoutError("circuit breaker is open after repeated timeouts")
        try:
            async with asyncio.timeout(self.budget_s):
                result = await call()
        except TimeoutError:
            self._late += 1
            if self._late >= TRIP_AFTER_TIMEOUTS:
                self._rests_until = self._clock() + OPEN_S
            raise TimeoutError(f"no answer within {1000 * self.budget_s:g} ms") from None
        self._late = 0
        return result
