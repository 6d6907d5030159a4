"""Keeps the operator's cache of ReleaseRollouts up to date: list once, then watch.

The procedure is the one of Kubernetes' informers. Decision 0016 explains why the operator does not use Kopf for it.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Final

from reelway.platform.cluster.kube_api import ExpiredError, KubeApi
from reelway.platform.cluster.rollout_cache import PATH, InformerCache
from reelway.platform.errors import KubernetesError

log = logging.getLogger(__name__)

REQUEST_TIMEOUT_S: Final = 20.0
"""How long one watch request stays open. It bounds how long a connection that broke without notice goes undetected."""
_HEALTHY_RATIO: Final = 0.25
"""A request that stayed open for this part of its time was healthy: the pauses begin anew after it."""
_FIRST_DELAY_S: Final = 0.1
_MAX_DELAY_S: Final = 10.0


class RolloutWatch:
    """The list and watch requests behind an ``InformerCache``.

    - A request that ends, by timeout or by a lost connection, is resumed from the last resource version.
    - After a 410 (the server has compacted that version away) all rollouts are listed again.
    - Failures, and requests that the server ends early, are retried with exponential backoff and jitter. Only a
      request that stayed open for a while resets the backoff.

    Args:
        request_timeout_s: how long one watch request stays open, in seconds.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        api: KubeApi,
        cache: InformerCache,
        *,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api, self._cache = api, cache
        self._request_timeout_s = request_timeout_s
        self._clock = clock
        self._resource_version = ""
        self._failures = 0
        self._last_error = ""

    def sync(self) -> None:
        """Lists all rollouts and replaces the content of the cache.

        Raises:
            KubernetesError: if the server cannot be reached or the CRD is not installed.
        """
        documents, version = self._api.list_at(PATH)
        self._cache.replace(documents)
        self._resource_version = version

    def run(self, stop: threading.Event) -> None:
        """Watches until stopped. No error of the API server ends it."""
        while not stop.is_set():
            try:
                if not self._resource_version:
                    self.sync()
                if not self._follow(stop):
                    self._wait(stop)
            except ExpiredError:
                log.info("watch of rollouts: resource version %s expired, listing again", self._resource_version)
                self._resource_version = ""
                self._wait(stop)
            except KubernetesError as error:
                if str(error) != self._last_error:
                    log.warning("watch of rollouts: %s", error)
                self._last_error = str(error)
                self._wait(stop)

    def _follow(self, stop: threading.Event) -> bool:
        """Applies events until the server ends the request. Returns whether it stayed open long enough."""
        began = self._clock()
        for event in self._api.watch(PATH, self._resource_version, timeout_s=self._request_timeout_s):
            if event.type != "BOOKMARK":
                self._cache.apply_event(event.document, deleted=event.type == "DELETED")
            self._resource_version = event.resource_version
            self._answered(began)
            if stop.is_set():
                return True
        return self._answered(began)

    def _answered(self, began: float) -> bool:
        """Reports a recovery. Resets the backoff and returns True if the request has been open long enough."""
        if self._last_error:
            log.info("watch of rollouts: recovered")
        self._last_error = ""
        healthy = self._clock() - began >= _HEALTHY_RATIO * self._request_timeout_s
        if healthy:
            self._failures = 0
        return healthy

    def _wait(self, stop: threading.Event) -> None:
        delay_s = min(_MAX_DELAY_S, _FIRST_DELAY_S * 2**self._failures)
        self._failures = min(self._failures + 1, 10)
        stop.wait(delay_s * random.uniform(0.5, 1.0))
