"""Vector logs of all pods together are bounded by age and by size, with and without a replay."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from reelway.platform.features.vector_log import ServedVector
from reelway.platform.features.vector_reader import VectorReader
from reelway.platform.features.vector_retention import delete_expired
from reelway.platform.features.vector_segments import VectorSegments, open_vector_log
from reelway.platform.retention import HOUR_S, Retention

RETAIN_S = Retention().parity_hours * HOUR_S

VECTORS = "memory://retained/vectors"
NOW_S = 2_000_000_000.0


@pytest.fixture
def store() -> Iterator[fsspec.AbstractFileSystem]:
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()


def segment(store: fsspec.AbstractFileSystem, pod: str, age_s: float, size: int = 100) -> str:
    path = f"/retained/vectors/{pod}/{int((NOW_S - age_s) * 1000):015d}.jsonl"
    store.pipe_file(path, b"x" * size)
    return path


def test_age_bounds_the_logs_of_all_pods(store: fsspec.AbstractFileSystem) -> None:
    old = [segment(store, "gone-1", RETAIN_S + 5), segment(store, "gone-2", RETAIN_S + 1)]
    young = [segment(store, "gone-1", RETAIN_S - 1), segment(store, "here-3", 0)]
    assert delete_expired(store, "/retained/vectors", NOW_S) == old
    assert sorted(store.find("/retained/vectors")) == sorted(young)


def test_age_is_a_setting(store: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REELWAY_RETENTION_PARITY_HOURS", "2")
    old, _ = segment(store, "a-1", 2 * HOUR_S + 1), segment(store, "a-1", 2 * HOUR_S - 1)
    assert delete_expired(store, "/retained/vectors", NOW_S) == [old]


def test_size_bounds_the_logs_of_all_pods_together(store: fsspec.AbstractFileSystem) -> None:
    paths = [segment(store, f"pod-{number % 3}", age_s=100 - number) for number in range(10)]
    assert delete_expired(store, "/retained/vectors", NOW_S, max_total_bytes=450) == paths[:6]
    assert sum(store.size(path) for path in store.find("/retained/vectors")) == 400


def test_writer_deletes_what_dead_pods_left_without_a_replay(store: fsspec.AbstractFileSystem) -> None:
    left = "/retained/vectors/dead-1/000000000001000.jsonl"
    store.pipe_file(left, b"{}\n")
    log = VectorSegments(VECTORS, ratio=1.0, interval_s=3_600)
    log.append(ServedVector(1, 7, 1.5, "tv", "abc", {}, []))
    log.close()
    assert not store.exists(left)
    assert [one.request_id for one in VectorReader(VECTORS, {}).vectors()] == [1]


def test_host_deletes_the_old_files_of_other_hosts(tmp_path: Path) -> None:
    for name in ("gone.jsonl", "gone.jsonl.1", "new.jsonl", "other.txt"):
        (tmp_path / name).write_text("{}\n")
        if name != "new.jsonl":
            os.utime(tmp_path / name, (1.0, 1.0))
    open_vector_log(str(tmp_path), ratio=1.0).close()
    assert {path.name for path in tmp_path.iterdir()} == {"new.jsonl", "other.txt"}


def test_single_file_is_left_to_its_writer(tmp_path: Path) -> None:
    path = tmp_path / "vectors.jsonl"
    path.write_text("{}\n")
    os.utime(path, (1.0, 1.0))
    assert VectorReader(path, {}).delete_old_segments(NOW_S) == 0
    assert path.exists()
