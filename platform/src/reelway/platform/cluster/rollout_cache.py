"""Two ways to read the ReleaseRollouts of a namespace: from the API server, or from a cache that a watch fills.

Commands read from the server (``UncachedRollouts``); the operator reads from memory (``InformerCache``). After a write
of its own a store puts the server's answer into the cache, so that the write is visible at once. A cached copy may be
outdated. Every write names the resource version that it is based on, so an outdated copy causes a rejected write and
never a lost one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

from pydantic import ValidationError

from reelway.platform.cluster.kube_api import KubeApi
from reelway.platform.cluster.resources import GROUP, ROLLOUTS, VERSION, RolloutResource
from reelway.platform.errors import KubernetesError

log = logging.getLogger(__name__)

PATH: Final = f"{GROUP}/{VERSION}/{ROLLOUTS}"


class RolloutCache(Protocol):
    """The rollouts of a namespace as currently known."""

    def all(self) -> Sequence[RolloutResource]:
        """Returns all rollouts in no particular order."""
        ...

    def store_written(self, resource: RolloutResource) -> None:
        """Stores the server's answer to a write of this process."""
        ...

    def revision(self, *, include_own: bool) -> int:
        """See ``RolloutStore.revision``."""
        ...


class UncachedRollouts:
    """Reads from the API server on every call. Used by commands."""

    def __init__(self, api: KubeApi) -> None:
        self._api = api
        self._versions: dict[str, str] = {}
        self._own_writes = self._foreign_writes = 0

    def all(self) -> Sequence[RolloutResource]:
        return [parse_rollout(document) for document in self._api.list(PATH)]

    def store_written(self, resource: RolloutResource) -> None:
        self._own_writes += 1
        self._versions[resource.uid] = resource.resource_version

    def revision(self, *, include_own: bool) -> int:
        versions = self._api.list_versions(PATH)
        if versions != self._versions:
            self._foreign_writes += 1
            self._versions = versions
        return self._foreign_writes + self._own_writes if include_own else self._foreign_writes


class InformerCache:
    """Rollouts in memory, fed by ``rollout_watch``. Used by the operator. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_uid: dict[str, RolloutResource] = {}
        self._own_versions: dict[str, int] = {}
        self._own_writes = self._foreign_writes = 0

    def all(self) -> Sequence[RolloutResource]:
        with self._lock:
            return list(self._by_uid.values())

    def by_uid(self, uid: str) -> RolloutResource | None:
        """Returns one rollout; None if it does not exist or was deleted."""
        with self._lock:
            return self._by_uid.get(uid)

    def expect_own_write(self, uid: str, version: int) -> None:
        """Announces an own write of state version ``version``, so that its watch event is not a foreign change."""
        with self._lock:
            self._own_versions[uid] = max(version, self._own_versions.get(uid, 0))

    def store_written(self, resource: RolloutResource) -> None:
        """Stores the server's answer to a write of this process.

        A rollout that is not in the cache is ignored: its deletion was observed before the answer arrived.
        """
        with self._lock:
            self._own_writes += 1
            known = self._by_uid.get(resource.uid)
            if known is not None and _newer(resource, known):
                self._by_uid[resource.uid] = resource

    def replace(self, documents: Iterable[Mapping[str, Any]]) -> None:
        """Replaces the content with a complete list from the server. A copy that is newer than the list's stays."""
        listed = {str(document["metadata"]["uid"]): document for document in documents}
        for resource in self.all():
            if resource.uid not in listed:
                self.remove(resource.uid)
        for document in listed.values():
            self.apply_event(document)

    def apply_event(self, document: Mapping[str, Any], *, deleted: bool = False) -> None:
        """Applies a watch event. An object that cannot be parsed is logged and ignored."""
        uid = document["metadata"]["uid"]
        if deleted:
            self.remove(uid)
            return
        try:
            resource = RolloutResource.from_document(document)
        except ValidationError as error:
            log.error(
                "rollout %s ignored, it cannot be parsed: %s", document["metadata"].get("name"), error.errors()[:3]
            )
            return
        with self._lock:
            before = self._by_uid.get(uid)
            if before is not None and not _newer(resource, before):
                return
            self._by_uid[uid] = resource
            if before is None or self._is_foreign_change(before, resource):
                self._foreign_writes += 1

    def remove(self, uid: str) -> None:
        """Removes a deleted rollout."""
        with self._lock:
            if self._by_uid.pop(uid, None) is not None:
                self._foreign_writes += 1

    def revision(self, *, include_own: bool) -> int:
        with self._lock:
            return self._foreign_writes + self._own_writes if include_own else self._foreign_writes

    def _is_foreign_change(self, before: RolloutResource, after: RolloutResource) -> bool:
        if (before.generation, before.deleting) != (after.generation, after.deleting):
            return True
        return after.status.version > self._own_versions.get(after.uid, 0)


def parse_rollout(document: Mapping[str, Any]) -> RolloutResource:
    """Parses a ReleaseRollout. Raises KubernetesError if it is not of this version of the CRD."""
    try:
        return RolloutResource.from_document(document)
    except ValidationError as error:
        raise KubernetesError(
            f"cannot parse ReleaseRollout {document['metadata'].get('name')}: {error.errors()[0]['loc']}: "
            f"{error.errors()[0]['msg']}; check that the installed CRDs are of this version"
        ) from error


def _newer(resource: RolloutResource, known: RolloutResource) -> bool:
    return int(resource.resource_version) >= int(known.resource_version)
