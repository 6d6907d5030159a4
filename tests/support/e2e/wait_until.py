"""Polls a condition until a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

_LOOK_S: Final = 1.0
"""Seconds between two polls. Each poll starts kubectl; measurements have timestamps of their own."""


def until(what: str, holds: Callable[[], object], within_s: float, seen: Callable[[], str] = str) -> float:
    """Waits until ``holds`` returns true. Returns the seconds waited; ``seen`` describes the state for the error."""
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > within_s:
            raise AssertionError(f"{what}: not so within {within_s:g} s; {seen()}".rstrip("; "))
        time.sleep(_LOOK_S)
    return time.monotonic() - began
