"""Erasure from Parquet files: every table that names a viewer, a batch at a time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.support.dimensions import DIMENSIONS
from tests.support.pipelines.event_tables import random_dataset

from reelway.pipelines.datasets.checks import REJECTED
from reelway.pipelines.datasets.id_mapping import ID_MAP
from reelway.pipelines.datasets.store import read_dataset, write_dataset
from reelway.pipelines.erasure import tables
from reelway.pipelines.erasure.tables import erase_from_file, erase_tables
from reelway.platform.erasure.request import ErasureRequest
from reelway.platform.errors import MalformedFileError
from reelway.platform.run_directory import RunDirectory

ERASED = 507


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    id_map = pa.table({"kind": ["viewer_id", "video_id"], "original": ["ann", "film"], "id": [ERASED, ERASED]}, ID_MAP)
    rows = [json.dumps({"viewer_id": viewer, "impression_id": 1}) for viewer in (ERASED, 508)]
    rejected = pa.table(
        {"table": ["impressions"] * 2, "row_id": [1, 2], "reason": ["future"] * 2, "row": rows}, REJECTED
    )
    extras = {"id_map": id_map, "rejected": rejected}
    write_dataset(run.dataset, random_dataset(), {"name": "test"}, DIMENSIONS, extras=extras)
    return run


def test_dataset_stays_readable_with_its_new_counts(run: RunDirectory) -> None:
    before = read_dataset(run.dataset)
    list(erase_tables(ErasureRequest(run, (ERASED,))))
    after = read_dataset(run.dataset)
    for name, table in before.tables.items():
        if "viewer_id" in table.column_names:
            others = table.filter(pa.array(table["viewer_id"].to_numpy() != ERASED))
            assert 0 < others.num_rows < table.num_rows
            assert after.tables[name].equals(others), name
        else:
            assert after.tables[name].equals(table), name
    assert after.info["rows"] == {name: table.num_rows for name, table in after.tables.items()}


def test_tables_without_a_viewer_column_lose_the_viewer(run: RunDirectory) -> None:
    list(erase_tables(ErasureRequest(run, (ERASED,))))
    assert pq.read_table(run.dataset / "id_map.parquet").to_pylist() == [
        {"kind": "video_id", "original": "film", "id": ERASED}
    ]
    assert pq.read_table(run.dataset / "rejected.parquet")["row_id"].to_pylist() == [2]


def test_file_without_the_viewer_is_not_written(run: RunDirectory) -> None:
    before = {path: path.stat().st_ino for path in run.dataset.iterdir()}
    list(erase_tables(ErasureRequest(run, (999_999,))))
    assert {path: path.stat().st_ino for path in run.dataset.iterdir()} == before


def test_rows_are_filtered_batch_by_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BATCH_ROWS", 100)
    path, viewer = tmp_path / "rows.parquet", np.random.default_rng(0).integers(0, 5, 1_000)
    dictionary = pa.array([f"v{one}" for one in viewer]).dictionary_encode()
    pq.write_table(pa.table({"viewer_id": viewer, "name": dictionary, "list": [[1, 2]] * 1_000}), path)
    expected = pq.read_table(path).filter(pa.array(viewer != 3))
    assert erase_from_file(path, np.array([3])) == int((viewer == 3).sum())
    assert pq.read_table(path).equals(expected)


def test_labels_keep_anonymous_counts_of_videos(run: RunDirectory) -> None:
    """Each impression of the viewer gets another id, so that nothing connects them."""
    labels = run.features / "labels.parquet"
    run.features.mkdir()
    pq.write_table(read_dataset(run.dataset).impressions, labels)
    before = pq.read_table(labels).to_pandas()
    list(erase_tables(ErasureRequest(run, (ERASED,))))
    after = pq.read_table(labels).to_pandas()
    assert after["video_id"].equals(before["video_id"])
    gone = before["viewer_id"] == ERASED
    assert gone.sum() > 5
    assert (after["viewer_id"][gone] < 0).all()
    assert after["viewer_id"][gone].is_unique
    assert after["request_id"][gone].is_unique
    assert after[~gone].equals(before[~gone])


def test_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(MalformedFileError, match=r"rows\.parquet"):
        erase_from_file(tmp_path / "rows.parquet", np.array([3]))
