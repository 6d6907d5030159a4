"""Leader election with a Lease: only its holder manages rollouts.

Two operators that both move traffic would undo each other's changes. The Lease needs the rights ``get``, ``create`` and
``update`` on one object. Clocks of different machines are never compared: a holder counts as lost if its record has not
changed for the lease duration by the local clock. A holder that cannot renew stops before another replica can take
over. If a process was frozen for longer than that, statuses are still written by resource version, so one of the two
writes is rejected.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

from reelway.platform.cluster.kube_api import ConflictError, KubeApi, KubeObject
from reelway.platform.errors import KubernetesError

log = logging.getLogger(__name__)

_PATH: Final = "coordination.k8s.io/v1/leases"


class LeaderElector:
    """One candidate for a Lease.

    Args:
        identity: name of this process. A restarted container keeps its pod's name and so continues at once.
        duration_s: another replica can take over this many seconds after the last renewal.
    """

    def __init__(
        self,
        api: KubeApi,
        name: str,
        identity: str,
        *,
        duration_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api, self._name, self._identity = api, name, identity
        self._duration_s, self._clock = duration_s, clock
        self._renewed_at = -1e9
        self._observed: tuple[str, float] = ("", -1e9)
        self.holder = ""

    def acquire(self, stop: threading.Event) -> bool:
        """Waits until this process holds the Lease. Returns False if stopped before."""
        reported_holder = ""
        while not stop.is_set():
            try:
                if self.try_acquire_or_renew():
                    log.info("lease %s: acquired by %s", self._name, self._identity)
                    return True
            except KubernetesError as error:
                log.warning("lease %s: %s", self._name, error)
            if self.holder and self.holder != reported_holder:
                reported_holder = self.holder
                log.info("lease %s: waiting, held by %s", self._name, reported_holder)
            stop.wait(self._duration_s / 5)
        return False

    def renew_until(self, stop: threading.Event, on_lost: Callable[[], None]) -> None:
        """Renews until stopped. Calls ``on_lost`` once if the Lease is lost or could not be renewed for 70 % of its
        duration.
        """
        while not stop.wait(self._duration_s / 5):
            try:
                if not self.try_acquire_or_renew():
                    log.error("lease %s: lost to %s", self._name, self.holder)
                    on_lost()
                    return
            except Exception as error:  # an unexpected error must not end the renewal unnoticed
                silent_s = self._clock() - self._renewed_at
                log.warning("lease %s: not renewed for %.1f s: %s", self._name, silent_s, error)
                if silent_s > 0.7 * self._duration_s:
                    on_lost()
                    return

    def try_acquire_or_renew(self) -> bool:
        """Acquires or renews the Lease. Returns whether this process holds it.

        Raises:
            KubernetesError: if the API server cannot be reached.
        """
        began = self._clock()
        document = self._api.get(f"{_PATH}/{self._name}")
        try:
            if document is None:
                self._api.create(_PATH, self._document(None))
            elif self._is_available(document):
                self._api.replace(f"{_PATH}/{self._name}", self._document(document))
            else:
                return False
        except ConflictError:
            return False  # another replica was faster; the next attempt reads its name
        self._renewed_at, self.holder = began, self._identity
        return True

    def release(self) -> None:
        """Clears the holder, so that another replica can take over at once."""
        try:
            document = self._api.get(f"{_PATH}/{self._name}")
            if document is not None and document["spec"].get("holderIdentity") == self._identity:
                empty = self._document(document)
                empty["spec"]["holderIdentity"] = ""
                self._api.replace(f"{_PATH}/{self._name}", empty)
        except KubernetesError as error:
            log.warning("lease %s: not released, it expires on its own: %s", self._name, error)

    def _is_available(self, document: KubeObject) -> bool:
        spec, now = document.get("spec", {}), self._clock()
        self.holder = spec.get("holderIdentity", "")
        version = str(document["metadata"]["resourceVersion"])
        if version != self._observed[0]:
            self._observed = (version, now)
        lasts_s = float(spec.get("leaseDurationSeconds") or self._duration_s)
        return self.holder in ("", self._identity) or now - self._observed[1] > lasts_s

    def _document(self, before: KubeObject | None) -> dict[str, Any]:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        old = (before or {}).get("spec", {})
        same = old.get("holderIdentity") == self._identity
        metadata: dict[str, Any] = {"name": self._name}
        if before is not None:
            metadata["resourceVersion"] = before["metadata"]["resourceVersion"]
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": metadata,
            "spec": {
                "holderIdentity": self._identity,
                "leaseDurationSeconds": max(1, round(self._duration_s)),
                "acquireTime": old.get("acquireTime", now) if same else now,
                "renewTime": now,
                "leaseTransitions": int(old.get("leaseTransitions", 0)) + (0 if same else 1),
            },
        }
