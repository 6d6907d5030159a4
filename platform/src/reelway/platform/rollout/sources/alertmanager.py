"""Why: a webhook that was lost must not mean that a firing alert is never seen: Alertmanager can also be asked.

Asks for what is active, neither silenced nor inhibited, and names a release; refuses to judge.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Final

import httpx

from reelway.platform.errors import DataError, RolloutError
from reelway.platform.rollout.alerts import RELEASE_LABEL, KnownAlert, from_poll
from reelway.platform.rollout.sources.access import Access

TIMEOUT_S: Final = 1.0
_ASKED: Final = {"active": "true", "silenced": "false", "inhibited": "false", "unprocessed": "false"}


class AlertmanagerPoll:
    """Asks one Alertmanager (API v2)."""

    def __init__(self, url: str, *, access: Access | None = None, timeout_s: float = TIMEOUT_S) -> None:
        access = access or Access()
        self._url = f"{url.rstrip('/')}/api/v2/alerts"
        self._asked = {**_ASKED, "filter": [f'{RELEASE_LABEL}=~".+"', *_not_of_others(access.labels)]}
        self._client = access.client(timeout_s)

    def poll(self) -> Sequence[KnownAlert]:
        """All alerts that fire, carry a release and do not say that they are of another namespace than ours.

        Raises:
            RolloutError: no answer in time, an error, or an answer that is not a list of alerts.
        """
        try:
            answer = self._client.get(self._url, params=self._asked)
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


def _not_of_others(labels: Mapping[str, str]) -> list[str]:
    """An alert without the label, of somebody's own rule over all pods, is taken: that matches the empty value."""
    return [f"{name}=~{json.dumps(re.escape(value) + '|')}" for name, value in labels.items()]
