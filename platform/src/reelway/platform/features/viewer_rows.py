"""One viewer's row from the online store of a run.

Feast's protos and provider stay in here. It refuses to call a store that cannot be reached an unknown viewer: missing
values are ``None``, a store that fails is a ``FeatureError``. Feast is imported inside functions, because it takes a
second that a command without features should not pay.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from reelway.platform.contracts.features import VIEWER_SERVICE
from reelway.platform.errors import FeatureError
from reelway.platform.features.store import feature_service

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView
    from feast.infra.online_stores.redis import RedisOnlineStore
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey

AS_OF: Final = "as_of_s"
"""Of a viewer's row: not a feature, but when its features are from."""

Views = list[tuple["FeatureView", list[str]]]
"""Each view with the names of the fields that are wanted of it."""
Stored = Iterator[tuple[str, float | None, dict[str, Any]]]
"""Of each view that has the entity: its name, the moment its row is from (Unix seconds), field name -> Feast value."""


class ViewerRows:
    """Reads one viewer's row: the fields of a service's views, ``None`` where the store has nothing.

    ``get_online_features`` spends most of its time on request checks and a response table made for many rows; for one
    known entity this asks the same online store and decodes the values. Threads may share it.
    """

    def __init__(self, store: FeatureStore, service: str = VIEWER_SERVICE) -> None:
        """Look the views up once.

        Raises:
            FeatureError: the store does not have the service.
        """
        from feast.infra.online_stores.redis import RedisOnlineStore

        views: Views = [
            (store.get_feature_view(projection.name), [field.name for field in projection.features])
            for projection in feature_service(store, service).feature_view_projections
        ]
        online = store._get_provider().online_store
        self._stored: Callable[[EntityKey], Stored]
        self._stored = _RedisHash(store, online, views) if type(online) is RedisOnlineStore else _EachView(store, views)
        self._empty = {name: None for _, fields in views for name in fields}

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the values that ``read`` returns."""
        return tuple(self._empty)

    def read(self, viewer_id: int) -> dict[str, Any]:
        """Field name -> value (number, string or list), ``None`` where missing.

        Of a viewer with rows, ``AS_OF`` says for each view what moment its row is from (Unix seconds).

        Raises:
            FeatureError: the online store cannot be read.
        """
        from feast.protos.feast.types.EntityKey_pb2 import EntityKey
        from feast.protos.feast.types.Value_pb2 import Value

        key = EntityKey(join_keys=["viewer_id"], entity_values=[Value(int64_val=viewer_id)])
        row: dict[str, Any] = dict(self._empty)
        as_of_s: dict[str, float] = {}
        try:
            for view, moment_s, values in self._stored(key):
                if moment_s is not None:
                    as_of_s[view] = moment_s
                for name, value in values.items():
                    row[name] = _decoded(value)
        except Exception as error:  # Feast passes on whatever its online store's client raises
            raise FeatureError(
                f"online store: cannot read viewer {viewer_id}: {type(error).__name__}: {error}"
            ) from error
        if as_of_s:
            row[AS_OF] = as_of_s
        return row


class _EachView:
    """Any store of Feast's, one question a view."""

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
                seconds = None if moment is None else _seconds(moment)
                yield view.name, seconds, {name: values[name] for name in fields if values.get(name) is not None}


class _RedisHash:
    """Feast's Redis store, one question in all: an entity's fields of every view lie in one hash.

    Where a field lies and how it is asked for is Feast's own code, of the version that the constraints pin; a test
    holds the answers against those of ``online_read``, view by view. Every question is a turn of the network and, in a
    process with other threads, of the interpreter's lock.
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
            self._keys += keys  # the fields', and the moment's after them

    def __call__(self, key: EntityKey) -> Stored:
        (place,) = self._online._generate_redis_keys_for_entities(self._config, [key])
        (stored,) = self._online._read_hash_fields(self._config, [(place, self._keys)])
        at = 0
        for view, fields in self._views:
            moment, values = stored[at + len(fields)], stored[at : at + len(fields)]
            at += len(fields) + 1
            if moment is not None:
                found = {n: self._value.FromString(v) for n, v in zip(fields, values, strict=True) if v is not None}
                yield view, self._timestamp.FromString(moment).ToNanoseconds() / 1e9, found


def _seconds(moment: datetime) -> float:
    """Feast's SQLite store gives moments without a zone, which are UTC."""
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _decoded(value: Any) -> Any:
    kind = value.WhichOneof("val")
    if kind is None or kind == "null_val":
        return None
    content = getattr(value, kind)
    return list(content.val) if kind.endswith("_list_val") else content
