"""Why: alerts come from two sides (delivered and polled) and have to survive a restart; this is where both are merged.

Keeps what ``alerts`` computes, in the store first and in memory after, so that what was acknowledged to a sender is
there after a crash. One book per controller; safe between its threads. It acts on nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping

from reelway.platform.rollout.alerts import AlertKey, KnownAlert, firing_for, merge_alerts, replace_polled
from reelway.platform.rollout.evidence import FiringAlert
from reelway.platform.rollout.records import RolloutStore

_Book = Mapping[AlertKey, KnownAlert]


class AlertBook:
    """All alerts that are known.

    Raises:
        StorageError: of every method that changes it: it could not be written, and is as it was.
    """

    def __init__(self, store: RolloutStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._book: _Book = store.alerts()

    def deliver(self, news: Iterable[KnownAlert]) -> bool:
        """Merge what a webhook brought; stored when this returns. Whether it changed anything."""
        return self._change(lambda book: merge_alerts(book, news))

    def poll(self, polled: Iterable[KnownAlert]) -> bool:
        """Replace what was polled before. Whether it changed anything."""
        return self._change(lambda book: replace_polled(book, polled))

    def firing_for(self, release: str, *, since: float) -> tuple[FiringAlert, ...]:
        """See ``alerts.firing_for``. Reads memory only."""
        return firing_for(self._book, release, since=since)

    def _change(self, change: Callable[[_Book], dict[AlertKey, KnownAlert]]) -> bool:
        with self._lock:
            changed = change(self._book)
            if changed == self._book:
                return False
            self._store.replace_alerts(changed)
            self._book = changed
            return True
