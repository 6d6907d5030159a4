"""``reelway erase`` on a run with real stores: everything about a viewer goes, everything else stays."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from tests.support.pipelines.served_stream import FIRST_VIEWER, ServedStream, build_run, copied_run, event

from reelway.pipelines.erasure import erase_pipeline_stores
from reelway.pipelines.erasure.tables import erase_from_file
from reelway.pipelines.features.stream.viewer_task import ViewerTask
from reelway.platform.contracts.events import OutcomeType
from reelway.platform.erasure.platform_stores import erase_platform_stores
from reelway.platform.erasure.request import ErasedStore, ErasureRequest, ErasureState
from reelway.platform.eventlog.erasures import VIEWER_TOPICS, viewer_rows
from reelway.platform.eventlog.retained_records import records_of_partition
from reelway.platform.eventlog.topics import open_topic
from reelway.platform.features.feast_store import open_feature_store
from reelway.platform.features.vector_reader import VectorReader
from reelway.platform.features.viewer_memory import open_viewer_memory
from reelway.platform.features.viewer_rows import ViewerRowReader
from reelway.platform.run_directory import RunDirectory

pytestmark = pytest.mark.slow

ERASED, KEPT = FIRST_VIEWER, FIRST_VIEWER + 1


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return build_run(tmp_path_factory.mktemp("built") / "run")


@pytest.fixture
def served(built: RunDirectory, tmp_path: Path) -> Iterator[ServedStream]:
    """A run that served both viewers; its stream has stopped."""
    served = ServedStream(copied_run(built, tmp_path / "run"))
    served.serve(14)
    served.replay()
    memory = open_viewer_memory(open_feature_store(served.run.features))
    for viewer in (ERASED, KEPT):
        memory.remember_shown(viewer, np.array([1, 2]), served.clock_us / 1e6)
        memory.follow(viewer, [3])
    served.state.close()
    yield served
    for log in served.logs.values():
        log.close()


def erase(run: RunDirectory, *, dry_run: bool = False) -> dict[str, ErasedStore]:
    request = ErasureRequest(run, (ERASED,), dry_run)
    return {one.store: one for one in (*erase_platform_stores(request), *erase_pipeline_stores(request))}


def contents(run: RunDirectory, viewer: int) -> dict[str, Any]:
    """What each store holds about a viewer."""
    logged = {}
    for topic in VIEWER_TOPICS:
        with closing(open_topic(run.events, topic)) as log:
            ids = np.array([viewer])
            rows = [viewer_rows(one.payload, ids) for one in records_of_partition(log, 0, None, log.end_offsets())]
            logged[topic] = sum(some.get(viewer, 0) for some in rows)
    store = open_feature_store(run.features)
    row = {name: value for name, value in ViewerRowReader(store).read(viewer).items() if value is not None}
    vectors = VectorReader(run.path / "serving" / "vectors.jsonl", {}).vectors()
    tables = {
        str(path.relative_to(run.path)): pc.sum(pc.equal(table["viewer_id"], viewer)).as_py()
        for path in sorted(run.path.rglob("*.parquet"))
        if "viewer_id" in (table := pq.read_table(path)).column_names
    }
    memory = open_viewer_memory(store).count_entries(viewer)
    sampled = [vector.request_id for vector in vectors if vector.viewer_id == viewer]
    return {**logged, "row": row, "memory": memory, "vectors": sampled, **tables}


def test_erasure_leaves_nothing_of_the_viewer(served: ServedStream) -> None:
    run = served.run
    of_others = contents(run, KEPT)
    before = contents(run, ERASED)
    stores = ("row", "memory", "vectors", "exposures", "outcomes", "features/labels.parquet")
    assert all(before[store] for store in stores), before
    assert any(name.startswith("parity/events/") and rows for name, rows in before.items())
    erased = erase(run)
    assert {name: one.found for name, one in erased.items() if not one.found} == {}
    assert all(one.state is ErasureState.ERASED and one.removed == one.found for one in erased.values())
    assert {name: left for name, left in contents(run, ERASED).items() if left} == {}
    assert contents(run, KEPT) == of_others


def test_second_erasure_finds_nothing(served: ServedStream) -> None:
    erase(served.run)
    with closing(open_topic(served.run.events, next(iter(VIEWER_TOPICS)))) as log:
        ends = log.end_offsets()
        again = erase(served.run)
        assert {name: one.found for name, one in again.items() if one.found} == {}
        assert log.end_offsets() == ends, "another erasure record"


def test_dry_run_reports_the_same_and_changes_nothing(served: ServedStream) -> None:
    before = contents(served.run, ERASED)
    looked = erase(served.run, dry_run=True)
    assert contents(served.run, ERASED) == before
    assert all(one.removed == 0 and one.state is ErasureState.FOUND for one in looked.values())
    assert {name: one.found for name, one in erase(served.run).items()} == {n: one.found for n, one in looked.items()}


def test_restarted_stream_writes_no_row_of_an_erased_viewer(served: ServedStream) -> None:
    erase(served.run)
    served.start_stream()
    served.clock_us += 3_600_000_000
    served.append(event(1, KEPT, 1001, OutcomeType.LIKE, served.clock_us))
    served.run_stream()
    assert contents(served.run, ERASED)["row"] == {}
    assert served.stream._viewers.erase(np.array([ERASED])) == 0
    served.state.close()


def test_running_stream_erases_what_the_log_names(served: ServedStream) -> None:
    """The stream holds its state; the command leaves it to the stream, also what was not delivered yet."""
    served.start_stream()
    now_us = served.clock_us
    served.append(event(5, ERASED, 1002, OutcomeType.LIKE, now_us), event(6, KEPT, 1002, OutcomeType.LIKE, now_us))
    pending = erase(served.run)["stream state"]
    assert pending.state is ErasureState.PENDING
    served.clock_us += 3_600_000_000
    served.append(event(7, KEPT, 1003, OutcomeType.LIKE, served.clock_us))
    served.clock_us += 9_000_000
    served.run_stream()
    task: ViewerTask = served.stream._viewers
    with served.state.transaction():
        assert task.erase(np.array([ERASED])) == 0
    left = contents(served.run, ERASED)
    assert left["row"] == {}
    assert contents(served.run, KEPT)["row"]["history_videos"][-1] == 1003
    served.state.close()


def test_viewer_who_returns_counts_from_the_erasure_on(served: ServedStream) -> None:
    served.start_stream()
    erase(served.run)
    served.clock_us += 60_000_000
    served.append(event(8, ERASED, 1004, OutcomeType.LIKE, served.clock_us))
    served.clock_us += 3_600_000_000
    served.append(event(9, KEPT, 1004, None, served.clock_us))
    served.run_stream()
    assert list(contents(served.run, ERASED)["row"]["history_videos"]) == [1004]
    served.state.close()


def test_replay_after_an_erasure_continues(served: ServedStream) -> None:
    served.start_stream()
    served.serve(7)
    erase(served.run)
    assert served.replay(late_after_s=1e9).mismatch_count == 0
    served.state.close()


def test_interrupted_erasure_is_completed_by_the_next(served: ServedStream, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends while it writes the second file."""
    run, calls = served.run, 0

    def interrupted(path: Path, viewer_ids: Any, **options: bool) -> int:
        nonlocal calls
        found = erase_from_file(path, viewer_ids, **options)
        calls += bool(found)
        if calls == 2:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr("reelway.pipelines.erasure.tables.erase_from_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        erase(run)
    monkeypatch.undo()
    assert any(contents(run, ERASED).values())
    erase(run)
    assert {name: left for name, left in contents(run, ERASED).items() if left} == {}


def test_command_reports_without_the_id(served: ServedStream) -> None:
    def command(*options: str) -> subprocess.CompletedProcess[str]:
        arguments = ["erase", "--viewer", str(ERASED), "--run", str(served.run.path), *options]
        return subprocess.run(
            [sys.executable, "-m", "reelway.platform.cli", *arguments],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )

    assert command().returncode == 2, "nobody can answer the question"
    first, second = command("--yes", "--json"), command("--yes", "--json")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    report = json.loads(first.stdout)
    assert report["found"] == report["removed"] > 0
    assert json.loads(second.stdout)["found"] == 0
    text = (first.stdout + first.stderr).replace(str(served.run.path), "")
    assert "viewer-" in text
    assert str(ERASED) not in text
    assert command("--yes", "--events", "s3://nowhere").returncode == 2
