"""Why: a webhook that was lost must not mean that a firing alert is never seen: Alertmanager can also be asked.

Asks for what is active, neither silenced nor inhibited, and names a release; refuses to judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import httpx

from reelway.platform.errors import DataError, RolloutError
from reelway.platform.rollout.alerts import RELEASE_LABEL, KnownAlert, from_poll

TIMEOUT_S: Final = 1.0
_ASKED: Final = {
    "active": "true",
    "silenced": "false",
    "inhibited": "false",
    "unprocessed": "false",
    "filter": f'{RELEASE_LABEL}=~".+"',
}


class AlertmanagerPoll:
    """Asks one Alertmanager (API v2)."""

    def __init__(self, url: str, *, timeout_s: float = TIMEOUT_S) -> None:
        self._url = f"{url.rstrip('/')}/api/v2/alerts"
        self._client = httpx.Client(timeout=timeout_s, trust_env=False)

    def poll(self) -> Sequence[KnownAlert]:
        """All alerts that fire and carry a release.

        Raises:
            RolloutError: no answer in time, an error, or an answer that is not a list of alerts.
        """
        try:
            answer = self._client.get(self._url, params=_ASKED)
            answer.raise_for_status()
            return from_poll(answer.json())
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            told = error or type(error).__name__
            raise RolloutError(f"no alerts from Alertmanager at {self._url}: {told}") from error
        except (ValueError, DataError) as error:
            raise RolloutError(f"Alertmanager at {self._url}: not an answer of API v2: {error}") from error

    def close(self) -> None:
        """Let go of the connections."""
        self._client.close()
