"""Why: everything on a cluster comes later: every wait has a condition, a deadline, and words for when it is missed."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(what: str, holds: Callable[[], object], within_s: float, seen: Callable[[], str] = str) -> float:
    """Wait for something to be so. Returns the seconds that it took; ``seen`` says what was so instead."""
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > within_s:
            raise AssertionError(f"{what}: not so within {within_s:g} s; {seen()}".rstrip("; "))
        time.sleep(0.1)
    return time.monotonic() - began
