"""Reads one viewer's row and memory from the online store of a run and hides Feast's protos and provider.

Missing values are ``None``; a store that fails raises ``FeatureError``. So an unreachable store is not mistaken for an
unknown viewer. Feast is imported inside functions. The import takes about a second, and commands without features do
not need it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from reelway.platform.contracts.feature_names import VIEWER_SERVICE
from reelway.platform.errors import DataError, FeatureError, StorageError
from reelway.platform.features.feast_store import feature_service
from reelway.platform.features.viewer_memory import ViewerMemory, ViewerMemoryState
from reelway.platform.features.viewer_memory_redis import COMMANDS_PER_READ, RedisViewerMemory
from reelway.platform.viewer_pseudonyms import viewer_pseudonym

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView
    from feast.infra.online_stores.redis import RedisOnlineStore
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey

log = logging.getLogger(__name__)

AS_OF: Final = "as_of_s"
"""Key of a viewer's row for the times of its features; not a feature."""

Views = list[tuple["FeatureView", list[str]]]
"""Each view with its requested field names."""
Stored = Iterator[tuple[str, float | None, dict[str, Any]]]
"""For each view with the entity: the view's name, the row's time (Unix seconds), and field name -> Feast value."""


@dataclass(frozen=True, slots=True)
class StoredViewer:
    """What the stores hold of a viewer."""

    row: Mapping[str, Any] | None  # field name -> value; None: the row could not be read
    memory: ViewerMemoryState | None = None  # None: the memory could not be read


class ViewerRowReader:
    """Reads one viewer's row: the fields of a service's views, ``None`` if the store has no value.

    ``get_online_features`` spends most of its time on request checks and on a response table for many rows. This class
    queries the same online store for one known entity and decodes the values. Threads may share an instance.
    """

    def __init__(self, store: FeatureStore, service: str = VIEWER_SERVICE, memory: ViewerMemory | None = None) -> None:
        """Reads the service's views from the registry once.

        Args:
            memory: memory that ``read_viewer`` reads with the row.

        Raises:
            FeatureError: if the store does not contain the service.
        """
        from feast.infra.online_stores.redis import RedisOnlineStore

        views: Views = [
            (store.get_feature_view(projection.name), [field.name for field in projection.features])
            for projection in feature_service(store, service).feature_view_projections
        ]
        online = store._get_provider().online_store
        self._stored: Callable[[EntityKey], Stored]
        self._stored = (
            _RedisHashReader(store, online, views)
            if isinstance(online, RedisOnlineStore)
            else _PerViewReader(store, views)
        )
        self._empty = {name: None for _, fields in views for name in fields}
        self._memory = memory

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the values that ``read`` returns."""
        return tuple(self._empty)

    def read(self, viewer_id: int) -> dict[str, Any]:
        """Returns field name -> value (number, string or list), ``None`` if missing.

        If the viewer has rows, the value under ``AS_OF`` holds the time of each view's row (Unix seconds).

        Raises:
            FeatureError: if the online store cannot be read.
        """
        try:
            return self._to_row(self._stored(entity_key(viewer_id)))
        except Exception as error:  # Feast does not wrap the errors of its online store's client
            raise FeatureError(
                f"online store: cannot read {viewer_pseudonym(viewer_id)}: {type(error).__name__}: {error}"
            ) from error

    def read_viewer(self, viewer_id: int) -> StoredViewer:
        """Returns the viewer's row and memory, which Redis answers in one round trip.

        A part that cannot be read is ``None``.

        Raises:
            FeatureError: if neither can be read.
        """
        memory = self._memory
        if memory is None:
            return StoredViewer(self.read(viewer_id))
        if isinstance(self._stored, _RedisHashReader) and isinstance(memory, RedisViewerMemory):
            try:
                stored, state = self._stored.read_with_memory(entity_key(viewer_id), viewer_id, memory)
                return StoredViewer(self._to_row(stored), state)
            except Exception as error:  # see ``read``
                raise FeatureError(
                    f"online store: cannot read {viewer_pseudonym(viewer_id)}: {type(error).__name__}: {error}"
                ) from error
        remembered: ViewerMemoryState | None
        try:
            remembered = memory.read(viewer_id)
        except (StorageError, DataError) as error:
            log.warning("viewer memory not read: %s: %s", viewer_pseudonym(viewer_id), error)
            remembered = None
        try:
            return StoredViewer(self.read(viewer_id), remembered)
        except FeatureError as error:
            if remembered is None:
                raise
            log.warning("viewer row not read: %s", error)
            return StoredViewer(None, remembered)

    def _to_row(self, stored: Stored) -> dict[str, Any]:
        row: dict[str, Any] = dict(self._empty)
        as_of_s: dict[str, float] = {}
        for view, moment_s, values in stored:
            if moment_s is not None:
                as_of_s[view] = moment_s
            for name, value in values.items():
                row[name] = _decode_value(value)
        if as_of_s:
            row[AS_OF] = as_of_s
        return row


class _PerViewReader:
    """Reads from any Feast online store, with one query per view."""

    def __init__(self, store: FeatureStore, views: Views) -> None:
        self._store = store
        self._views = views
        self._lock = threading.Lock()  # Feast's SQLite store shares one connection between threads

    def __call__(self, key: EntityKey) -> Stored:
        config, provider = self._store.config, self._store._get_provider()
        with self._lock:
            answers = [provider.online_read(config, view, [key], list(fields))[0] for view, fields in self._views]
        for (view, fields), (moment, values) in zip(self._views, answers, strict=True):
            if values:
                seconds = None if moment is None else _to_unix_seconds(moment)
                yield view.name, seconds, {name: values[name] for name in fields if values.get(name) is not None}


class _RedisHashReader:
    """Reads from Feast's Redis store with one query for all views: the fields of an entity's views are in one hash.

    Feast's own code, in the version pinned by the constraints, computes the keys and decodes the values. A test
    compares the results with those of ``online_read``, view by view. Each query costs a network round trip and, in a
    process with other threads, a wait for the interpreter lock.
    """

    def __init__(self, store: FeatureStore, online: RedisOnlineStore, views: Views) -> None:
        from feast.infra.online_stores.redis import _versioned_fv_name
        from feast.protos.feast.types.Value_pb2 import Value
        from google.protobuf.timestamp_pb2 import Timestamp

        self._config, self._online = store.config, online
        self._value, self._timestamp = Value, Timestamp
        self._views: list[tuple[str, list[str]]] = []
        self._keys: list[str | bytes] = []
        for view, fields in views:
            stored_as = _versioned_fv_name(view, store.config)
            _, keys = online._generate_hset_keys_for_features(view, list(fields), fv_name_override=stored_as)
            self._views.append((view.name, fields))
            self._keys += keys  # the fields, followed by the view's time

    def __call__(self, key: EntityKey) -> Stored:
        (redis_key,) = self._online._generate_redis_keys_for_entities(self._config, [key])
        (stored,) = self._online._read_hash_fields(self._config, [(redis_key, self._keys)])
        return self._decode(stored)

    def read_with_memory(
        self, key: EntityKey, viewer_id: int, memory: RedisViewerMemory
    ) -> tuple[Stored, ViewerMemoryState | None]:
        """Reads the row and the memory with one pipeline, in one round trip. A damaged memory is ``None``."""
        (redis_key,) = self._online._generate_redis_keys_for_entities(self._config, [key])
        with memory.client.pipeline(transaction=False) as pipe:
            pipe.hmget(redis_key, self._keys)
            generations = memory.add_read(pipe, viewer_id)
            answers = pipe.execute(raise_on_error=False)
        if isinstance(answers[0], Exception):
            raise answers[0]
        state = None
        try:
            state = memory.decode(generations, answers[-COMMANDS_PER_READ:])
        except DataError as error:
            log.warning("viewer memory not read: %s: %s", viewer_pseudonym(viewer_id), error)
        return self._decode(answers[0]), state

    def _decode(self, stored: list[Any]) -> Stored:
        at = 0
        for view, fields in self._views:
            moment, values = stored[at + len(fields)], stored[at : at + len(fields)]
            at += len(fields) + 1
            if moment is not None:
                found = {n: self._value.FromString(v) for n, v in zip(fields, values, strict=True) if v is not None}
                yield view, self._timestamp.FromString(moment).ToNanoseconds() / 1e9, found


def entity_key(viewer_id: int) -> EntityKey:
    """Returns Feast's key of a viewer."""
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    return EntityKey(join_keys=["viewer_id"], entity_values=[Value(int64_val=viewer_id)])


def _to_unix_seconds(moment: datetime) -> float:
    """Converts to Unix seconds. Feast's SQLite store returns times without a zone, which are UTC."""
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _decode_value(value: Any) -> Any:
    kind = value.WhichOneof("val")
    if kind is None or kind == "null_val":
        return None
    content = getattr(value, kind)
    return list(content.val) if kind.endswith("_list_val") else content
