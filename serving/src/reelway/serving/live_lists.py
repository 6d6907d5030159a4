"""The lists that a release serves at this moment: live lists from ``lists.arrow``, else those of the release.

A thread reads the file when it has changed and maps its video ids to rows of the release's table; ids that the table
lacks are left out. The result replaces the lists before it as one immutable version. Live lists older than
``MAX_AGE_S`` are not used, because the list task or the event log has stopped.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
from prometheus_client import CollectorRegistry

from reelway.platform.contracts.ids import short_id
from reelway.platform.errors import ReelwayError
from reelway.platform.eventlog.live_lists_file import MAX_AGE_S, POPULAR, TRENDING, LiveListsFile, LiveListsSnapshot
from reelway.platform.supervised_thread import SupervisedThread
from reelway.platform.telemetry import counter, gauge
from reelway.serving.popular import ListRows, PopularLists
from reelway.serving.stages.arrays import Rows
from reelway.serving.video_table import ABSENT, VideoTable

log = logging.getLogger(__name__)

POLL_INTERVAL_S: Final = 1.0
MISSING, STALE = "missing", "stale"

# One set of metrics for all releases of a process. The router's ``/metrics`` reads them from the files of the node.
_REGISTRY: Final = CollectorRegistry()
_AGE: Final = gauge(
    "reelway_retrieval_lists_age_seconds", "Age of the live popular and trending lists.", ["release"], _REGISTRY,
    mode="livemax",
)  # fmt: skip
_FAULTS: Final = counter(
    "reelway_retrieval_lists_faults_total", "Reads of the live lists that failed.", ["release"], _REGISTRY
)
_FALLBACKS: Final = counter(
    "reelway_retrieval_lists_fallbacks_total", "Times that a release's own lists replaced missing or stale live lists.",
    ["release", "kind"], _REGISTRY,
)  # fmt: skip


class CurrentLists:
    """The lists in use. Any thread may call it.

    Args:
        of_release: lists of the release.
        clock: Unix seconds.
    """

    def __init__(self, of_release: PopularLists, clock: Callable[[], float] = time.time) -> None:
        self.of_release = of_release
        self._live: PopularLists | None = None
        self._clock = clock

    def current(self) -> PopularLists:
        """Returns the live lists if they are at most ``MAX_AGE_S`` old, else those of the release."""
        live, age_s = self._live, self.age_s()
        return self.of_release if live is None or age_s is None or age_s > MAX_AGE_S else live

    def now_s(self) -> float:
        """Returns the time by which ages are measured, in Unix seconds."""
        return self._clock()

    def age_s(self) -> float | None:
        """Returns the age of the live lists in seconds, None if there are none."""
        live = self._live
        return None if live is None or live.as_of_s is None else self._clock() - live.as_of_s

    def replace(self, live: PopularLists) -> None:
        """Takes the next version of the live lists."""
        self._live = live


class ListFollower:
    """Reads ``lists.arrow`` for the lists of one release. Only one thread calls ``poll``."""

    def __init__(self, lists: CurrentLists, table: VideoTable, overlay: str | Path, release: str) -> None:
        self._lists = weakref.ref(lists)  # the follower ends when its release is closed
        self._table = weakref.ref(table)
        self._file = LiveListsFile(overlay)
        self._version: object = None
        self._release = short_id(release)
        self._started_s = lists.now_s()
        _FAULTS.labels(self._release)
        self._fallback: str | None = None

    @property
    def released(self) -> bool:
        """Whether the lists were released by their last user."""
        return self._lists() is None or self._table() is None

    def poll(self) -> bool:
        """Reads the file if it has changed, and returns whether it has.

        Raises:
            StorageError: if the file cannot be read.
            DataError: if the file is malformed.
        """
        lists, table = self._lists(), self._table()
        if lists is None or table is None:
            return False
        failed = True
        try:
            version = self._file.version()
            is_new = version is not None and version != self._version
            if is_new and (snapshot := self._file.read()):
                lists.replace(map_lists(snapshot, table, lists.of_release))
                self._version = version
            failed = False
            return is_new
        finally:
            self._record(lists, failed)

    def follow(self, every_s: float) -> None:
        """Polls until the lists are released."""
        failed = False
        while not self.released:
            try:
                self.poll()
                failed = False
            except Exception as error:  # the thread must go on: without it, the lists would stay as they are
                if not failed:
                    log.error(
                        "release %s: live lists are not read: %s: %s", self._release, type(error).__name__, error,
                        exc_info=not isinstance(error, ReelwayError),
                    )  # fmt: skip
                failed = True
            time.sleep(every_s)

    def _record(self, lists: CurrentLists, failed: bool) -> None:
        """Exports the age, and counts failures and the change from live lists to those of the release.

        The age of lists that exist and were never read is the time since the follower's start.
        """
        age_s = lists.age_s()
        fallback = MISSING if age_s is None else STALE if age_s > MAX_AGE_S else None
        if failed:
            _FAULTS.labels(self._release).inc()
        if age_s is not None:
            _AGE.labels(self._release).set(max(age_s, 0.0))
        elif failed:
            _AGE.labels(self._release).set(max(lists.now_s() - self._started_s, 0.0))
        if fallback != self._fallback and fallback:
            _FALLBACKS.labels(self._release, fallback).inc()
            log.warning("release %s: live lists are %s, its own lists are served", self._release, fallback)
        self._fallback = fallback


def map_lists(snapshot: LiveListsSnapshot, table: VideoTable, of_release: PopularLists) -> PopularLists:
    """Returns live lists as rows of a release's table.

    The popular list of the release follows the live one, because it is the last fallback of a slate and must be long.
    """
    popular, trending = (_rows_of_kind(kind, snapshot, table) for kind in (POPULAR, TRENDING))
    more = of_release.popular[~np.isin(of_release.popular, popular.of_all)]
    long_popular = ListRows(np.concatenate([popular.of_all, more]), popular.by_region, popular.by_language)
    return PopularLists(long_popular, trending, table, snapshot.as_of_us / 1e6)


def _rows_of_kind(kind: str, snapshot: LiveListsSnapshot, table: VideoTable) -> ListRows:
    of_all: Rows = np.empty(0, dtype=np.int32)
    by: dict[str, dict[str, Rows]] = {"region": {}, "language": {}}
    for name, ranked in snapshot.lists.items():
        list_kind, _, viewers = name.partition(":")
        if list_kind != kind:
            continue
        rows = table.rows_of(ranked.video_ids)
        rows = rows[rows != ABSENT]
        dimension, _, value = viewers.partition("=")
        if not viewers:
            of_all = rows
        elif dimension in by:
            by[dimension][value] = rows
    return ListRows(of_all, by["region"], by["language"])


def start_list_follower(
    lists: CurrentLists, table: VideoTable, overlay: str, release: str, *, every_s: float = POLL_INTERVAL_S
) -> SupervisedThread:
    """Starts a thread that follows the file until the lists are released or the process ends."""
    follower = ListFollower(lists, table, overlay, release)
    thread = SupervisedThread(follower.follow, args=(every_s,), name="live-lists", daemon=True)
    thread.start()
    return thread
