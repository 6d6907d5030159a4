"""A real feature store with a few viewers in it, made through the very code that the platform uses."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.type_map import python_values_to_proto_values

from reelway.pipelines.features.registry import register_features
from reelway.platform.contracts.features import VIEWER_VIEWS, VIEWS


def make_viewer_store(features_dir: Path, viewers: Mapping[int, Mapping[str, Any]], at_s: float) -> None:
    """Register all views and write the viewers' rows (field name -> value) to the online store as of ``at_s``."""
    store = register_features(features_dir)
    at = datetime.fromtimestamp(at_s, UTC)
    for name in VIEWER_VIEWS:
        view = store.get_feature_view(name)
        types = {field.name: field.dtype.to_value_type() for field in view.features}
        rows = []
        for viewer, row in viewers.items():
            values = {
                field: python_values_to_proto_values([row[field]], types[field])[0]
                for field in VIEWS[name]
                if row.get(field) is not None
            }
            key = EntityKey(join_keys=["viewer_id"], entity_values=[Value(int64_val=viewer)])
            rows.append((key, values, at, at))
        store._get_provider().online_write_batch(store.config, view, rows, None)
