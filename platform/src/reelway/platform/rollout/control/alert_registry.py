"""All known alerts, merged from webhook deliveries and polls.

Alerts are stored first and kept in memory second, so that what was acknowledged to Alertmanager survives a crash.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping

from reelway.platform.rollout.alerts import AlertKey, KnownAlert, firing_for, merge_alerts, replace_polled
from reelway.platform.rollout.evidence import FiringAlert
from reelway.platform.rollout.records import RolloutStore

_Book = Mapping[AlertKey, KnownAlert]


class AlertRegistry:
    """All known alerts of one controller. Its threads may share the object.

    Raises:
        StorageError: by every method that changes alerts, if they cannot be stored; then nothing changes.
    """

    def __init__(self, store: RolloutStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._book: _Book = store.alerts()

    def deliver(self, news: Iterable[KnownAlert]) -> bool:
        """Merges and stores a webhook's alerts. Returns whether anything changed."""
        return self._change(lambda book: merge_alerts(book, news))

    def poll(self, polled: Iterable[KnownAlert]) -> bool:
        """Replaces the alerts of the previous poll. Returns whether anything changed."""
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
