"""Erasure from the online store: SQLite and a real Redis lose all rows and the memory of one viewer."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from feast import FeatureStore
from tests.support.serving.viewer_store import make_store, write_rows

from reelway.platform.contracts.feature_names import VIEWER_VIEWS
from reelway.platform.erasure.platform_stores import erase_platform_stores
from reelway.platform.erasure.request import ErasureRequest
from reelway.platform.features.viewer_memory import open_viewer_memory
from reelway.platform.features.viewer_rows import ViewerRowReader
from reelway.platform.run_directory import RunDirectory

pytestmark = pytest.mark.slow

ERASED, KEPT = 7_777_777_777_777_777, 42
NOW_S = 1_750_000_000.0


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.redis)])
def online(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[RunDirectory, FeatureStore]:
    run = RunDirectory(tmp_path / "run")
    address = f"redis://{request.getfixturevalue('redis_server')}/5" if request.param == "redis" else "sqlite"
    store = make_store(run.features, address)
    for view in VIEWER_VIEWS:
        row = {"region": "eu", "history_videos": [4, 5], "impressions_1d": 2.0}
        write_rows(store, view, "viewer_id", {ERASED: row, KEPT: row}, NOW_S)
    memory = open_viewer_memory(store)
    for viewer in (ERASED, KEPT):
        memory.remember_shown(viewer, [1, 2], time.time())
        memory.remember_watched(np.array([viewer]), np.array([3]), np.array([NOW_S]))
        memory.block(viewer, creators=[4])
        memory.follow(viewer, [5])
    return run, store


def erase(run: RunDirectory, *, dry_run: bool = False) -> dict[str, tuple[int, int]]:
    done = erase_platform_stores(ErasureRequest(run, (ERASED,), dry_run))
    return {one.store: (one.found, one.removed) for one in done if one.store in ("online store", "viewer memory")}


def test_row_and_memory_of_one_viewer_are_deleted(online: tuple[RunDirectory, FeatureStore]) -> None:
    run, store = online
    reader, memory = ViewerRowReader(store), open_viewer_memory(store)
    kept_row, kept_memory = reader.read(KEPT), memory.count_entries(KEPT)
    assert kept_memory >= 3
    looked = erase(run, dry_run=True)
    assert looked["online store"][1] == looked["viewer memory"][1] == 0
    assert reader.read(ERASED)["region"] == "eu"
    done = erase(run)
    assert done["online store"][0] == done["online store"][1] == looked["online store"][0] >= 3
    assert done["viewer memory"] == (kept_memory, kept_memory)
    assert set(reader.read(ERASED).values()) == {None}
    assert memory.count_entries(ERASED) == 0
    assert len(memory.read(ERASED).followed_creators) == 0
    assert (reader.read(KEPT), memory.count_entries(KEPT)) == (kept_row, kept_memory)
    assert erase(run) == {"online store": (0, 0), "viewer memory": (0, 0)}


def test_sqlite_files_hold_no_key_of_the_viewer(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    store = make_store(run.features, "sqlite")
    for view in VIEWER_VIEWS:
        write_rows(store, view, "viewer_id", {ERASED: {"region": "eu"}, KEPT: {"region": "eu"}}, NOW_S)
    key = ERASED.to_bytes(8, "little")
    assert key in (run.features / "online.db").read_bytes()
    erase(run)
    assert not [path for path in run.features.rglob("*") if path.is_file() and key in path.read_bytes()]
