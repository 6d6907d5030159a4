"""Training rows in memory equal the assembly row by row; malformed files are errors."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tests.support.dimensions import DIMENSIONS
from tests.support.pipelines.training_row_fixtures import made_table, write_rows

from reelway.pipelines.training import rows as rows_module
from reelway.pipelines.training.rows import TrainingRows, load_rows, map_arrays, save_arrays
from reelway.platform.contracts.feature_names import RANKER_TASKS
from reelway.platform.errors import EmptyDatasetError, FeatureError, MalformedFileError
from reelway.platform.features.assembly import assemble_videos, assemble_viewers, columns_from_table


@pytest.fixture(scope="module")
def table() -> pa.Table:
    return made_table(requests=120)


@pytest.fixture(scope="module")
def rows(table: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> TrainingRows:
    return load_rows(write_rows(tmp_path_factory.mktemp("rows") / "training_rows.parquet", table), DIMENSIONS)


def test_rows_have_the_inputs_of_the_assembly(table: pa.Table, rows: TrainingRows) -> None:
    by_id = np.argsort(rows.impression_id)  # order of the table
    columns, time_s = columns_from_table(table), table["request_time_s"].to_numpy()
    viewers = assemble_viewers(columns, time_s, table["device"].to_pylist(), DIMENSIONS)
    for field in dataclasses.fields(viewers):
        actual = getattr(rows.viewers, field.name)[rows.viewer_row[by_id]]
        np.testing.assert_array_equal(actual, getattr(viewers, field.name), err_msg=field.name)
    videos = assemble_videos(columns, time_s, DIMENSIONS)
    np.testing.assert_array_equal(rows.video_dense[by_id], videos.video_dense)
    for name in ("video_codes", "creator_codes", "video_categories", "visual", "audio", "text"):
        actual = getattr(rows.videos, name)[rows.video_row[by_id]]
        np.testing.assert_array_equal(actual, getattr(videos, name), err_msg=name)
    for k, task in enumerate(RANKER_TASKS):
        np.testing.assert_array_equal(rows.labels[by_id, k], table[task].to_numpy())


def test_rows_of_one_request_share_one_viewer_row(rows: TrainingRows) -> None:
    assert len(rows) == 480
    assert len(rows.viewers.viewer_dense) == 120
    assert len(np.unique(np.column_stack([rows.viewer_row, rows.request_id]), axis=0)) == 120


def test_rows_with_different_inputs_share_no_viewer_row(table: pa.Table, tmp_path: Path) -> None:
    ages = table["impressions_1d"].to_numpy().copy()
    ages[5] += 1e-3
    changed = table.set_column(table.schema.get_field_index("impressions_1d"), "impressions_1d", pa.array(ages))
    rows = load_rows(write_rows(tmp_path / "r.parquet", changed), DIMENSIONS)
    assert len(rows.viewers.viewer_dense) > 120


def test_chunk_size_changes_no_row(
    table: pa.Table, rows: TrainingRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows_module, "_CHUNK_ROWS", 37)
    chunked = load_rows(write_rows(tmp_path / "r.parquet", table), DIMENSIONS)
    np.testing.assert_array_equal(chunked.impression_id, rows.impression_id)
    np.testing.assert_array_equal(chunked.video_dense, rows.video_dense)
    np.testing.assert_array_equal(
        chunked.viewers.history_codes[chunked.viewer_row], rows.viewers.history_codes[rows.viewer_row]
    )
    np.testing.assert_array_equal(chunked.videos.text, rows.videos.text)


def test_rows_ascend_in_time_across_a_cut(rows: TrainingRows) -> None:
    assert (np.diff(rows.event_time_s) >= 0).all()
    cut_s = rows.cut_time_s(0.8)
    before, after = rows.between(-np.inf, cut_s), rows.between(cut_s, np.inf)
    assert len(before) + len(after) == len(rows)
    assert rows.event_time_s[before].max() < cut_s == rows.event_time_s[after].min()
    assert abs(len(before) - 0.8 * len(rows)) <= 4  # a request is never split
    assert rows.cut_time_s(1.0) == np.inf


def test_rows_without_features_have_missing_values(rows: TrainingRows) -> None:
    new = rows.viewer_id == 0
    assert new.any()
    assert (rows.viewers.history_codes[rows.viewer_row[new]] == 0).all()
    assert np.isnan(rows.viewers.viewer_dense[rows.viewer_row[new], 0]).all()
    bare = np.flatnonzero(rows.video_ids == 1)[0]
    assert rows.videos.video_categories[bare, 0] == 0
    assert (rows.videos.visual[bare] == 0).all()
    assert np.isnan(rows.videos.video_static_dense[bare, 0])


def test_shorter_history_keeps_the_latest_videos(table: pa.Table, rows: TrainingRows, tmp_path: Path) -> None:
    short = load_rows(write_rows(tmp_path / "r.parquet", table), replace(DIMENSIONS, history_length=3))
    np.testing.assert_array_equal(short.viewers.history_codes, rows.viewers.history_codes[:, -3:])


def test_mapped_arrays_equal_the_saved_arrays(rows: TrainingRows, tmp_path: Path) -> None:
    save_arrays(rows, tmp_path)
    mapped = map_arrays(tmp_path)
    np.testing.assert_array_equal(mapped.labels, rows.labels)
    np.testing.assert_array_equal(mapped.viewers.history_age_h, rows.viewers.history_age_h)
    np.testing.assert_array_equal(mapped.videos.visual, rows.videos.visual)
    assert isinstance(mapped.video_dense, np.memmap)
    assert not list(tmp_path.glob("*.pkl"))


def test_file_without_rows_is_an_empty_data_set(table: pa.Table, tmp_path: Path) -> None:
    with pytest.raises(EmptyDatasetError, match="0 training rows"):
        load_rows(write_rows(tmp_path / "r.parquet", table.slice(0, 0)), DIMENSIONS)


def test_missing_file_or_column_is_named(table: pa.Table, tmp_path: Path) -> None:
    with pytest.raises(MalformedFileError, match="reelway features"):
        load_rows(tmp_path / "absent.parquet", DIMENSIONS)
    with pytest.raises(MalformedFileError, match="'save'"):
        load_rows(write_rows(tmp_path / "r.parquet", table.drop_columns(["save"])), DIMENSIONS)


def test_null_label_is_rejected_with_its_column(table: pa.Table, tmp_path: Path) -> None:
    label = pa.array([None, *table["like"].to_pylist()[1:]], pa.float32())
    changed = table.set_column(table.schema.get_field_index("like"), "like", label)
    with pytest.raises(MalformedFileError, match="column 'like': saw '1 without'"):
        load_rows(write_rows(tmp_path / "r.parquet", changed), DIMENSIONS)


@pytest.mark.parametrize(("column", "value"), [("position", 40_000), ("position", -40_000)])
def test_integer_above_its_type_is_rejected_with_its_column(
    table: pa.Table, tmp_path: Path, column: str, value: int
) -> None:
    values = pa.array([value, *table[column].to_pylist()[1:]], pa.int64())
    changed = table.set_column(table.schema.get_field_index(column), column, values)
    with pytest.raises(MalformedFileError, match=rf"'{column}': saw {value}, expected an integer in -32768..32767"):
        load_rows(write_rows(tmp_path / "r.parquet", changed), DIMENSIONS)


@pytest.mark.parametrize(
    ("column", "value", "limit"), [("topic", 32, 31), ("video_id", 2**53, 2**53 - 1), ("creator_id", 2**60, 2**53 - 1)]
)
def test_id_above_its_limit_is_rejected_with_its_column(
    table: pa.Table, tmp_path: Path, column: str, value: int, limit: int
) -> None:
    values = pa.array([value, *table[column].to_pylist()[1:]], pa.int64())
    changed = table.set_column(table.schema.get_field_index(column), column, values)
    with pytest.raises(FeatureError, match=rf"feature '{column}': value {value} is above the limit {limit}"):
        load_rows(write_rows(tmp_path / "r.parquet", changed), DIMENSIONS)
