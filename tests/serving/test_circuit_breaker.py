"""The circuit breaker: repeated timeouts open it, and it closes after a while."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from reelway.serving.circuit_breaker import OPEN_S, TRIP_AFTER_TIMEOUTS, CircuitBreaker


class FakeCall:
    """Counts its calls and never returns while it hangs."""

    def __init__(self) -> None:
        self.hangs = True
        self.calls = 0

    async def __call__(self) -> str:
        self.calls += 1
        if self.hangs:
            await asyncio.Event().wait()
        return "answer"


def outcomes(budget: CircuitBreaker, part: Callable[[], object], calls: int) -> list[str]:
    async def call() -> list[str]:
        results = []
        for _ in range(calls):
            try:
                results.append(await budget(part))  # type: ignore[arg-type]
            except TimeoutError:
                results.append("late")
        return results

    return asyncio.run(call())


def test_breaker_opens_after_timeouts_then_closes() -> None:
    now = [0.0]
    part, budget = FakeCall(), CircuitBreaker(5, clock=lambda: now[0])
    assert outcomes(budget, part, 10) == ["late"] * 10
    assert part.calls == TRIP_AFTER_TIMEOUTS  # the breaker was open for the other calls
    part.hangs = False
    now[0] += OPEN_S
    assert outcomes(budget, part, 3) == ["answer"] * 3


def test_single_timeout_does_not_open_the_breaker() -> None:
    part, budget = FakeCall(), CircuitBreaker(5, clock=lambda: 0.0)
    for _ in range(3):
        part.hangs = True
        assert outcomes(budget, part, 1) == ["late"]
        part.hangs = False
        assert outcomes(budget, part, 1) == ["answer"]


def test_error_of_the_call_propagates() -> None:
    async def breaks() -> None:
        raise ValueError("a bug")

    budget = CircuitBreaker(1000, clock=lambda: 0.0)
    for _ in range(TRIP_AFTER_TIMEOUTS + 1):
        with pytest.raises(ValueError, match="a bug"):
            asyncio.run(budget(breaks))
