import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.support.dimensions import DIMENSIONS
from tests.support.pipelines.event_tables import random_dataset

from reelway.pipelines.datasets.store import read_dataset, write_dataset
from reelway.platform.contracts.events import DATASET_TABLES
from reelway.platform.errors import MalformedFileError, StorageError


@pytest.fixture(scope="module")
def tables() -> dict[str, pa.Table]:
    return random_dataset(requests=40)


def shuffled(table: pa.Table) -> pa.Table:
    return table.take(pa.array(range(table.num_rows - 1, -1, -1)))


def test_written_data_set_is_read_back_sorted(tmp_path: Path, tables: dict[str, pa.Table]) -> None:
    write_dataset(
        tmp_path / "d", {name: shuffled(table) for name, table in tables.items()}, {"name": "x", "seed": 3}, DIMENSIONS
    )
    dataset = read_dataset(tmp_path / "d")
    for name, schema in DATASET_TABLES.items():
        assert dataset.tables[name].schema.equals(schema)
        assert dataset.tables[name].num_rows == tables[name].num_rows
    keys = list(zip(dataset.impressions["event_time"].to_pylist(), dataset.impressions["impression_id"].to_pylist(),
                    strict=True))  # fmt: skip
    assert keys == sorted(keys)
    assert dataset.videos["video_id"].to_pylist() == sorted(tables["videos"]["video_id"].to_pylist())
    assert dataset.info["seed"] == 3
    assert dataset.dimensions == DIMENSIONS
    assert dataset.info["rows"]["impressions"] == tables["impressions"].num_rows
    assert dataset.info["first_time"] == min(tables["impressions"]["event_time"].to_pylist()).isoformat()


def test_missing_column_is_named(tmp_path: Path, tables: dict[str, pa.Table]) -> None:
    broken = {**tables, "videos": tables["videos"].drop_columns(["duration_ms"])}
    with pytest.raises(MalformedFileError, match="'duration_ms'"):
        write_dataset(tmp_path / "d", broken, {}, DIMENSIONS)
    assert not (tmp_path / "d").exists()


def test_missing_table_is_rejected(tmp_path: Path, tables: dict[str, pa.Table]) -> None:
    with pytest.raises(MalformedFileError, match="creators"):
        write_dataset(tmp_path / "d", {k: v for k, v in tables.items() if k != "creators"}, {}, DIMENSIONS)


def test_null_in_a_required_column_is_rejected_with_its_row(tmp_path: Path, tables: dict[str, pa.Table]) -> None:
    ids = tables["viewers"]["viewer_id"].to_pylist()
    ids[2] = None
    broken = tables["viewers"].set_column(0, "viewer_id", pa.array(ids, pa.int64()))
    with pytest.raises(MalformedFileError, match="row 2, column 'viewer_id'"):
        write_dataset(tmp_path / "d", {**tables, "viewers": broken}, {}, DIMENSIONS)


def test_file_of_another_type_is_rejected(tmp_path: Path, tables: dict[str, pa.Table]) -> None:
    write_dataset(tmp_path / "d", tables, {}, DIMENSIONS)
    pq.write_table(
        tables["creators"].set_column(0, "creator_id", pa.array(["a"] * tables["creators"].num_rows)),
        tmp_path / "d" / "creators.parquet",
    )
    with pytest.raises(MalformedFileError, match=r"creators\.parquet.*'creator_id'"):
        read_dataset(tmp_path / "d")


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_damaged_file_is_named(tmp_path: Path, tables: dict[str, pa.Table], damage: str) -> None:
    write_dataset(tmp_path / "d", tables, {}, DIMENSIONS)
    file = tmp_path / "d" / "outcomes.parquet"
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:100])
    else:
        file.unlink()
    with pytest.raises(MalformedFileError, match=r"outcomes\.parquet"):
        read_dataset(tmp_path / "d")


def test_info_must_be_a_json_object(tmp_path: Path, tables: dict[str, pa.Table]) -> None:
    write_dataset(tmp_path / "d", tables, {}, DIMENSIONS)
    (tmp_path / "d" / "dataset.json").write_text(json.dumps([1]))
    with pytest.raises(MalformedFileError, match="JSON object"):
        read_dataset(tmp_path / "d")


def test_unwritable_folder_is_a_storage_error(tmp_path: Path, tables: dict[str, pa.Table]) -> None:
    (tmp_path / "blocked").write_text("a file, not a folder")
    with pytest.raises(StorageError, match="blocked"):
        write_dataset(tmp_path / "blocked" / "d", tables, {}, DIMENSIONS)


def test_write_replaces_the_whole_folder(tmp_path: Path, tables: dict[str, pa.Table]) -> None:
    write_dataset(tmp_path / "d", tables, {"name": "first"}, DIMENSIONS, extras={"rejected": pa.table({"a": [1]})})
    write_dataset(tmp_path / "d", tables, {"name": "second"}, DIMENSIONS)
    assert read_dataset(tmp_path / "d").info["name"] == "second"
    assert not (tmp_path / "d" / "rejected.parquet").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
