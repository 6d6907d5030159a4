"""The log of served vectors: vectors are read back unchanged and once, and the log is bounded."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from reelway.platform.errors import ConfigError, MalformedFileError, StorageError
from reelway.platform.features.vector_log import ServedVector, VectorLog, host_log_path
from reelway.platform.features.vector_reader import VectorReader


def read_vectors(location: Path) -> list[ServedVector]:
    return list(VectorReader(location, {}).vectors())


def vector(request_id: int, **changes: object) -> ServedVector:
    values = {
        "request_id": request_id, "viewer_id": 7, "request_time_s": 1.5, "device": "tv", "release": "abc",
        "viewer": {"region": "eu", "impressions_1d": 2.0, "history_videos": [1, 2]},
        "videos": [{"video_id": 4, "duration_s": 3.0}],
    } | changes  # fmt: skip
    return ServedVector(**values)  # type: ignore[arg-type]


def test_vector_is_read_back_as_served(tmp_path: Path) -> None:
    log = VectorLog(tmp_path / "log", ratio=1.0)
    assert log.append(vector(1, viewer_as_of_s=9.25))
    assert read_vectors(tmp_path / "log") == [vector(1, viewer_as_of_s=9.25)]


def test_float32_values_are_exact_with_nan_as_missing(tmp_path: Path) -> None:
    values = np.array([0.1, np.nan], dtype=np.float32)
    log = VectorLog(tmp_path / "log", ratio=1.0)
    log.append(vector(1, videos=[{"video_id": np.int64(4), "duration_s": values[0], "embedding": values}]))
    (row,) = read_vectors(tmp_path / "log")[0].videos
    assert row == {"video_id": 4, "duration_s": float(values[0]), "embedding": [float(values[0]), None]}


def test_sample_depends_only_on_the_request(tmp_path: Path) -> None:
    one, other = VectorLog(tmp_path / "a", ratio=0.1), VectorLog(tmp_path / "b", ratio=0.1)
    sampled = [one.is_sampled(request) for request in range(20_000)]
    assert sampled == [other.is_sampled(request) for request in range(20_000)]
    assert 0.08 < sum(sampled) / len(sampled) < 0.12
    more = VectorLog(tmp_path / "c", ratio=0.5)
    assert all(more.is_sampled(request) for request, yes in enumerate(sampled) if yes)


def test_request_outside_the_sample_writes_nothing(tmp_path: Path) -> None:
    assert not VectorLog(tmp_path / "log", ratio=0.0).append(vector(1))
    assert not (tmp_path / "log").exists()
    assert read_vectors(tmp_path / "log") == []


def test_concurrent_threads_write_complete_lines(tmp_path: Path) -> None:
    log = VectorLog(tmp_path / "log", ratio=1.0)

    def write(start: int) -> None:
        for request in range(start, start + 25):
            log.append(vector(request))

    threads = [threading.Thread(target=write, args=(100 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    request_ids = sorted(v.request_id for v in read_vectors(tmp_path / "log"))
    assert request_ids == sorted(100 * i + j for i in range(4) for j in range(25))


def test_full_log_drops_its_older_half(tmp_path: Path) -> None:
    log = VectorLog(tmp_path / "log", ratio=1.0, max_bytes=4000)
    for request in range(200):
        log.append(vector(request))
    retained = [v.request_id for v in read_vectors(tmp_path / "log")]
    assert retained == list(range(retained[0], 200))
    assert retained[0] > 0
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 4000


def test_truncated_last_line_is_skipped_without_losing_the_next_append(tmp_path: Path) -> None:
    log = VectorLog(tmp_path / "log", ratio=1.0)
    log.append(vector(1))
    with (tmp_path / "log").open("ab") as handle:
        handle.write(b'{"request_id": 2, "view')
    assert [v.request_id for v in read_vectors(tmp_path / "log")] == [1]
    log.append(vector(3))
    assert [v.request_id for v in read_vectors(tmp_path / "log")] == [1, 3]


def test_damaged_line_is_reported_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "log").write_text('{"request_id": 1}\n')
    with pytest.raises(MalformedFileError, match="byte 0"):
        read_vectors(tmp_path / "log")


def test_shared_folder_has_one_log_per_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tmp_path / "parity"
    for number, host in enumerate(("worker-b", "worker-a", "worker-b")):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        VectorLog(host_log_path(shared), ratio=1.0, max_bytes=600).append(vector(number))
    assert {file.name for file in shared.glob("*.jsonl")} == {"worker-a.jsonl", "worker-b.jsonl"}
    assert (shared / "worker-b.jsonl.1").exists(), "the older half is a file of the same host"
    assert [one.request_id for one in read_vectors(shared)] == [1, 0, 2]
    assert host_log_path(tmp_path / "own.jsonl") == tmp_path / "own.jsonl"


def test_ratio_outside_zero_to_one_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vector log: sample ratio 1\.5 is outside 0\.\.1"):
        VectorLog(tmp_path / "log", ratio=1.5)


def test_unwritable_disk_raises_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="cannot write the vector log"):
        VectorLog(tmp_path / "file" / "log", ratio=1.0).append(vector(1))
