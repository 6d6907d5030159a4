"""All known alerts, merged from webhook deliveries and polls.

Alerts are stored first and kept in memory second, so that an acknowledged delivery survives a crash.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping

from reelway.platform.rollout.alerts import AlertKey, KnownAlert, firing_for, merge_alerts, replace_polled
from reelway.platform.rollout.evidence import FiringAlert
from reelway.platform.rollout.records import RolloutStore

_AlertsByKey = Mapping[AlertKey, KnownAlert]


class AlertRegistry:
    """All known alerts of one controller. Its threads may share the object.

    Raises:
        StorageError: by every method that changes alerts, if they cannot be stored; then nothing changes.
    """

    def __init__(self, store: RolloutStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._alerts: _AlertsByKey = store.alerts()

    def deliver(self, news: Iterable[KnownAlert]) -> bool:
        """Merges and stores a webhook's alerts. Returns whether anything changed."""
        return self._change(lambda alerts: merge_alerts(alerts, news))

    def poll(self, polled: Iterable[KnownAlert]) -> bool:
        """Replaces the alerts of the previous poll. Returns whether anything changed."""
        return self._change(lambda alerts: replace_polled(alerts, polled))

    def firing_for(self, release: str, *, since: float) -> tuple[FiringAlert, ...]:
        """See ``alerts.firing_for``. Reads memory only."""
        return firing_for(self._alerts, release, since=since)

    def _change(self, change: Callable[[_AlertsByKey], dict[AlertKey, KnownAlert]]) -> bool:
        with self._lock:
            changed = change(self._alerts)
            if changed == self._alerts:
                return False
            self._store.replace_alerts(changed)
            self._alerts = changed
            return True
