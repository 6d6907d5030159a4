"""All known alerts, merged from webhook deliveries and polls.

Alerts are in memory first, so that a rollback does not wait for the store, and are acknowledged once they are stored,
so that an acknowledged delivery survives a crash.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping

from reelway.platform.rollout.alerts import (
    AlertKey,
    KnownAlert,
    PolledAlerts,
    Relevance,
    firing_for,
    merge_alerts,
    names_one_of,
    replace_polled,
)
from reelway.platform.rollout.evidence import FiringAlert
from reelway.platform.rollout.records import RolloutStore
from reelway.platform.rollout.state import RolloutState

_AlertsByKey = Mapping[AlertKey, KnownAlert]


class AlertRegistry:
    """All known alerts of one controller. Its threads may share the object.

    Args:
        on_change: called as soon as changed alerts are known, before they are stored.

    Raises:
        StorageError: by every method that changes alerts, if they cannot be stored. They are known nevertheless, and
            the next change stores them.
    """

    def __init__(self, store: RolloutStore, *, on_change: Callable[[], object] = lambda: None) -> None:
        self._store, self._on_change = store, on_change
        self._lock = threading.Lock()
        self._alerts: _AlertsByKey = store.alerts()
        self._unstored = False
        self.deliveries = 0
        """Number of deliveries so far."""

    def relevance(self) -> Relevance:
        """Returns what selects the alerts that name a release of one of the store's rollouts."""
        return names_one_of({rollout.state.canary_release for rollout in self._store.all()})

    def deliver(self, news: Iterable[KnownAlert]) -> bool:
        """Merges and stores a webhook's alerts. Returns whether anything changed."""
        with self._lock:
            self.deliveries += 1
        return self._change(lambda alerts: merge_alerts(alerts, self._stamped(news)))

    def poll(self, polled: PolledAlerts, *, deliveries: int | None = None) -> bool:
        """Merges a poll's alerts. A complete poll replaces the alerts of the previous one.

        Args:
            deliveries: number of deliveries when the poll began. What later ones omitted may be missing in the poll.

        Returns:
            Whether anything changed.
        """
        stamped = self._stamped(polled.alerts)
        keep = deliveries is not None and deliveries != self.deliveries
        if polled.problem:
            return self._change(lambda alerts: merge_alerts(alerts, stamped))
        return self._change(lambda alerts: replace_polled(alerts, stamped, keep_omissions=keep))

    def firing_for(self, state: RolloutState) -> tuple[FiringAlert, ...]:
        """See ``alerts.firing_for``. Reads memory only."""
        return firing_for(self._alerts, state)

    def omission(self) -> str:
        """Returns what deliveries omitted that no later delivery or poll has contained; empty if nothing."""
        found = next((alert for alert in self._alerts.values() if alert.is_omission), None)
        return f"{found.summary} {found.group_key:.200}" if found else ""

    def _stamped(self, news: Iterable[KnownAlert]) -> list[KnownAlert]:
        newest = self._store.latest()
        rollout = newest.state.id if newest else ""
        return [alert.model_copy(update={"rollout": rollout}) for alert in news]

    def _change(self, change: Callable[[_AlertsByKey], dict[AlertKey, KnownAlert]]) -> bool:
        with self._lock:
            changed = change(self._alerts)
            if changed == self._alerts and not self._unstored:
                return False
            self._alerts, self._unstored = changed, True
            self._on_change()
            self._store.replace_alerts(changed)
            self._unstored = False
            return True
