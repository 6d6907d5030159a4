"""The releases that a router holds open.

A release is open before it gets traffic and stays open until its last request has ended. A release that cannot be
opened is reported; the exception reaches no other release.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from reelway.platform.contracts.ids import short_id
from reelway.serving.request_path import InlineExecutor, PathExecutor, RouterRelease, Stages

log = logging.getLogger(__name__)

STANDING_QUEUE_S: Final = 0.5
"""A release that was never idle for this long has a standing queue."""
OVERLOAD_COOLDOWN_S: Final = 0.2
"""An overload ends this long after the last rejected request. During it, a request is rejected every few ms."""


class OpenRelease:
    """One open release and the number of its requests in flight.

    Args:
        close: releases the resources of the stages. It is called once, after the release was removed and its last
            request ended.
        executor: where the release's request path runs; in the caller's event loop by default.
        clock: monotonic clock in seconds.
    """

    def __init__(
        self,
        router_release: RouterRelease,
        stages: Stages,
        close: Callable[[], Awaitable[None]] | None = None,
        executor: PathExecutor | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.router_release = router_release
        self.release_id = router_release.release_id
        self.stages = stages
        self.executor = executor or InlineExecutor()
        self._close = close
        self._clock = clock
        self._requests = 0
        self._busy_since = self._sent_away_at = -math.inf
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def requests(self) -> int:
        """Number of requests in flight."""
        return self._requests

    def admits(self, max_ongoing_sustained: int, max_ongoing: int) -> bool:
        """Whether the release accepts one more request; the caller rejects the request otherwise.

        A short burst only delays the requests in it. A standing queue delays every later request as well. Its limit is
        therefore lower: the rule of CoDel (Nichols and Jacobson, "Controlling Queue Delay", 2012) as "Fail at Scale"
        (Maurer, 2015) applies it to servers. A queue is standing if it has not been empty for ``STANDING_QUEUE_S``. The
        lower limit also applies within ``OVERLOAD_COOLDOWN_S`` of a rejected request.

        Args:
            max_ongoing_sustained: limit of requests in flight while the queue is standing.
            max_ongoing: limit of requests in flight during a burst.
        """
        if self._requests < max_ongoing_sustained:
            return True
        now = self._clock()
        a_burst = now - self._busy_since < STANDING_QUEUE_S and now - self._sent_away_at > OVERLOAD_COOLDOWN_S
        if a_burst and self._requests < max_ongoing:
            return True
        self._sent_away_at = now
        return False

    @contextmanager
    def track_request(self) -> Iterator[None]:
        """Counts one request as in flight while the block runs."""
        if not self._requests:
            self._busy_since = self._clock()
        self._requests += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._requests -= 1
            if not self._requests:
                self._idle.set()

    async def close_when_idle(self) -> None:
        """Waits for the requests in flight, then closes the release."""
        await self._idle.wait()
        if self._close:
            await self._close()


class ReleasePool:
    """All releases that one router holds open."""

    def __init__(self, open_release: Callable[[str], Awaitable[OpenRelease]]) -> None:
        self._open_release = open_release
        self._open: dict[str, OpenRelease] = {}
        self._opening: dict[str, asyncio.Task[None]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._faults: dict[str, str] = {}

    @property
    def names(self) -> list[str]:
        """Ids of the open releases."""
        return sorted(self._open)

    @property
    def faults(self) -> Mapping[str, str]:
        """Releases that could not be opened: id -> reason."""
        return dict(self._faults)

    def get(self, release: str) -> OpenRelease | None:
        """Returns the release if it is open."""
        return self._open.get(release)

    def is_missing_any(self, releases: Iterable[str]) -> bool:
        """Whether at least one of the releases is not open."""
        return any(release not in self._open for release in releases)

    async def open_all(self, releases: Iterable[str]) -> None:
        """Opens the releases that are not open; one that failed before is tried again.

        Each release is open or in ``faults`` when this method returns.
        """
        tasks = []
        for release in releases:
            if release in self._open:
                continue
            if release not in self._opening:
                self._opening[release] = asyncio.create_task(self._open_one(release))
            tasks.append(self._opening[release])
        if tasks:
            await asyncio.wait(tasks)

    def retain(self, releases: Iterable[str]) -> None:
        """Closes all other releases, each after its last request has ended."""
        retained = set(releases)
        for release in [name for name in self._open if name not in retained]:
            closing = asyncio.create_task(self._close(release, self._open.pop(release)))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        self._faults = {release: reason for release, reason in self._faults.items() if release in retained}

    async def _open_one(self, release: str) -> None:
        try:
            self._open[release] = await self._open_release(release)
        except Exception as fault:  # a broken release must not affect the others
            log.warning("release %s: cannot be opened", short_id(release), exc_info=True)
            self._faults[release] = f"{type(fault).__name__}: {fault}"
        else:
            self._faults.pop(release, None)
        finally:
            del self._opening[release]

    async def _close(self, release: str, dropped: OpenRelease) -> None:
        try:
            await dropped.close_when_idle()
        except Exception:  # the release is removed in any case
            log.warning("release %s: closing failed", short_id(release), exc_info=True)
