"""The online store holds the rows of the offline join, in SQLite and in a real Redis."""

from __future__ import annotations

import shutil
import socket
import time

import numpy as np
import pyarrow.compute as pc
import pytest
import redis
from feast import FeatureStore
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from tests.support.dimensions import DIMENSIONS

from reelway.pipelines.features.materialisation import materialise, materialised_at_s
from reelway.pipelines.features.parity.comparison import same_value
from reelway.pipelines.features.registry import register_features
from reelway.pipelines.features.training_rows import viewer_snapshot
from reelway.platform.contracts.feature_names import VIEWER_SERVICE, VIEWER_VIEWS, VIEWS
from reelway.platform.errors import DataError, FeatureError
from reelway.platform.features.feast_store import open_feature_store
from reelway.platform.features.viewer_memory import MEMORY_FILE, open_viewer_memory
from reelway.platform.features.viewer_rows import AS_OF, ViewerRowReader, Views, _decode_value, _PerViewReader
from reelway.platform.features.watched_filter import is_watched
from reelway.platform.run_directory import RunDirectory
from reelway.platform.viewer_pseudonyms import viewer_pseudonym

FIELDS = [name for view in VIEWER_VIEWS for name in VIEWS[view]]


def viewer_views(store: FeatureStore) -> Views:
    projections = store.get_feature_service(VIEWER_SERVICE).feature_view_projections
    return [
        (store.get_feature_view(projection.name), [field.name for field in projection.features])
        for projection in projections
    ]


def assert_same_rows(run: RunDirectory, at_s: float) -> None:
    viewers = np.arange(500, 540)
    rows = ViewerRowReader(open_feature_store(run.features))
    for offline in viewer_snapshot(run.features, viewers, at_s).to_pylist():
        online = rows.read(offline["viewer_id"])
        assert [name for name in online if name != AS_OF] == FIELDS
        for name in FIELDS:
            assert same_value(online[name], offline[name], 0.0), (offline["viewer_id"], name)


def test_online_values_equal_the_offline_join(built) -> None:
    assert materialised_at_s(built.run.features) == built.until_s
    memory = open_viewer_memory(open_feature_store(built.run.features))
    follows = built.labels.filter(pc.field("follow") > 0)
    viewer = follows["viewer_id"][0].as_py()
    expected = set(follows.filter(pc.field("viewer_id") == viewer)["creator_id"].to_pylist())
    assert set(memory.read(viewer).followed_creators.tolist()) == expected
    assert_same_rows(built.run, built.until_s)


def test_materialising_an_earlier_time_replaces_every_value(built, tmp_path) -> None:
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(built.run.path, run.path)
    register_features(run.features, DIMENSIONS, "sqlite")
    early_s = built.until_s - 9 * 86_400
    for _ in range(2):
        assert materialise(run.features, early_s) == 40
        assert_same_rows(run, early_s)


def test_progress_reaches_the_total(built, tmp_path) -> None:
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(built.run.path, run.path)
    progress: list[tuple[int, int]] = []
    materialise(run.features, built.until_s, lambda done, total: progress.append((done, total)))
    assert progress[-1] == (40 * len(VIEWER_VIEWS), 40 * len(VIEWER_VIEWS))


def test_unknown_viewer_has_no_values(built) -> None:
    assert set(ViewerRowReader(open_feature_store(built.run.features)).read(123_456).values()) == {None}


@pytest.mark.redis
def test_redis_store_holds_the_same_rows_after_corrections(built, tmp_path, redis_server) -> None:
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(built.run.path, run.path)
    register_features(run.features, DIMENSIONS, f"redis://{redis_server}")
    for at_s in (built.until_s, built.until_s - 9 * 86_400, built.until_s):
        materialise(run.features, at_s)
        assert_same_rows(run, at_s)


@pytest.mark.redis
def test_single_redis_query_equals_feasts_reads_view_by_view(built, tmp_path, redis_server) -> None:
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(built.run.path, run.path)
    store = register_features(run.features, DIMENSIONS, f"redis://{redis_server}/1")
    materialise(run.features, built.until_s)
    single, per_view = ViewerRowReader(store), _PerViewReader(store, views := viewer_views(store))
    names_of = {view.name for view, _ in views}
    for viewer in (*range(500, 540), 123_456):
        key = EntityKey(join_keys=["viewer_id"], entity_values=[Value(int64_val=viewer)])
        expected, moments_s = dict[str, object](), {}
        for view, moment_s, values in per_view(key):
            expected |= {name: _decode_value(value) for name, value in values.items()}
            if moment_s:  # Feast returns 1970 for a view without a row
                moments_s[view] = moment_s
        row = single.read(viewer)
        assert row.pop(AS_OF, {}) == moments_s
        assert row == {name: expected.get(name) for name in FIELDS}
        assert set(moments_s) == (names_of if viewer != 123_456 else set())


@pytest.mark.redis
def test_unreachable_redis_raises_a_feature_error(built, tmp_path) -> None:
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(built.run.path, run.path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        store = register_features(run.features, DIMENSIONS, f"redis://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(FeatureError, match=f"cannot read {viewer_pseudonym(500)}"):
            ViewerRowReader(store).read(500)


@pytest.mark.redis
def test_row_and_memory_are_read_in_one_round_trip(built, tmp_path, redis_server) -> None:
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(built.run.path, run.path)
    store = register_features(run.features, DIMENSIONS, f"redis://{redis_server}/2")
    materialise(run.features, built.until_s)
    memory = open_viewer_memory(store)
    now_s = time.time()
    memory.remember_shown(501, [1, 2], now_s)
    memory.remember_watched(np.array([501]), np.array([2]), np.array([now_s]))
    memory.block(501, creators=[4])
    reader = ViewerRowReader(store, memory=memory)
    reader.read_viewer(501)  # connects
    with redis.Redis.from_url(f"redis://{redis_server}/2") as client:
        before = client.info("stats")["total_reads_processed"]
        found = reader.read_viewer(501)
        reads = client.info("stats")["total_reads_processed"] - before
    assert reads == 2  # the pipeline, and this test's second question
    assert found.row == reader.read(501)
    assert found.memory.shown_ids.tolist() == [1, 2]
    assert is_watched(found.memory.watched, np.array([2, 1])).tolist() == [True, False]
    assert found.memory.blocked_creators.tolist() == [4]
    assert len(reader.read_viewer(502).memory.shown_ids) == 0


def test_row_and_memory_are_read_from_sqlite(built, tmp_path) -> None:
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(built.run.path, run.path)
    store = register_features(run.features, DIMENSIONS, "sqlite")
    materialise(run.features, built.until_s)
    memory = open_viewer_memory(store)
    memory.remember_shown(501, [1, 2], time.time())
    reader = ViewerRowReader(store, memory=memory)
    assert reader.read_viewer(501).memory.shown_ids.tolist() == [1, 2]
    assert reader.read_viewer(501).row == reader.read(501)
    assert (run.features / MEMORY_FILE).exists()
    memory._read.connection.close()
    assert reader.read_viewer(501).memory is None  # the row alone
    assert ViewerRowReader(store).read_viewer(501).memory is None


@pytest.mark.redis
@pytest.mark.parametrize("part", ["shown", "watched", "blocked", "followed"])
def test_damaged_memory_in_redis_leaves_the_row(built, tmp_path, redis_server, part: str) -> None:
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(built.run.path, run.path)
    store = register_features(run.features, DIMENSIONS, f"redis://{redis_server}/2")
    materialise(run.features, built.until_s)
    memory = open_viewer_memory(store)
    now_s = time.time()
    memory.remember_shown(503, [1], now_s)
    memory.remember_watched(np.array([503]), np.array([2]), np.array([now_s]))
    memory.block(503, creators=[4])
    memory.follow(503, [4])
    with redis.Redis.from_url(f"redis://{redis_server}/2") as client:
        (key,) = client.keys(f"reelway:memory:{part}:503*")
        kept = client.dump(key)
        client.delete(key)
        if part == "watched":
            client.set(key, b"x" * 10_000)  # longer than a filter
        else:
            client.hset(key, "another", "type")
        try:
            found = ViewerRowReader(store, memory=memory).read_viewer(503)
            with pytest.raises(DataError, match="viewer memory"):
                memory.read(503)
        finally:
            client.restore(key, 0, kept, replace=True)
    assert found.memory is None
    assert found.row == ViewerRowReader(store).read(503)


def test_damaged_memory_in_sqlite_leaves_the_row(built, tmp_path) -> None:
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(built.run.path, run.path)
    store = register_features(run.features, DIMENSIONS, "sqlite")
    materialise(run.features, built.until_s)
    memory = open_viewer_memory(store)
    memory.remember_watched(np.array([501]), np.array([2]), np.array([time.time()]))
    with memory._written.writing() as db:
        db.execute("UPDATE watched SET bits = ?", [b"x" * 10_000])
    reader = ViewerRowReader(store, memory=memory)
    assert reader.read_viewer(501).memory is None
    assert reader.read_viewer(501).row == reader.read(501)
