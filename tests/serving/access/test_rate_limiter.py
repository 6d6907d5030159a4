"""Token buckets in bounded memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reelway.serving.access.rate_limiter import RateLimiter


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_limiter_allows_the_burst_at_once() -> None:
    limiter = RateLimiter(2.0, 3, clock=Clock())
    assert [limiter.take("a") for _ in range(4)] == [0, 0, 0, pytest.approx(0.5)]
    assert limiter.take("b") == 0


def test_limiter_fills_the_bucket_at_its_rate() -> None:
    clock = Clock()
    limiter = RateLimiter(2.0, 1, clock=clock)
    assert limiter.take("a") == 0
    clock.now += 0.4
    assert limiter.take("a") == pytest.approx(0.1)
    clock.now += 0.1
    assert limiter.take("a") == 0


@given(
    steps=st.lists(st.tuples(st.floats(0, 3), st.booleans()), min_size=1, max_size=200),
    rate=st.sampled_from([0.5, 1.0, 4.0, 50.0]),
    burst=st.integers(1, 20),
)
def test_limiter_equals_a_token_bucket(steps: list[tuple[float, bool]], rate: float, burst: int) -> None:
    """The bucket as a textbook has it: it holds at most ``burst`` tokens and gains ``rate`` of them per second."""
    clock, tokens = Clock(), float(burst)
    limiter = RateLimiter(rate, burst, clock=clock)
    for pause_s, asks in steps:
        clock.now += pause_s
        tokens = min(float(burst), tokens + pause_s * rate)
        if asks:
            wait_s = limiter.take("a")
            if abs(tokens - 1.0) > 1e-6:  # at exactly one token, rounding decides
                assert (wait_s == 0) == (tokens >= 1)
            if wait_s == 0:
                tokens -= 1
            else:
                assert wait_s == pytest.approx((1 - tokens) / rate, abs=1e-6)


def test_limiter_forgets_the_key_that_rested_longest() -> None:
    limiter = RateLimiter(0.001, 1, max_keys=100, clock=Clock())
    for key in range(1000):
        assert limiter.take(key) == 0
        assert len(limiter) <= 100
    assert limiter.take(999) > 0
    assert limiter.take(899) == 0
