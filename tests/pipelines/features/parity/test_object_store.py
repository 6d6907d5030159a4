"""The replay works on object stores: run, vector log, progress, copy of the events and findings below fsspec URLs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import typer
from tests.support.pipelines.served_stream import ServedStream, build_run
from typer.testing import CliRunner

from reelway.pipelines.commands import features as command
from reelway.platform.features.vector_log import ServedVector
from reelway.platform.features.vector_reader import VectorReader
from reelway.platform.features.vector_segments import VectorSegments, open_vector_log
from reelway.platform.retention import HOUR_S, Retention
from reelway.platform.rollout.sources.parity_store import ParityFindingsReader

RETAIN_S = Retention().parity_hours * HOUR_S

RUN = "memory://store/runs/production"
VECTORS = "memory://store/vectors"
REPORT = "memory://store/releases/parity.json"


@pytest.fixture(autouse=True)
def store() -> Iterator[fsspec.AbstractFileSystem]:
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()


def copy_to_store(local: Path, store: fsspec.AbstractFileSystem) -> None:
    for path in local.rglob("*"):
        if path.is_file() and path.parts[-2] != "events":
            store.pipe_file(f"/store/runs/production/{path.relative_to(local)}", path.read_bytes())


@pytest.mark.slow
def test_replay_reads_and_writes_an_object_store_alone(tmp_path: Path, store: fsspec.AbstractFileSystem) -> None:
    log = open_vector_log(VECTORS, ratio=1.0)
    assert isinstance(log, VectorSegments)
    streamed = ServedStream(build_run(tmp_path / "run"), vectors=log)
    app = typer.Typer()
    command.register(app)
    arguments = [
        "features", "parity", "--run", RUN, "--log", VECTORS, "--report", REPORT,
        "--events", str(streamed.run.events), "--late-after", "1e9",
    ]  # fmt: skip
    for replayed in (9, 5):
        streamed.serve(replayed)
        log.flush()
        copy_to_store(streamed.run.path, store)
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert f"{replayed} vectors" in done.output
        assert ", 0 mismatches" in done.output
    log.close()
    reader = ParityFindingsReader(REPORT)
    reading = reader.findings().reading("r1")
    reader.close()
    assert (reading.events, reading.trials) == (0, 9 * 14)
    names = store.find("/store")
    assert any("/parity/events/outcomes/" in name for name in names)
    assert "/store/runs/production/parity/progress.json" in names
    assert not (streamed.run.path / "parity").exists(), "nothing was written on this machine"


def vector(request_id: int) -> ServedVector:
    return ServedVector(request_id, 7, 1.5, "tv", "abc", {}, [])


def test_segments_are_read_once_and_deleted_after_a_day(store: fsspec.AbstractFileSystem) -> None:
    log = VectorSegments(VECTORS, ratio=1.0, interval_s=3_600)
    position: dict[str, dict] = {}
    for some in ((1, 2), (3,)):
        for request in some:
            log.append(vector(request))
        log.flush()
        reader = VectorReader(VECTORS, position)
        assert [one.request_id for one in reader.vectors()] == list(some)
        position = reader.position
    log.close()
    assert reader.delete_old_segments() == 0
    newest_s = max(int(name.rsplit("/", 1)[-1].removesuffix(".jsonl")) for name in store.find("/store/vectors")) / 1000
    assert reader.delete_old_segments(newest_s + RETAIN_S + 1) == 2
    assert (store.find("/store/vectors"), reader.position) == ([], {})


def test_writer_keeps_its_newest_segments(store: fsspec.AbstractFileSystem) -> None:
    log = VectorSegments(VECTORS, ratio=1.0, interval_s=3_600, max_bytes=400)
    for request in range(10):
        log.append(vector(request))
        log.flush()
    log.close()
    kept = [one.request_id for one in VectorReader(VECTORS, {}).vectors()]
    assert kept == list(range(kept[0], 10))
    assert sum(store.size(name) for name in store.find("/store/vectors")) <= 400
