"""Why: whoever reads rollouts on a cluster either asks each time (a person's command) or is told (the operator).

Both are a *shelf*: the namespace's ReleaseRollouts as they are known now. A shelf decides nothing and writes nothing;
who wrote an object puts the server's answer there, so that one's own write is never waited for. A copy may be old;
every write names the version that it is based on, so that an old copy costs a refused write and never a lost one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from pydantic import ValidationError

from reelway.platform.cluster.kube_api import KubeApi
from reelway.platform.cluster.resources import GROUP, ROLLOUTS, VERSION, Resource
from reelway.platform.errors import KubernetesError

log = logging.getLogger(__name__)

PATH: Final = f"{GROUP}/{VERSION}/{ROLLOUTS}"


class Shelf(Protocol):
    """Rollouts as they are known."""

    def all(self) -> Sequence[Resource]:
        """In no order."""
        ...

    def put(self, resource: Resource) -> None:
        """The server's answer to a write of one's own."""
        ...

    def changes(self, *, own: bool) -> int:
        """See ``RolloutStore.changes``."""
        ...


class AskingShelf:
    """Asks the API server at every use. For commands."""

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
    """What a watch tells, in memory. For the operator. Safe between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, Resource] = {}
        self._own_versions: dict[str, int] = {}
        self._own = self._others = 0

    def all(self) -> Sequence[Resource]:
        with self._lock:
            return list(self._known.values())

    def by_uid(self, uid: str) -> Resource | None:
        """One of them; None when there is none (any more)."""
        with self._lock:
            return self._known.get(uid)

    def expect(self, uid: str, version: int) -> None:
        """``version`` of this one's state is about to be written here: its echo is no news."""
        with self._lock:
            self._own_versions[uid] = max(version, self._own_versions.get(uid, 0))

    def put(self, resource: Resource) -> None:
        with self._lock:
            self._own += 1
            if _newer(resource, self._known.get(resource.uid)):
                self._known[resource.uid] = resource

    def tell(self, document: Mapping[str, Any], *, gone: bool = False) -> None:
        """What a watch brought. What cannot be read is left out, and said."""
        uid = document["metadata"]["uid"]
        if gone:
            self.forget(uid)
            return
        try:
            resource = Resource.of(document)
        except ValidationError as error:
            log.error("%s is not read: %s", document["metadata"].get("name"), error.errors()[:3])
            return
        with self._lock:
            before = self._known.get(uid)
            if not _newer(resource, before):
                return
            self._known[uid] = resource
            if before is None or self._news(before, resource):
                self._others += 1

    def forget(self, uid: str) -> None:
        """It was deleted."""
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
    """Raises KubernetesError: it is not what this version writes."""
    try:
        return Resource.of(document)
    except ValidationError as error:
        raise KubernetesError(
            f"ReleaseRollout {document['metadata'].get('name')} cannot be read: {error.errors()[0]['loc']}: "
            f"{error.errors()[0]['msg']}; are the CRDs this version's?"
        ) from error


def _newer(resource: Resource, known: Resource | None) -> bool:
    return known is None or int(resource.resource_version) >= int(known.resource_version)
