"""The Feast definitions agree with the contract and with the rows the batch job writes."""

from __future__ import annotations

import ast
import os
from dataclasses import replace

import pyarrow as pa
import pytest
from feast.type_map import feast_value_type_to_pa
from tests.support.dimensions import DIMENSIONS

from reelway.pipelines.features.registry import feature_repo_path, load_definitions, register_features
from reelway.platform.contracts.feature_names import (
    REQUEST_CONTEXT,
    TRAINING_SERVICE,
    VIEWER_SERVICE,
    VIEWER_VIEWS,
    VIEWS,
)
from reelway.platform.errors import ConfigError, FeatureError
from reelway.platform.features.dimensions import write_dimensions
from reelway.platform.features.feast_store import feature_service_digest, open_feature_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory):
    return register_features(tmp_path_factory.mktemp("registered") / "features", DIMENSIONS, "sqlite")


def test_all_views_are_registered_with_a_ttl(store) -> None:
    registered = {view.name: view for view in store.list_feature_views()}
    assert set(registered) == set(VIEWS)
    for name, view in registered.items():
        assert tuple(field.name for field in view.features) == VIEWS[name]
        assert view.ttl is not None
        assert view.ttl.total_seconds() > 0
        assert view.batch_source.created_timestamp_column == "created_timestamp"
        assert view.online == (name in VIEWER_VIEWS)


def test_services_hold_the_views_of_the_contract(store) -> None:
    viewer = store.get_feature_service(VIEWER_SERVICE)
    assert tuple(view.name for view in viewer.feature_view_projections) == VIEWER_VIEWS
    training = {view.name: view for view in store.get_feature_service(TRAINING_SERVICE).feature_view_projections}
    assert set(training) == {*VIEWS, "request_context"}
    assert tuple(field.name for field in training["request_context"].features) == REQUEST_CONTEXT


def test_registered_types_equal_the_types_of_the_rows(store) -> None:
    from tests.support.pipelines.event_tables import random_dataset

    from reelway.pipelines.features import views
    from reelway.pipelines.features.batch import ENTITY_KEYS, data_end_us, entity_views
    from reelway.pipelines.features.labels import label_impressions

    tables = random_dataset(requests=40)
    labels = label_impressions(tables["impressions"], tables["outcomes"], tables["videos"])
    row_tables = {
        "viewer_profile": views.viewer_profile(tables["viewers"]),
        "video_content": views.video_content(tables["videos"]),
    }
    settings = views.ViewSettings(DIMENSIONS)
    for family in ENTITY_KEYS:
        row_tables |= entity_views(
            family, labels, (tables["creators"], tables["videos"]), settings, data_end_us(labels)
        )
    for view in store.list_feature_views():
        for field in view.features:
            declared = feast_value_type_to_pa(field.dtype.to_value_type())
            actual = row_tables[view.name].schema.field(field.name).type
            assert actual == declared or (pa.types.is_list(actual) and actual.value_type == declared.value_type), (
                f"{view.name}.{field.name}: {actual} in the rows, {declared} registered"
            )


def test_digest_does_not_depend_on_the_folder(store, tmp_path) -> None:
    digest = feature_service_digest(store, TRAINING_SERVICE)
    other = register_features(tmp_path / "features", DIMENSIONS, "sqlite")
    assert feature_service_digest(other, TRAINING_SERVICE) == digest
    other = register_features(tmp_path / "features", DIMENSIONS, "sqlite")
    assert feature_service_digest(other, TRAINING_SERVICE) == digest
    assert feature_service_digest(open_feature_store(tmp_path / "features"), TRAINING_SERVICE) == digest
    assert feature_service_digest(other, VIEWER_SERVICE) != digest


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"viewer_history": timedelta(days=90)', '"viewer_history": timedelta(days=91)'),
        ('"created_at_s": Float64', '"created_at_s": Int64'),
        ("features=[viewer_profile, viewer_activity,", "features=[viewer_activity,"),
        ('join_keys=["viewer_id"]', 'join_keys=["viewer"]'),
    ],
)
def test_digest_changes_with_the_definitions(store, tmp_path, monkeypatch, before, after) -> None:
    text = (feature_repo_path() / "definitions.py").read_text()
    assert before in text
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "definitions.py").write_text(text.replace(before, after))
    monkeypatch.setenv("REELWAY_FEATURE_REPO", str(tmp_path / "repo"))
    changed = register_features(tmp_path / "features", DIMENSIONS, "sqlite")
    assert feature_service_digest(changed, VIEWER_SERVICE) != feature_service_digest(store, VIEWER_SERVICE)


def test_unknown_service_error_lists_the_registered_services(store) -> None:
    with pytest.raises(FeatureError, match=r"'viewer_row_v9' is not registered, expected one of \['training_row_v1'"):
        feature_service_digest(store, "viewer_row_v9")


def test_definitions_import_only_contracts_or_features() -> None:
    tree = ast.parse((feature_repo_path() / "definitions.py").read_text())
    imported = {
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("reelway")
        for alias in node.names
    }
    dimensions = "reelway.platform.contracts.feature_dimensions"
    assert imported == {
        "reelway.platform.contracts.feature_names",
        f"{dimensions}.SCHEMA_FILE",
        f"{dimensions}.FeatureDimensions",
        "reelway.platform.features.on_demand",
    }


def test_digest_changes_with_the_width_of_a_list(store, tmp_path) -> None:
    wide = register_features(tmp_path / "features", replace(DIMENSIONS, text=512), "sqlite")
    assert feature_service_digest(wide, TRAINING_SERVICE) != feature_service_digest(store, TRAINING_SERVICE)
    assert feature_service_digest(wide, VIEWER_SERVICE) == feature_service_digest(store, VIEWER_SERVICE)


def test_loading_preserves_the_environment(tmp_path) -> None:
    write_dimensions(tmp_path, DIMENSIONS)
    before = dict(os.environ)
    load_definitions(tmp_path)
    assert dict(os.environ) == before


def test_missing_definitions_error_names_the_variable(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("REELWAY_FEATURE_REPO", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="set REELWAY_FEATURE_REPO"):
        feature_repo_path()
