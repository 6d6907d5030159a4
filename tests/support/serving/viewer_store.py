"""A feature store with a few viewers, written by the platform's own code."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from feast import FeatureStore
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.type_map import python_values_to_proto_values
from tests.support.dimensions import DIMENSIONS

from reelway.pipelines.features.registry import register_features
from reelway.platform.contracts.feature_names import VIEWER_VIEWS, VIEWS
from reelway.platform.features.feast_store import CONFIG_FILE, open_feature_store


def make_viewer_store(features_dir: Path, viewers: Mapping[int, Mapping[str, Any]], at_s: float) -> None:
    """Registers all views and writes the viewers' rows (field name -> value) to the online store as of ``at_s``."""
    store = make_store(features_dir)
    for name in VIEWER_VIEWS:
        write_rows(store, name, "viewer_id", viewers, at_s)


def make_store(features_dir: Path, online_store: str | None = None) -> FeatureStore:
    """Registers all views. An existing feature store of the folder is opened unless ``online_store`` is given."""
    if online_store is None and (features_dir / CONFIG_FILE).exists():
        return open_feature_store(features_dir)
    return register_features(features_dir, DIMENSIONS, online_store)


def write_rows(store: FeatureStore, name: str, key: str, rows: Mapping[int, Mapping[str, Any]], at_s: float) -> None:
    """Writes a view's values of each entity (id -> field name -> value) to the online store as of ``at_s``."""
    at = datetime.fromtimestamp(at_s, UTC)
    view = store.get_feature_view(name)
    types = {field.name: field.dtype.to_value_type() for field in view.features}
    batch = []
    for entity, row in rows.items():
        values = {
            field: python_values_to_proto_values([row[field]], types[field])[0]
            for field in VIEWS[name]
            if row.get(field) is not None
        }
        batch.append((EntityKey(join_keys=[key], entity_values=[Value(int64_val=entity)]), values, at, at))
    store._get_provider().online_write_batch(store.config, view, batch, None)
