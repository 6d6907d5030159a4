"""Polls a condition until a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

_POLL_INTERVAL_S: Final = 1.0
"""Seconds between two polls. Each poll starts kubectl; measurements have timestamps of their own."""


def until(condition: str, holds: Callable[[], object], within_s: float, state: Callable[[], str] = str) -> float:
    """Waits until ``holds`` returns true. Returns the seconds waited; ``state`` describes the state for the error."""
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > within_s:
            raise AssertionError(f"not within {within_s:g} s: {condition}; {state()}".rstrip("; "))
        time.sleep(_POLL_INTERVAL_S)
    return time.monotonic() - began
