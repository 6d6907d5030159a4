"""Reconciles Release resources with the release store, so that users see the releases with ``kubectl``.

The store is authoritative; a ``Release`` repeats parts of the manifest. Every release in the store is recorded,
whichever job or machine wrote it. ``release_checks`` and the processes that serve a release verify it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any, Final

from reelway.platform.cluster.kube_api import ConflictError, KubeApi
from reelway.platform.cluster.resources import (
    GROUP,
    RELEASE_KIND,
    RELEASES,
    VERSION,
    Condition,
    ReleaseSpec,
    ReleaseStatus,
)
from reelway.platform.cluster.status import format_time
from reelway.platform.contracts.ids import short_id
from reelway.platform.contracts.manifest import Manifest
from reelway.platform.errors import ReelwayError, ReleaseError
from reelway.platform.release.store import ReleaseStore

log = logging.getLogger(__name__)

PATH: Final = f"{GROUP}/{VERSION}/{RELEASES}"
IN_STORE: Final = "InStore"
RECONCILE_INTERVAL_S: Final = 10.0
_SHOWN: Final = 12
"""Characters of a release id that form the resource's name."""


class ReleaseReconciler:
    """Writes the releases of a store as resources of a namespace.

    Args:
        url: path or URL of the store from this process.
    """

    def __init__(self, api: KubeApi, url: str) -> None:
        self._api, self._store = api, ReleaseStore(url)
        self._last_error = ""

    def run(self, stop: threading.Event, every_s: float = RECONCILE_INTERVAL_S) -> None:
        """Reconciles every ``every_s`` seconds until stopped. An error is logged once and retried."""
        while not stop.is_set():
            error_text = ""
            try:
                self.reconcile()
            except ReelwayError as error:
                error_text = str(error)
            if error_text != self._last_error:
                log.warning("releases: %s", error_text) if error_text else log.info("releases: recovered")
            self._last_error = error_text
            stop.wait(every_s)

    def reconcile(self) -> None:
        """Records new releases and updates the condition InStore of all releases.

        Raises:
            StorageError: if the store cannot be read, or the API server rejects a request (KubernetesError).
            ReleaseError: if a manifest is damaged; the other releases are recorded first.
        """
        recorded = {one["spec"]["id"]: one for one in self._api.list(PATH)}
        present = set(self._store.ids())
        damaged: ReelwayError | None = None
        for release_id in sorted(present):
            document = recorded.get(release_id)
            if document is not None and _reported_in_store(document) is True:
                continue
            try:
                self._write(document, self._store.manifest(release_id))
            except ReelwayError as error:
                damaged = error
            except Exception as error:  # one unexpected manifest must not hide the other releases
                log.exception("release %s: not recorded", short_id(release_id))
                damaged = ReleaseError(f"release {short_id(release_id)}: {type(error).__name__}: {error}")
        for release_id in recorded.keys() - present:
            if (
                recorded[release_id]["spec"]["store"] == self._store.url
                and _reported_in_store(recorded[release_id]) is not False
            ):
                self._mark_missing(recorded[release_id])
        if damaged is not None:
            raise damaged

    def _write(self, document: Mapping[str, Any] | None, manifest: Manifest) -> None:
        if document is None:
            spec = ReleaseSpec(id=manifest.release_id, store=self._store.url, parent=manifest.parent)
            head = {"apiVersion": f"{GROUP}/{VERSION}", "kind": RELEASE_KIND}
            named = {"metadata": {"name": manifest.release_id[:_SHOWN]}, "spec": spec.document()}
            try:
                document = self._api.create(PATH, {**head, **named})
            except ConflictError:
                return  # another writer was faster; the next reconcile reads its object
            log.info("release %s: found in the store, name %s", manifest.release_id[:_SHOWN], manifest.name)
        self._replace_status(document, _status(manifest, document["metadata"]["generation"]))

    def _mark_missing(self, document: Mapping[str, Any]) -> None:
        before = ReleaseStatus.model_validate(document.get("status") or {})
        generation = document["metadata"]["generation"]
        missing = _condition("False", "Removed", f"{self._store.url} no longer has this release", generation)
        self._replace_status(document, before.model_copy(update={"conditions": (missing,)}))
        log.info("release %s: removed from the store", document["metadata"]["name"])

    def _replace_status(self, document: Mapping[str, Any], status: ReleaseStatus) -> None:
        try:
            self._api.replace(
                f"{PATH}/{document['metadata']['name']}/status", {**document, "status": status.document()}
            )
        except ConflictError:
            return  # it changed meanwhile; the next reconcile reads it


def _status(manifest: Manifest, generation: int) -> ReleaseStatus:
    failed = [gate.name for gate in manifest.gates if not gate.passed]
    waived = {waiver.gate for waiver in manifest.waivers}
    gates = "hold" if not failed else "waived" if set(failed) <= waived else "failed"
    return ReleaseStatus(
        name=manifest.name,
        created_at=manifest.created_at.strftime("%Y-%m-%dT%H:%M:%SZ"),
        gates=gates,
        failed_gates=tuple(failed),
        metrics={name: f"{value:.4g}" for name, value in sorted(manifest.metrics.items())},
        conditions=(_condition("True", "Found", "", generation),),
    )


def _condition(status: str, reason: str, message: str, generation: int) -> Condition:
    return Condition.model_validate(
        {"type": IN_STORE, "status": status, "reason": reason, "message": message, "observedGeneration": generation,
         "lastTransitionTime": format_time(time.time())}
    )  # fmt: skip


def _reported_in_store(document: Mapping[str, Any]) -> bool | None:
    """Returns the recorded condition InStore of the current generation; None if there is none."""
    for condition in (document.get("status") or {}).get("conditions") or ():
        if condition["type"] == IN_STORE and condition["observedGeneration"] == document["metadata"]["generation"]:
            return bool(condition["status"] == "True")
    return None
