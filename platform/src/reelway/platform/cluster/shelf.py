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
from reelway.platform.cluster.resources import GROUP, ROLLOUTS, VERSION, Resource
from reelway.platform.errors import KubernetesError

log = logging.getLogger(__name__)

PATH: Final = f"{GROUP}/{VERSION}/{ROLLOUTS}"


class Shelf(Protocol):
    """The rollouts of a namespace as currently known."""

    def all(self) -> Sequence[Resource]:
        """Returns all rollouts in no particular order."""
        ...

    def put(self, resource: Resource) -> None:
        """Stores the server's answer to a write of this process."""
        ...

    def changes(self, *, own: bool) -> int:
        """See ``RolloutStore.revision``."""
        ...


class AskingShelf:
    """Reads from the API server on every call. Used by commands."""

    def __init__(self, api: KubeApi) -> None:
        self._api = api
        self._versions: dict[str, str] = {}
        self._own = self._others = 0

    def all(self) -> Sequence[Resource]:
        return [read(document) for document in self._api.list(PATH)]

    def put(self, resource: Resource) -> None:
        self._own += 1
        self._versions[resource.uid] = resource.resource_version

    def changes(self, *, own: bool) -> int:
        versions = self._api.list_versions(PATH)
        if versions != self._versions:
            self._others += 1
            self._versions = versions
        return self._others + self._own if own else self._others


class ToldShelf:
    """Rollouts in memory, fed by ``rollout_watch``. Used by the operator. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, Resource] = {}
        self._own_versions: dict[str, int] = {}
        self._own = self._others = 0

    def all(self) -> Sequence[Resource]:
        with self._lock:
            return list(self._known.values())

    def by_uid(self, uid: str) -> Resource | None:
        """Returns one rollout; None if it does not exist or was deleted."""
        with self._lock:
            return self._known.get(uid)

    def expect(self, uid: str, version: int) -> None:
        """Announces an own write of state version ``version``, so that its watch event is not a foreign change."""
        with self._lock:
            self._own_versions[uid] = max(version, self._own_versions.get(uid, 0))

    def put(self, resource: Resource) -> None:
        """Stores the server's answer to a write of this process.

        A rollout that is not in the cache is ignored: its deletion was observed before the answer arrived.
        """
        with self._lock:
            self._own += 1
            known = self._known.get(resource.uid)
            if known is not None and _newer(resource, known):
                self._known[resource.uid] = resource

    def replace(self, documents: Iterable[Mapping[str, Any]]) -> None:
        """Replaces the content with a complete list from the server. A copy that is newer than the list's stays."""
        listed = {str(document["metadata"]["uid"]): document for document in documents}
        for resource in self.all():
            if resource.uid not in listed:
                self.forget(resource.uid)
        for document in listed.values():
            self.tell(document)

    def tell(self, document: Mapping[str, Any], *, gone: bool = False) -> None:
        """Applies a watch event. An object that cannot be parsed is logged and ignored."""
        uid = document["metadata"]["uid"]
        if gone:
            self.forget(uid)
            return
        try:
            resource = Resource.of(document)
        except ValidationError as error:
            log.error(
                "rollout %s ignored, it cannot be parsed: %s", document["metadata"].get("name"), error.errors()[:3]
            )
            return
        with self._lock:
            before = self._known.get(uid)
            if before is not None and not _newer(resource, before):
                return
            self._known[uid] = resource
            if before is None or self._news(before, resource):
                self._others += 1

    def forget(self, uid: str) -> None:
        """Removes a deleted rollout."""
        with self._lock:
            if self._known.pop(uid, None) is not None:
                self._others += 1

    def changes(self, *, own: bool) -> int:
        with self._lock:
            return self._others + self._own if own else self._others

    def _news(self, before: Resource, after: Resource) -> bool:
        if (before.generation, before.deleting) != (after.generation, after.deleting):
            return True
        return after.status.version > self._own_versions.get(after.uid, 0)


def read(document: Mapping[str, Any]) -> Resource:
    """Parses a ReleaseRollout. Raises KubernetesError if it is not of this version of the CRD."""
    try:
        return Resource.of(document)
    except ValidationError as error:
        raise KubernetesError(
            f"cannot parse ReleaseRollout {document['metadata'].get('name')}: {error.errors()[0]['loc']}: "
            f"{error.errors()[0]['msg']}; check that the installed CRDs are of this version"
        ) from error


def _newer(resource: Resource, known: Resource) -> bool:
    return int(resource.resource_version) >= int(known.resource_version)
