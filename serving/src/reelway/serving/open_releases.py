"""Why: a release must be open before it gets traffic and stay open until its last request has ended.

Opening one that is broken is a fact to be reported, never an exception that would reach the releases beside it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from reelway.serving.graph import Place, ReleaseEdge, Stages, here

log = logging.getLogger(__name__)

STANDS_S: Final = 0.5
"""A release that has had something to do for so long without a pause has a queue that stands."""
CALM_S: Final = 0.2
"""Nobody was sent away for so long: what was too much is over. In an overload somebody is every few milliseconds."""


class OpenRelease:
    """What a router holds of one release, and how many requests are on it.

    Args:
        close: gives up what the stages hold; called once, after the release was dropped and its last request ended.
        place: where its path is worked on.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        edge: ReleaseEdge,
        stages: Stages,
        close: Callable[[], Awaitable[None]] | None = None,
        place: Place = here,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.edge = edge
        self.stages = stages
        self.place = place
        self._close = close
        self._clock = clock
        self._requests = 0
        self._busy_since = self._sent_away_at = -math.inf
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def requests(self) -> int:
        """Under way now."""
        return self._requests

    def takes(self, standing: int, at_once: int) -> bool:
        """Whether one more request is welcome; one that is not is to be sent away.

        A queue that empties is a burst, and costs who came with it a moment; one that stands costs everybody who comes
        after. So a burst may be longer than a queue that has not been empty for ``STANDS_S``: the rule of CoDel
        (Nichols and Jacobson, "Controlling Queue Delay", 2012), as "Fail at Scale" (Maurer, 2015) has it for servers.
        Where somebody was sent away within ``CALM_S`` it is no burst, even if the queue was empty for an instant.

        Args:
            standing: how many may be under way while the queue stands.
            at_once: how many may be under way at all.
        """
        if self._requests < standing:
            return True
        now = self._clock()
        a_burst = now - self._busy_since < STANDS_S and now - self._sent_away_at > CALM_S
        if a_burst and self._requests < at_once:
            return True
        self._sent_away_at = now
        return False

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """One request."""
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
        """Wait for the requests in flight, then close."""
        await self._idle.wait()
        if self._close:
            await self._close()


class OpenReleases:
    """The releases that one router holds open."""

    def __init__(self, open_release: Callable[[str], Awaitable[OpenRelease]]) -> None:
        self._open_release = open_release
        self._open: dict[str, OpenRelease] = {}
        self._opening: dict[str, asyncio.Task[None]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._faults: dict[str, str] = {}

    @property
    def names(self) -> list[str]:
        """Those that are open."""
        return sorted(self._open)

    @property
    def faults(self) -> Mapping[str, str]:
        """Why others are not: release -> reason."""
        return dict(self._faults)

    def get(self, release: str) -> OpenRelease | None:
        """The release, if it is open."""
        return self._open.get(release)

    def lacks(self, releases: Iterable[str]) -> bool:
        """Whether one of them is not open."""
        return any(release not in self._open for release in releases)

    async def hold(self, releases: Iterable[str]) -> None:
        """Open what is not open; each of them is then open or has a fault. One that failed before is tried again."""
        tasks = []
        for release in releases:
            if release in self._open:
                continue
            if release not in self._opening:
                self._opening[release] = asyncio.create_task(self._hold(release))
            tasks.append(self._opening[release])
        if tasks:
            await asyncio.wait(tasks)

    def keep_only(self, releases: Iterable[str]) -> None:
        """Drop all others. A request that is on one of them ends on it."""
        kept = set(releases)
        for release in [name for name in self._open if name not in kept]:
            closing = asyncio.create_task(self._close(release, self._open.pop(release)))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        self._faults = {release: reason for release, reason in self._faults.items() if release in kept}

    async def _hold(self, release: str) -> None:
        try:
            self._open[release] = await self._open_release(release)
        except Exception as fault:  # whatever is wrong with a release is that release's
            log.warning("release %s cannot be opened", release[:12], exc_info=True)
            self._faults[release] = f"{type(fault).__name__}: {fault}"
        else:
            self._faults.pop(release, None)
        finally:
            del self._opening[release]

    async def _close(self, release: str, dropped: OpenRelease) -> None:
        try:
            await dropped.close_when_idle()
        except Exception:  # it is gone either way
            log.warning("release %s was not closed cleanly", release[:12], exc_info=True)
