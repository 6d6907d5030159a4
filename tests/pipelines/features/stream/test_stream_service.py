"""The stream as a service: a run's own features and event log, the online store and the exported metrics."""

from __future__ import annotations

import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from tests.support.dimensions import DIMENSIONS
from tests.support.pipelines.event_tables import random_dataset
from tests.support.pipelines.stream_fixtures import LoggedEvent, record_of
from tests.support.pipelines.view_files import write_views

from reelway.pipelines.features.materialisation import materialise
from reelway.pipelines.features.registry import register_features
from reelway.pipelines.features.stream.service import StreamOptions, run_stream
from reelway.pipelines.features.views import ViewSettings
from reelway.platform.atomic_files import write_json
from reelway.platform.contracts.events import OutcomeType
from reelway.platform.contracts.feature_names import SESSION_FEATURES
from reelway.platform.eventlog import LogRecord
from reelway.platform.eventlog.parked_records import ParkedRecords
from reelway.platform.eventlog.topics import Topic, open_topic
from reelway.platform.features.assembly import assemble_viewers, columns_from_row
from reelway.platform.features.feast_store import open_feature_store
from reelway.platform.features.viewer_rows import ViewerRowReader
from reelway.platform.run_directory import RunDirectory

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run with features and a filled online store."""
    run = RunDirectory(tmp_path / "run")
    _, until_us = write_views(run, random_dataset(), ViewSettings(DIMENSIONS))
    register_features(run.features, DIMENSIONS, "sqlite")
    materialise(run.features, until_us / 1e6)
    write_json(run.record_path("features"), {"config": {"views": asdict(ViewSettings(DIMENSIONS))}})
    return run


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def sample(port: int, name: str) -> float | None:
    """A sample of the stream's metrics as Prometheus reads it."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    values = [line.rpartition(" ")[2] for line in lines if line.startswith(f"reelway_stream_{name} ")]
    return float(values[0]) if values else None


def wait_until(condition: Callable[[], bool], description: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, description
        time.sleep(0.1)


def parked_after_like(run: RunDirectory, number: int, video: int) -> float | None:
    """Runs the stream until a new like is in the viewer's row. Returns how many empty records were parked."""
    port, stop = free_port(), threading.Event()
    options = StreamOptions(metrics_port=port)
    service = threading.Thread(target=run_stream, args=(run, options, stop), daemon=True)
    rows = ViewerRowReader(open_feature_store(run.features))
    now_us = time.time_ns() // 1000
    like = LoggedEvent(10**9 + number, 533, video, OutcomeType.LIKE, 1.0, now_us - 9_000_000, now_us)
    with closing(open_topic(run.events, Topic.OUTCOMES)) as log:
        log.append([record_of([like], number, stamped=False)])
    service.start()
    try:
        wait_until(lambda: rows.read(533)["history_videos"][-1] == video, f"{video} is not in the row")
        wait_until(lambda: sample(port, 'outcomes_total{result="applied"}') == 1, "the outcome is not counted")
        return sample(port, 'parked_records_total{kind="empty"}')
    finally:
        stop.set()
        service.join(30)
        assert not service.is_alive()


def test_like_behind_a_tombstone_changes_the_viewers_row(run: RunDirectory) -> None:
    """The stream runs twice, with the system's clock."""
    with closing(open_topic(run.events, Topic.OUTCOMES)) as log:
        log.append([LogRecord("tombstone", 0, b"")])
    assert parked_after_like(run, 1, 1042) == 1
    assert parked_after_like(run, 2, 1043) == 0
    with closing(ParkedRecords(run.path / "stream" / "parked.db")) as parked:
        assert [(one.offset, one.kind) for one in parked.records()] == [(1, "empty")]


def session_of_a_request(run: RunDirectory, viewer: int) -> list[float]:
    """Returns the viewer's session features in a request that comes now."""
    row = ViewerRowReader(open_feature_store(run.features)).read(viewer)
    known = {name: value for name, value in row.items() if value is not None}
    dense = assemble_viewers(columns_from_row(known), np.array([time.time()]), ["phone"], DIMENSIONS).viewer_dense[0]
    return [float(dense[DIMENSIONS.viewer_dense.index(name)]) for name in SESSION_FEATURES]


def test_likes_change_the_session_of_the_next_request(run: RunDirectory) -> None:
    assert session_of_a_request(run, 533) == [0, 0, 0, 0]
    parked_after_like(run, 1, 1042)
    assert session_of_a_request(run, 533) == [1, 1, 0, 0]
    parked_after_like(run, 2, 1043)
    assert session_of_a_request(run, 533) == [2, 2, 0, 0]
