"""How the rest of Reelway opens a run's feature store and reads one viewer's row from it.

Feast's exceptions, protos and provider stay in here. It refuses to call a store that cannot be reached an unknown
viewer: missing values are ``None``, a store that fails is a ``FeatureError``. Feast is imported inside functions,
because it takes a second that a command without features should not pay.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml

from reelway.platform.contracts.features import VIEWER_SERVICE
from reelway.platform.durable import whole_file
from reelway.platform.errors import ConfigError, FeatureError

if TYPE_CHECKING:
    from feast import FeatureStore

AS_OF: Final = "as_of_s"
"""Of a viewer's row: not a feature, but when its features are from."""

PROJECT: Final = "reelway"
CONFIG_FILE: Final = "feature_store.yaml"
ONLINE_STORE_VARIABLE: Final = "REELWAY_ONLINE_STORE"
"""``sqlite`` (default) or ``redis[s]://host:port[/db]``, read when a run's ``feature_store.yaml`` is written."""
PASSWORD_VARIABLE: Final = "REDIS_PASSWORD"
"""Of the online store. Feast fills it in when it opens the store: no file has the password itself."""


def online_store_config(address: str) -> dict[str, Any]:
    """Feast's ``online_store`` section for ``sqlite``, or a ``redis://`` or (with TLS) ``rediss://`` address.

    Raises:
        ConfigError: another scheme.
    """
    if address == "sqlite":
        return {"type": "sqlite", "path": "online.db"}
    scheme, _, place = address.partition("://")
    if scheme in ("redis", "rediss") and (place := place.rstrip("/")):
        host, _, database = place.partition("/")
        # A viewer's row is worth half a second at most: the next rung of the ladder answers without it. redis-py's own
        # three retries with growing pauses would hold a request for eight seconds.
        connection = f"{host},db={database or 0},socket_timeout=0.5,socket_connect_timeout=0.5,retry=null"
        connection += ",ssl=true" * (scheme == "rediss")
        connection += f",password=${{{PASSWORD_VARIABLE}}}" * (PASSWORD_VARIABLE in os.environ)
        # skip_dedup: a materialisation writes whole rows as of one time, so the last one written is right; with
        # Feast's check a corrected row of the same time would be dropped.
        return {"type": "redis", "connection_string": connection, "skip_dedup": True}
    raise ConfigError(
        f"online store {address!r}: expected 'sqlite', 'redis://host:port' or 'rediss://host:port'; set "
        f"{ONLINE_STORE_VARIABLE}"
    )


def write_store_config(features_dir: Path, online_store: str | None = None) -> Path:
    """Write ``feature_store.yaml`` for a run. Relative paths in it mean ``features_dir``.

    Args:
        online_store: see ``online_store_config``; by default the environment's ``REELWAY_ONLINE_STORE``.
    """
    address = online_store or os.environ.get(ONLINE_STORE_VARIABLE, "sqlite")
    config = {
        "project": PROJECT,
        "provider": "local",
        "registry": "registry.db",
        "entity_key_serialization_version": 3,
        "offline_store": {"type": "duckdb"},
        "online_store": online_store_config(address),
    }
    path = features_dir / CONFIG_FILE
    with whole_file(path) as aside:
        aside.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def import_feast() -> None:
    """Import Feast without letting it decide how this process keeps its metrics.

    On import Feast sets ``PROMETHEUS_MULTIPROC_DIR``, which turns every metric made later, here and in every child
    process, into a file in a temporary folder that nobody scrapes.
    """
    import prometheus_client  # noqa: F401  (settles how values are kept, before Feast can)

    variables = ("PROMETHEUS_MULTIPROCESS_DIR", "PROMETHEUS_MULTIPROC_DIR")
    before = {name: os.environ.get(name) for name in variables}
    import feast
    import feast.metrics  # noqa: F401

    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)


def open_feature_store(features_dir: Path) -> FeatureStore:
    """The Feast store of a run.

    Raises:
        FeatureError: the run has no feature store, or its configuration is not one.
    """
    if not (features_dir / CONFIG_FILE).exists():
        raise FeatureError(f"{features_dir}: no {CONFIG_FILE} here; run `reelway features --run {features_dir.parent}`")
    import_feast()
    from feast import FeatureStore
    from feast.errors import FeastError

    try:
        return FeatureStore(repo_path=str(features_dir))
    except (FeastError, OSError, ValueError) as error:
        raise FeatureError(f"{features_dir / CONFIG_FILE}: cannot open the feature store: {error}") from error


def _service(store: FeatureStore, name: str) -> Any:
    from feast.errors import FeatureServiceNotFoundException

    try:
        return store.get_feature_service(name)
    except FeatureServiceNotFoundException as error:
        known = sorted(service.name for service in store.list_feature_services())
        raise FeatureError(
            f"feature service {name!r} is not registered, expected one of {known}; run `reelway features`"
        ) from error


def feature_service_digest(store: FeatureStore, name: str) -> str:
    """SHA-256 hex over the service's views, join keys, fields, types and TTLs as registered; not over any path.

    Raises:
        FeatureError: the store does not have the service.
    """
    on_demand = {view.name for view in store.list_on_demand_feature_views()}
    views = []
    for projection in _service(store, name).feature_view_projections:
        view = None if projection.name in on_demand else store.get_feature_view(projection.name)
        views.append(
            {
                "view": projection.name,
                "keys": [[column.name, str(column.dtype)] for column in view.entity_columns] if view else None,
                "fields": sorted([field.name, str(field.dtype)] for field in projection.features),
                "ttl_s": view.ttl.total_seconds() if view and view.ttl else None,
            }
        )
    canonical = json.dumps({"service": name, "views": views}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


class ViewerRows:
    """Reads one viewer's row: the fields of a service's views, ``None`` where the store has nothing.

    ``get_online_features`` spends most of its time on request checks and a response table made for many rows; for one
    known entity this asks the same online store through the provider and decodes the values. Threads may share it.
    """

    def __init__(self, store: FeatureStore, service: str = VIEWER_SERVICE) -> None:
        """Look the views up once.

        Raises:
            FeatureError: the store does not have the service.
        """
        self._store = store
        self._views = [
            (store.get_feature_view(projection.name), [field.name for field in projection.features])
            for projection in _service(store, service).feature_view_projections
        ]
        self._empty = {name: None for _, fields in self._views for name in fields}
        self._lock = threading.Lock()  # Feast's SQLite store shares one connection between threads

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
        provider = self._store._get_provider()
        try:
            with self._lock:
                answers = [
                    provider.online_read(self._store.config, view, [key], list(fields))[0]
                    for view, fields in self._views
                ]
        except Exception as error:  # Feast passes on whatever its online store's client raises
            raise FeatureError(
                f"online store: cannot read viewer {viewer_id}: {type(error).__name__}: {error}"
            ) from error
        as_of_s: dict[str, float] = {}
        for (view, fields), (moment, values) in zip(self._views, answers, strict=True):
            if not values:
                continue
            if moment is not None:
                as_of_s[view.name] = _seconds(moment)
            for name in fields:
                if (value := values.get(name)) is not None:
                    row[name] = _decoded(value)
        if as_of_s:
            row[AS_OF] = as_of_s
        return row


def _seconds(moment: datetime) -> float:
    """Feast's SQLite store gives moments without a zone, which are UTC."""
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _decoded(value: Any) -> Any:
    kind = value.WhichOneof("val")
    if kind is None or kind == "null_val":
        return None
    content = getattr(value, kind)
    return list(content.val) if kind.endswith("_list_val") else content
