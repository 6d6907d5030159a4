"""Polls firing alerts from Alertmanager, so that a lost webhook does not hide an alert.

Alerts that are silenced, inhibited or without a release label are left out.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from typing import Final

import httpx

from reelway.platform.errors import DataError, RolloutError
from reelway.platform.rollout.alert_stream import MAX_RELEVANT, AlertListStream
from reelway.platform.rollout.alerts import RELEASE_LABEL, PolledAlerts, Relevance
from reelway.platform.rollout.sources.monitoring_access import MonitoringAccess

TIMEOUT_S: Final = 5.0
"""How long the server may be silent. With thousands of alerts it needs a while for the first byte."""
ANSWER_TIMEOUT_S: Final = 10.0
"""How long a whole answer may take."""
MAX_ANSWER_BYTES: Final = 64 << 20
_QUERY: Final = {"active": "true", "silenced": "false", "inhibited": "false", "unprocessed": "false"}


class AlertmanagerClient:
    """Client of one Alertmanager (API v2)."""

    def __init__(self, url: str, *, access: MonitoringAccess | None = None, timeout_s: float = TIMEOUT_S) -> None:
        access = access or MonitoringAccess()
        self._url = f"{url.rstrip('/')}/api/v2/alerts"
        self._parameters = {**_QUERY, "filter": [f'{RELEASE_LABEL}=~".+"', *_namespace_filter(access.labels)]}
        self._client = access.client(timeout_s)

    def poll(self, is_relevant: Relevance) -> PolledAlerts:
        """Returns the relevant firing alerts, except those of another namespace.

        Raises:
            RolloutError: on a timeout or an error before the answer begins. An answer that is cut later, that is longer
                than the limits, or that is no list of alerts has a ``problem``.
        """
        stream = AlertListStream(is_relevant)
        try:
            with self._client.stream("GET", self._url, params=self._parameters) as answer:
                answer.raise_for_status()
                problem = self._read(answer, stream)
                return PolledAlerts(tuple(stream.found), problem)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = error or type(error).__name__
            raise RolloutError(f"no alerts from Alertmanager at {self._url}: {reason}") from error

    def _read(self, answer: httpx.Response, stream: AlertListStream) -> str:
        """Reads an answer. Returns why it was cut; empty if it was complete."""
        read, deadline = 0, time.monotonic() + ANSWER_TIMEOUT_S
        where = f"Alertmanager at {self._url}"
        try:
            for piece in answer.iter_bytes():
                read += len(piece)
                if read > MAX_ANSWER_BYTES or time.monotonic() > deadline:
                    return (
                        f"{where}: the answer was cut after {read} bytes, read at most {MAX_ANSWER_BYTES} bytes in "
                        f"{ANSWER_TIMEOUT_S:g} s"
                    )
                stream.feed(piece)
            stream.close()
        except httpx.HTTPError as error:
            return f"{where}: the answer was cut after {read} bytes: {error or type(error).__name__}"
        except DataError as error:
            return f"{where}: expected an answer of API v2: {error}"
        if stream.skipped:
            return f"{where}: {MAX_RELEVANT + stream.skipped} alerts of the releases fire, read at most {MAX_RELEVANT}"
        return ""

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()


def _namespace_filter(labels: Mapping[str, str]) -> list[str]:
    """Filters that also accept alerts without the label, such as those of a cluster-wide rule."""
    return [f"{name}=~{json.dumps(re.escape(value) + '|')}" for name, value in labels.items()]
