"""Why: everything on a cluster comes later: every wait has a condition, a deadline, and words for when it is missed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

_LOOK_S: Final = 1.0
"""Between two looks: each starts a kubectl, and what is measured has its moments on record elsewhere."""


def until(what: str, holds: Callable[[], object], within_s: float, seen: Callable[[], str] = str) -> float:
    """Wait for something to be so. Returns the seconds that it took; ``seen`` says what was so instead."""
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > within_s:
            raise AssertionError(f"{what}: not so within {within_s:g} s; {seen()}".rstrip("; "))
        time.sleep(_LOOK_S)
    return time.monotonic() - began
