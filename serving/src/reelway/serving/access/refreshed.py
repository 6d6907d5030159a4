"""A value that is read again in the background, and whose old state remains in use while it cannot be read."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Generic, TypeVar

from reelway.serving.access.errors import KeysUnavailableError

log = logging.getLogger(__name__)

T = TypeVar("T")

MIN_INTERVAL_S: Final = 10.0
"""Shortest time between two reads, so that requests with unknown key ids cannot cause more of them."""
MAX_WAIT_S: Final = 5.0
MAX_WAITING: Final = 32
"""Requests that may wait for a read. Further requests continue with the old state."""


class Refreshed(Generic[T]):
    """Reads a value on a thread, so that the event loop never waits. All methods belong to one event loop.

    Args:
        name: the value's name in messages.
        read: reads the value; blocks, and raises any exception.
        on_fault: called when a read failed.
        refresh_s: age in seconds at which the value is read again. The request that notices the age does not wait.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        name: str,
        read: Callable[[], T],
        on_fault: Callable[[], None],
        *,
        refresh_s: float,
        min_interval_s: float = MIN_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._read = read
        self._on_fault = on_fault
        self._refresh_s = refresh_s
        self._min_interval_s = min_interval_s
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"{name}-reader")
        self._value: T | None = None
        self._read_at = -float("inf")  # start of the last read that succeeded
        self._tried_at = -float("inf")
        self._reading: asyncio.Task[None] | None = None
        self._waiting = 0

    async def get(self) -> T:
        """Returns the value. Only waits if it was never read.

        Raises:
            KeysUnavailableError: if it was never read, and cannot be read now.
        """
        if self._value is None:
            await self.renew()
        elif self._clock() - self._read_at > self._refresh_s:
            self._start()
        if self._value is None:
            raise KeysUnavailableError(f"{self._name}: not readable now, so no identity can be verified; try again")
        return self._value

    async def renew(self) -> None:
        """Reads the value now and waits for it, unless it was read just before or too many requests wait already."""
        reading = self._start()
        if reading is None or self._waiting >= MAX_WAITING:
            return
        self._waiting += 1
        try:
            await asyncio.wait([reading], timeout=MAX_WAIT_S)
        finally:
            self._waiting -= 1

    def _start(self) -> asyncio.Task[None] | None:
        """Returns the read in progress, or starts one; None if the last one was started too recently."""
        if self._reading is not None:
            return self._reading
        now = self._clock()
        if now - self._tried_at < self._min_interval_s:
            return None
        self._tried_at = now
        self._reading = asyncio.create_task(self._read_once(now))
        return self._reading

    async def _read_once(self, now: float) -> None:
        try:
            self._value = await asyncio.get_running_loop().run_in_executor(self._thread, self._read)
            self._read_at = now
        except Exception as error:  # of whatever kind: the old value stays in use
            self._on_fault()
            kept = "the last ones stay in use" if self._value is not None else "no identity can be verified"
            log.warning("%s not read, %s: %s", self._name, kept, error)
        finally:
            self._reading = None
