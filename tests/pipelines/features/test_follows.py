"""Follows of the data set in the viewers' memory."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reelway.pipelines.features.follows import restore_follows
from reelway.pipelines.features.training_rows import LABELS_FILE
from reelway.platform.contracts.events import TIMESTAMP_TYPE
from reelway.platform.features.viewer_memory_local import LocalViewerMemory


@pytest.fixture
def features(tmp_path: Path) -> Path:
    rows = [(1, 7, 1.0, 10), (1, 7, 1.0, 11), (1, 8, 1.0, 50), (2, 9, 0.0, 10), (3, -1, 1.0, 10), (1, 5, 1.0, 12)]
    viewer, creator, follow, time_s = zip(*rows, strict=True)
    columns = {
        "viewer_id": pa.array(viewer, pa.int64()),
        "creator_id": pa.array(creator, pa.int64()),
        "follow": pa.array(follow, pa.float32()),
        "outcome_time": pa.array([s * 1_000_000 for s in time_s], pa.int64()).cast(TIMESTAMP_TYPE),
    }
    pq.write_table(pa.table(columns), tmp_path / LABELS_FILE)
    return tmp_path


def test_follows_by_the_time_are_restored_once(features: Path) -> None:
    memory = LocalViewerMemory(lambda: 0.0)
    assert restore_follows(memory, features, 20.0) == 2
    assert restore_follows(memory, features, 20.0) == 2
    assert memory.read(1).followed_creators.tolist() == [5, 7]
    assert memory.read(2).followed_creators.tolist() == []
    assert restore_follows(memory, features, 50.0) == 3
    assert memory.read(1).followed_creators.tolist() == [5, 7, 8]


def test_run_without_labels_has_no_follows(tmp_path: Path) -> None:
    assert restore_follows(LocalViewerMemory(lambda: 0.0), tmp_path, 20.0) == 0
