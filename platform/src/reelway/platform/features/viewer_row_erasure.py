"""Deletes viewers' rows from a Feast online store: one entity at a time, which Feast itself does not offer."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from reelway.platform.errors import FeatureError
from reelway.platform.features.viewer_rows import entity_key

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

VIEWER_KEY: Final = "viewer_id"
_REDIS_TIME_FIELD: Final = b"_ts:"
"""Prefix of a hash's field that holds the time of one view's row."""


def erase_viewer_rows(store: FeatureStore, viewer_ids: Sequence[int], *, dry_run: bool = False) -> int:
    """Deletes all rows of the viewers, one per viewer and view. Returns the number of rows found.

    Args:
        dry_run: only counts.

    Raises:
        FeatureError: if the store cannot be read or written, or is neither SQLite nor Redis.
    """
    from feast.infra.online_stores.redis import RedisOnlineStore
    from feast.infra.online_stores.sqlite import SqliteOnlineStore

    online = store._get_provider().online_store
    if isinstance(online, RedisOnlineStore):
        erase = _erase_in_redis
    elif type(online) is SqliteOnlineStore:
        erase = _erase_in_sqlite
    else:
        raise FeatureError(f"online store {type(online).__name__}: cannot erase viewers; expected SQLite or Redis")
    try:
        return erase(store, online, viewer_ids, dry_run)
    except Exception as error:  # Feast does not wrap the errors of its online store's client
        raise FeatureError(f"online store: cannot erase viewers: {type(error).__name__}: {error}") from error


def viewer_views(store: FeatureStore) -> list[FeatureView]:
    """Returns the registered views whose entity is the viewer."""
    return [view for view in store.list_feature_views() if view.join_keys == [VIEWER_KEY]]


def delete_old_viewer_rows(store: FeatureStore, older_than: datetime) -> int:
    """Deletes rows of viewers that are older than a time from an online store in SQLite. Returns their number.

    Redis lets rows expire itself (``key_ttl_seconds``).

    Raises:
        FeatureError: if the store cannot be written.
    """
    from feast.infra.online_stores.sqlite import SqliteOnlineStore

    online = store._get_provider().online_store
    if type(online) is not SqliteOnlineStore:
        return 0
    connection, deleted = online._get_conn(store.config), 0
    try:
        with connection:
            for table in _sqlite_tables(store):
                limit = (older_than.astimezone(UTC).replace(tzinfo=None),)  # adapted by Feast, as the stored times are
                (found,) = connection.execute(
                    f'SELECT count(DISTINCT entity_key) FROM "{table}" WHERE event_ts < ?', limit
                ).fetchone()
                connection.execute(f'DELETE FROM "{table}" WHERE event_ts < ?', limit)
                deleted += found
    except sqlite3.Error as error:
        raise FeatureError(f"online store: cannot delete old rows: {error}") from error
    return deleted


def _sqlite_tables(store: FeatureStore) -> list[str]:
    from feast.infra.online_stores.sqlite import _table_id

    versioning = store.config.registry.enable_online_feature_view_versioning
    return [_table_id(store.config.project, view, versioning) for view in viewer_views(store)]


def _erase_in_redis(store: FeatureStore, online: Any, viewer_ids: Sequence[int], dry_run: bool) -> int:
    client = online._get_client(store.config.online_store)
    keys = online._generate_redis_keys_for_entities(store.config, [entity_key(viewer) for viewer in viewer_ids])
    with client.pipeline(transaction=True) as pipe:
        for key in keys:
            pipe.hkeys(key)
        if not dry_run:
            pipe.delete(*keys)
        fields = pipe.execute()[: len(keys)]
    return sum(name.startswith(_REDIS_TIME_FIELD) for names in fields for name in names)


def _erase_in_sqlite(store: FeatureStore, online: Any, viewer_ids: Sequence[int], dry_run: bool) -> int:
    from feast.infra.key_encoding_utils import serialize_entity_key

    config = store.config
    connection = online._get_conn(config)
    keys = [
        serialize_entity_key(
            entity_key(viewer), entity_key_serialization_version=config.entity_key_serialization_version
        )
        for viewer in viewer_ids
    ]
    found = 0
    connection.execute("PRAGMA secure_delete = ON")
    with connection:
        for table in _sqlite_tables(store):
            for key in keys:
                known = connection.execute(f'SELECT 1 FROM "{table}" WHERE entity_key = ? LIMIT 1', (key,)).fetchone()
                found += known is not None
                if known and not dry_run:
                    connection.execute(f'DELETE FROM "{table}" WHERE entity_key = ?', (key,))
    return found
