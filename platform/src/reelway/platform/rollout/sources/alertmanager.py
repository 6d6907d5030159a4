"""Polls firing alerts from Alertmanager, so that a lost webhook does not hide an alert.

Alerts that are silenced, inhibited or without a release label are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Final

import httpx

from reelway.platform.errors import DataError, RolloutError
from reelway.platform.rollout.alerts import RELEASE_LABEL, KnownAlert, parse_polled_alerts
from reelway.platform.rollout.sources.monitoring_access import MonitoringAccess

TIMEOUT_S: Final = 1.0
_QUERY: Final = {"active": "true", "silenced": "false", "inhibited": "false", "unprocessed": "false"}


class AlertmanagerClient:
    """Client of one Alertmanager (API v2)."""

    def __init__(self, url: str, *, access: MonitoringAccess | None = None, timeout_s: float = TIMEOUT_S) -> None:
        access = access or MonitoringAccess()
        self._url = f"{url.rstrip('/')}/api/v2/alerts"
        self._parameters = {**_QUERY, "filter": [f'{RELEASE_LABEL}=~".+"', *_namespace_filter(access.labels)]}
        self._client = access.client(timeout_s)

    def poll(self) -> Sequence[KnownAlert]:
        """Returns all firing alerts with a release label, except those of another namespace.

        Raises:
            RolloutError: on a timeout, an error, or an answer that is not a list of alerts.
        """
        try:
            answer = self._client.get(self._url, params=self._parameters)
            answer.raise_for_status()
            return parse_polled_alerts(answer.json())
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = error or type(error).__name__
            raise RolloutError(f"no alerts from Alertmanager at {self._url}: {reason}") from error
        except (ValueError, DataError) as error:
            raise RolloutError(f"Alertmanager at {self._url}: expected an answer of API v2: {error}") from error

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()


def _namespace_filter(labels: Mapping[str, str]) -> list[str]:
    """Filters that also accept alerts without the label, such as those of a cluster-wide rule."""
    return [f"{name}=~{json.dumps(re.escape(value) + '|')}" for name, value in labels.items()]
