"""Polls of an alert source, and whether all alerts are known.

A webhook can be lost, so that only polls show that *no* alert fires. An answer that was cut, and a source that has not
answered for too long, are therefore missing telemetry and not "nothing fires".
"""

from __future__ import annotations

from collections.abc import Callable

from reelway.platform.errors import RolloutError
from reelway.platform.rollout.control.alert_registry import AlertRegistry
from reelway.platform.rollout.evidence_source import AlertSource


class AlertPolls:
    """Polls one source into a registry.

    Args:
        source: None if alerts arrive by webhook only.
        clock: Unix seconds.
    """

    def __init__(self, source: AlertSource | None, alerts: AlertRegistry, clock: Callable[[], float]) -> None:
        self._source, self._alerts, self._clock = source, alerts, clock
        self._complete_at = clock()
        self._cut = ""
        self.failure = ""
        """Why the last poll has no complete answer; empty if it has."""

    @property
    def enabled(self) -> bool:
        """Whether there is a source."""
        return self._source is not None

    def poll(self) -> bool:
        """Polls once. Returns whether the known alerts changed; those of a cut answer are known, too.

        Raises:
            StorageError: if the alerts cannot be stored; they are known nevertheless.
        """
        assert self._source is not None
        deliveries = self._alerts.deliveries
        try:
            polled = self._source.poll(self._alerts.relevance())
        except RolloutError as error:
            self.failure = str(error)
            return False
        self.failure = self._cut = polled.problem
        if not polled.problem:
            self._complete_at = self._clock()
        return self._alerts.poll(polled, deliveries=deliveries)

    def problem(self, max_age_s: float) -> str:
        """Returns why alerts may fire that are not known; empty if all are known."""
        if omission := self._alerts.omission():
            return f"Alertmanager's {omission}; send fewer alerts to the receiver"
        if self._source is None:
            return ""
        if self._cut:
            return self._cut
        age_s = self._clock() - self._complete_at
        if age_s > max_age_s:
            return f"no complete answer of Alertmanager for {age_s:.0f} s, allowed {max_age_s:.0f} s ({self.failure})"
        return ""
