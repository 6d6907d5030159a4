"""Leader election with a Lease: only its holder manages rollouts.

Two operators that both move traffic would undo each other's changes. The Lease needs the rights ``get``, ``create`` and
``update`` on one object. Clocks of different machines are never compared: a holder counts as lost if its record has not
changed for the lease duration by the local clock. A holder that cannot renew for 70 % of the duration is cut off
before another replica can take over, and traffic is written only while that deadline has not passed
(``require_valid``). If a process was frozen for longer than that, statuses are still written by resource version, so
one of the two writes is rejected.

A holder that is cut off remains the last known holder. It may still roll back (``require_last_holder``), keeps trying
to renew, and continues as before if no other process has taken the Lease meanwhile. Otherwise the Lease is lost.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

from reelway.platform.cluster.kube_api import TIMEOUT_S, ConflictError, KubeApi, KubeObject
from reelway.platform.errors import KubernetesError, RolloutError

log = logging.getLogger(__name__)

_PATH: Final = "coordination.k8s.io/v1/leases"
_RENEW_DEADLINE_RATIO: Final = 0.7
"""A holder stops this part of the duration after its last renewal."""
_ATTEMPT_RATIO: Final = 0.35
"""Longest attempt as a part of the duration: a second one fits before the deadline if the first one hangs."""
_MIN_REQUEST_TIMEOUT_S: Final = 0.1
_NEVER: Final = -1e9


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
        self._renewed_at = _NEVER
        self._observed: tuple[str, float] = ("", _NEVER)
        self._last_holder = False
        """Whether this process held the Lease when the API server last answered."""
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

    def renew_until(
        self, stop: threading.Event, on_lost: Callable[[], None], on_cut_off: Callable[[bool], None] = lambda _: None
    ) -> None:
        """Renews until stopped, or until another process holds the Lease.

        Args:
            on_lost: called once if another process holds the Lease, or has held it.
            on_cut_off: called with True if the Lease was not renewed before its deadline, and with False once it is.
        """
        cut_off = failing = False
        while not stop.wait(self._pause_s()):
            try:
                if not self.try_acquire_or_renew():
                    log.error("lease %s: lost to %s", self._name, self.holder or "no holder, it was released")
                    on_lost()
                    return
                if cut_off:
                    on_cut_off(False)
                if failing:
                    log.warning("lease %s: renewed again", self._name)
                cut_off = failing = False
            except Exception as error:  # an unexpected error must not end the renewal unnoticed
                if not failing:
                    log.warning("lease %s: not renewed: %s", self._name, error)
                failing = True
                if not cut_off and self._remaining_s() < _MIN_REQUEST_TIMEOUT_S:
                    log.error("lease %s: cut off, nothing but rollbacks until it is renewed: %s", self._name, error)
                    cut_off = True
                    on_cut_off(True)

    def _pause_s(self) -> float:
        remaining_s = self._remaining_s()
        return min(self._duration_s / 5, remaining_s / 4) if remaining_s > 0 else self._duration_s / 5

    def require_valid(self) -> None:
        """Checks that this process may still write traffic. Sends no request.

        Raises:
            RolloutError: if the Lease was lost, released or not renewed before the deadline.
        """
        if self._remaining_s() <= 0:
            raise RolloutError(
                f"traffic not written: lease {self._name} is no longer held by {self._identity}; the replica that "
                "holds it writes the traffic"
            )

    def require_last_holder(self) -> None:
        """Checks that this process may roll back: it holds the Lease, or was cut off while it held it. No request.

        Raises:
            RolloutError: if another process holds the Lease, or this one has never held or has released it.
        """
        if not self._last_holder:
            raise RolloutError(
                f"traffic not written: {self._identity} is not the last holder of lease {self._name}; the replica that "
                "holds it writes the traffic"
            )

    def _remaining_s(self) -> float:
        """Returns the seconds to the deadline of the last renewal; negative if the Lease is not held."""
        return self._renewed_at + _RENEW_DEADLINE_RATIO * self._duration_s - self._clock()

    def try_acquire_or_renew(self) -> bool:
        """Acquires or renews the Lease. Returns whether this process holds it.

        An attempt of the holder ends before the Lease's deadline, also if the API server hangs.

        Raises:
            KubernetesError: if the API server cannot be reached in time.
        """
        began = self._clock()
        limit_s, remaining_s = _ATTEMPT_RATIO * self._duration_s, self._remaining_s()
        deadline = began + (min(limit_s, remaining_s) if remaining_s > 0 else limit_s)

        def timeout_s() -> float:
            return min(TIMEOUT_S, max(_MIN_REQUEST_TIMEOUT_S, deadline - self._clock()))

        document = self._api.get(f"{_PATH}/{self._name}", timeout_s=timeout_s())
        held = document is None or self._is_available(document)
        if held:
            try:
                if document is None:
                    self._api.create(_PATH, self._document(None), timeout_s=timeout_s())
                else:
                    self._api.replace(f"{_PATH}/{self._name}", self._document(document), timeout_s=timeout_s())
            except ConflictError:
                held = False  # another replica was faster; the next attempt reads its name
        self._renewed_at = began if held else _NEVER
        self._last_holder = held
        self.holder = self._identity if held else self.holder
        return held

    def release(self) -> None:
        """Clears the holder, so that another replica can take over at once."""
        self._renewed_at, self._last_holder = _NEVER, False
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
        if self._last_holder and self.holder != self._identity:
            return False  # another process has held it meanwhile
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
