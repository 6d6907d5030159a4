"""Samples for the parity replay that cannot be written are counted, and only a bounded number waits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from tests.support.release_files import NOW_S, make_release_folder

from reelway.platform.contracts.api import RecommendRequest
from reelway.platform.features.vector_log import SampledVectors, VectorLog
from reelway.platform.features.vector_segments import VectorSegments
from reelway.platform.tokens import TokenSigner
from reelway.serving.parity_sample import ParitySampler
from reelway.serving.release_loader import ReleaseLoader
from reelway.serving.release_pool import OpenRelease
from reelway.serving.router import Router, RouterDependencies
from reelway.serving.video_table import VideoTable

LOST = "reelway_ingress_parity_samples_lost_total"


class Sampling:
    """The sample of a router, whose counter it uses."""

    def __init__(self, vectors: SampledVectors, table: VideoTable, max_waiting: int = 1_000) -> None:
        self.registry, self._table, self._request = CollectorRegistry(), table, 0
        self.sample = ParitySampler(vectors, ThreadPoolExecutor(1), max_waiting=max_waiting)
        signer = TokenSigner(b"a secret of the tests, long enough")
        self.router = Router(self._open, RouterDependencies(signer, self.registry, sample=self.sample))

    async def _open(self, release: str) -> OpenRelease:
        raise NotImplementedError(release)

    def offer(self) -> None:
        self._request += 1
        request, rows = RecommendRequest(viewer_id=7), np.arange(3, dtype=np.int32)
        self.sample.offer(self._request, request, "r", None, {"region": "eu"}, self._table, rows, NOW_S, NOW_S)

    def lost(self) -> float:
        value = self.registry.get_sample_value(LOST)
        assert value is not None
        return value


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> VideoTable:
    folder = tmp_path_factory.mktemp("release")
    make_release_folder(folder, videos=50)
    return ReleaseLoader(folder).table()


@pytest.fixture
def store() -> Iterator[fsspec.AbstractFileSystem]:
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()


def test_sample_of_a_full_disk_is_counted(tmp_path: Path, table: VideoTable) -> None:
    (tmp_path / "file").write_text("not a folder")
    sampling = Sampling(VectorLog(tmp_path / "file" / "log", ratio=1.0), table)
    assert sampling.lost() == 0
    sampling.offer()
    sampling.offer()
    sampling.sample.close()
    assert sampling.lost() == 2


def test_slow_log_bounds_the_waiting_samples(tmp_path: Path, table: VideoTable) -> None:
    gate, started = threading.Event(), threading.Event()

    class SlowLog(VectorLog):
        def _store(self, line: bytes) -> None:
            started.set()
            assert gate.wait(30)
            super()._store(line)

    sampling = Sampling(SlowLog(tmp_path / "log", ratio=1.0), table, max_waiting=4)
    for _ in range(10):
        sampling.offer()
    assert started.wait(30)
    assert sampling.lost() == 6
    gate.set()
    sampling.sample.close()
    assert (tmp_path / "log").read_text().count("\n") == 4
    sampling.offer()
    assert sampling.lost() == 7, "a router that has closed its log"


def test_object_that_cannot_be_written_counts_its_samples(
    store: fsspec.AbstractFileSystem, table: VideoTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = VectorSegments("memory://store/vectors", ratio=1.0, interval_s=3_600)
    sampling = Sampling(vectors, table)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("access denied")

    with monkeypatch.context() as patched:
        patched.setattr(type(store), "pipe_file", refuse)
        for _ in range(3):
            sampling.offer()
        sampling.sample.close()
    assert sampling.lost() == 3


def test_old_object_that_cannot_be_deleted_loses_nothing(
    store: fsspec.AbstractFileSystem, table: VideoTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = VectorSegments("memory://store/vectors", ratio=1.0, interval_s=3_600, max_bytes=1)
    sampling = Sampling(vectors, table)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("access denied")

    with monkeypatch.context() as patched:
        patched.setattr(type(store), "rm_file", refuse)
        for _ in range(2):
            sampling.offer()
            sampling.sample._thread.submit(vectors.flush).result()
    sampling.sample.close()
    assert sampling.lost() == 0
    assert len(store.find("/store/vectors")) == 2
