"""Calls with a time budget: late is as good as never, and what is late again and again is left alone for a while.

Without the rest a dead stage would cost every request its whole budget until it is back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

T = TypeVar("T")

LATE: Final = 2
"""So many late answers in a row start a rest."""
REST_S: Final = 0.5


class TimeBudget:
    """One part's budget.

    Args:
        budget_ms: how long one call may take.
        clock: seconds, never going back.
    """

    def __init__(self, budget_ms: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.budget_s = budget_ms / 1000
        self._clock = clock
        self._late = 0
        self._rests_until = -1.0

    async def __call__(self, call: Callable[[], Awaitable[T]]) -> T:
        """The call's result; whatever it raises, this raises.

        Raises:
            TimeoutError: it was late, or the part rests after having been late and was not called.
        """
        if self._clock() < self._rests_until:
            raise TimeoutError("it rests after late answers")
        try:
            async with asyncio.timeout(self.budget_s):
                result = await call()
        except TimeoutError:
            self._late += 1
            if self._late >= LATE:
                self._rests_until = self._clock() + REST_S
            raise TimeoutError(f"no answer within {1000 * self.budget_s:g} ms") from None
        self._late = 0
        return result
