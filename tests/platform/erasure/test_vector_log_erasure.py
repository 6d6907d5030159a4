"""Erasure from the parity log: offsets of a replay stay valid, also while a router appends."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import fsspec

from reelway.platform.erasure.vector_logs import erase_vectors
from reelway.platform.features.vector_log import ServedVector, VectorLog
from reelway.platform.features.vector_reader import VectorReader
from reelway.platform.features.vector_segments import VectorSegments

ERASED = 12


def vector(request: int, viewer: int) -> ServedVector:
    return ServedVector(request, viewer, 1.5, "tv", "r1", {"region": "eu"}, [{"video_id": ERASED, "viewer_id": ERASED}])


def requests(location: Any, position: Any = None) -> tuple[list[int], Any]:
    reader = VectorReader(location, position or {})
    return [one.request_id for one in reader.vectors()], reader.position


def test_replay_continues_where_it_was_before_the_erasure(tmp_path: Path) -> None:
    path = tmp_path / "vectors.jsonl"
    log = VectorLog(path, ratio=1.0)
    for request, viewer in enumerate((1, ERASED, 123, ERASED)):
        log.append(vector(request, viewer))
    _, position = requests(path)
    log.append(vector(4, ERASED))
    log.append(vector(5, 1))
    assert erase_vectors(str(path), [ERASED], dry_run=True) == 3
    assert erase_vectors(str(path), [ERASED]) == 3
    assert requests(path, position)[0] == [5]
    assert requests(path)[0] == [0, 2, 5]
    assert erase_vectors(str(path), [ERASED]) == 0


def test_erasure_reads_both_halves_and_all_hosts(tmp_path: Path) -> None:
    for host in "ab":
        log = VectorLog(tmp_path / f"{host}.jsonl", ratio=1.0, max_bytes=2_000)
        for request in range(12):
            log.append(vector(request, ERASED if request % 2 else 1))
        assert (tmp_path / f"{host}.jsonl.1").exists()
    before = sum(request % 2 for request in requests(tmp_path)[0])
    assert erase_vectors(str(tmp_path), [ERASED]) == before >= 8
    assert not any(request % 2 for request in requests(tmp_path)[0])


def test_objects_of_a_store_are_rewritten() -> None:
    log = VectorSegments("memory://parity", ratio=1.0, interval_s=3_600)
    try:
        for request, viewer in enumerate((ERASED, 1)):
            log.append(vector(request, viewer))
        log.flush()
        assert erase_vectors("memory://parity", [ERASED]) == 1
        assert requests("memory://parity")[0] == [1]
        assert erase_vectors("memory://parity", [ERASED]) == 0
    finally:
        log.close()
        fsspec.filesystem("memory").rm("/parity", recursive=True)


def test_vectors_appended_meanwhile_are_kept(tmp_path: Path) -> None:
    path, erasing = tmp_path / "vectors.jsonl", threading.Event()
    log = VectorLog(path, ratio=1.0)
    for request in range(50):
        log.append(vector(request, ERASED if request % 2 else 1))

    def append() -> None:
        erasing.wait()
        for request in range(100, 160):
            log.append(vector(request, 1))

    thread = threading.Thread(target=append)
    thread.start()
    erasing.set()
    for _ in range(5):
        erase_vectors(str(path), [ERASED])
    thread.join()
    assert requests(path)[0] == [*range(0, 50, 2), *range(100, 160)]
