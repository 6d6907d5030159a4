"""Rows that a server reads from the stream's real stores equal the offline join over the log."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tests.support.dimensions import DIMENSIONS
from tests.support.pipelines.event_tables import random_dataset
from tests.support.pipelines.stream_fixtures import LoggedEvent, append, open_logs
from tests.support.pipelines.view_files import write_views

from reelway.pipelines.features.materialisation import materialise, write_rows
from reelway.pipelines.features.parity import ParityReport, replay
from reelway.pipelines.features.registry import register_features
from reelway.pipelines.features.stream.local_stream import LocalStream
from reelway.pipelines.features.stream.replay import replay_log
from reelway.pipelines.features.stream.run_inputs import load_dataset, video_facts, view_settings, view_ttl_us
from reelway.pipelines.features.stream.sinks import FeatureSinks
from reelway.pipelines.features.stream.sqlite_store import SqliteStore
from reelway.pipelines.features.training_rows import video_snapshot, viewer_snapshot
from reelway.pipelines.features.views import ViewSettings
from reelway.pipelines.release_tables import write_videos
from reelway.platform.atomic_files import write_json
from reelway.platform.contracts.api import RecommendRequest
from reelway.platform.contracts.events import OutcomeType
from reelway.platform.eventlog.feature_changelog import FeatureChangelog
from reelway.platform.eventlog.sqlite_log import SqliteLog
from reelway.platform.eventlog.topics import Topic
from reelway.platform.features.assembly import assemble_videos, columns_from_table
from reelway.platform.features.feast_store import open_feature_store
from reelway.platform.features.vector_log import VectorLog
from reelway.platform.features.viewer_rows import ViewerRowReader
from reelway.platform.run_directory import RunDirectory
from reelway.serving.live_overlay import FeatureOverlay
from reelway.serving.parity_sample import ParitySampler
from reelway.serving.video_table import open_video_table

SECOND_US = 1_000_000
DATASET_AGE_S = 400 * 86_400
"""Time since the end of the data set. The stream's time continues from the end of the data set."""


class InlineExecutor:
    """Runs the work inline instead of in a thread."""

    def submit(self, work, *arguments):  # type: ignore[no-untyped-def]
        work(*arguments)


@dataclass
class StreamFixture:
    """A run with its stream, as a server sees it."""

    run: RunDirectory
    logs: dict[Topic, SqliteLog]
    processor: LocalStream
    clock_us: int

    def append(self, number: int, *done: LoggedEvent) -> None:
        """Appends events at their time."""
        self.clock_us = done[0].time_us
        append(self.logs, done, number)

    def advance_to(self, clock_us: int) -> None:
        self.clock_us = clock_us
        while (done := self.processor.run_micro_batch(wait_s=0)).records or done.steps:
            pass


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> StreamFixture:
    run = RunDirectory(tmp_path_factory.mktemp("stream") / "run")
    labels, until_us = write_views(run, random_dataset(), ViewSettings(DIMENSIONS))
    register_features(run.features, DIMENSIONS, "sqlite")
    materialise(run.features, until_us / 1e6)
    write_json(run.record_path("features"), {"config": {"views": asdict(ViewSettings(DIMENSIONS))}})
    fixture = StreamFixture(run, None, None, until_us + DATASET_AGE_S * SECOND_US)  # type: ignore[arg-type]
    fixture.logs = open_logs(run.events, lambda: fixture.clock_us / 1e6)
    fixture.append(0, done(0, 500, 1001, OutcomeType.LIKE, fixture.clock_us))
    sinks = FeatureSinks(open_feature_store(run.features), FeatureChangelog(run.overlay))
    fixture.processor = LocalStream(
        fixture.logs, SqliteStore(run.path / "stream" / "state.db"), sinks, view_settings(run), view_ttl_us(run),
        video_facts(run), clock=lambda: fixture.clock_us / 1e6,
    )  # fmt: skip
    fixture.processor.start(lambda: load_dataset(run))
    assert labels.num_rows
    return fixture


def done(number: int, viewer: int, video: int, kind: OutcomeType | None, at_us: int, value: float = 1.0) -> LoggedEvent:
    return LoggedEvent(10**9 + number, viewer, video, kind, value, at_us - 9 * SECOND_US, at_us)


def serve(streamed: StreamFixture, path: Path) -> int:
    """Serves for some hours and samples every answer. Returns the number of answers."""
    run, rng = streamed.run, np.random.default_rng(3)
    snapshot = video_snapshot(run.features, streamed.processor.settled_us / 1e6)
    video_file = run.path / "videos.arrow"
    arrays = assemble_videos(columns_from_table(snapshot), np.zeros(snapshot.num_rows), DIMENSIONS)
    write_videos(
        video_file, snapshot, arrays, np.eye(1, 4, dtype=np.float32).repeat(snapshot.num_rows, axis=0), DIMENSIONS
    )
    table = open_video_table(video_file)
    overlay, rows = (
        FeatureOverlay(table, FeatureChangelog(run.overlay)),
        ViewerRowReader(open_feature_store(run.features)),
    )
    sample = ParitySampler(VectorLog(path, ratio=1.0), InlineExecutor())  # type: ignore[arg-type]
    answers = 0
    for hour in range(1, 30):
        now_us = streamed.clock_us + 2_700 * SECOND_US
        kinds = rng.choice(list(OutcomeType), 12).tolist()
        streamed.append(
            hour,
            *(
                done(100 * hour + i // 2, 500 + hour % 7, 1000 + int(rng.integers(60)), OutcomeType(kind), now_us, 9e3)
                for i, kind in enumerate(kinds)
            ),
            *(done(100 * hour + 50 + i, 500 + hour % 7, 1000 + int(rng.integers(60)), None, now_us) for i in range(3)),
        )
        streamed.advance_to(now_us + int(rng.integers(2, 9)) * SECOND_US)
        overlay.poll()
        viewer = 500 + hour % 7
        sample.offer(
            hour, RecommendRequest(viewer_id=viewer), "r1", None, rows.read(viewer), table,
            rng.integers(0, len(table), 8).astype(np.int32), streamed.clock_us / 1e6,
        )  # fmt: skip
        answers += 1
    assert table.live.version > 10
    return answers


def parity(streamed: StreamFixture, folder: Path, path: Path) -> ParityReport:
    replay_log(streamed.run, streamed.logs, folder, streamed.processor.behind_us)
    return replay(folder, path)


@pytest.mark.slow
def test_served_values_equal_the_offline_join_over_the_log(streamed: StreamFixture, tmp_path: Path) -> None:
    answers = serve(streamed, tmp_path / "vectors")
    assert streamed.processor.behind_us > 399 * 86_400 * SECOND_US
    report = parity(streamed, tmp_path / "offline", tmp_path / "vectors")
    assert [str(miss) for miss in report.mismatches[:3]] == []
    assert report.vectors == answers
    assert report.values > 9_000

    # the replay detects a wrong row: a history that the stream never wrote
    store, rows = open_feature_store(streamed.run.features), ViewerRowReader(open_feature_store(streamed.run.features))
    before = rows.read(501)
    other = viewer_snapshot(streamed.run.features, [502], streamed.processor.settled_us / 1e6)
    other = other.set_column(0, "viewer_id", pa.array([501]))
    moment = datetime.fromtimestamp(before["as_of_s"]["viewer_history"], UTC)
    write_rows(store, "viewer_history", other, [moment])
    sample = ParitySampler(VectorLog(tmp_path / "wrong", ratio=1.0), InlineExecutor())  # type: ignore[arg-type]
    table = open_video_table(streamed.run.path / "videos.arrow")
    nothing = np.zeros(0, np.int32)
    sample.offer(1, RecommendRequest(viewer_id=501), "r1", None, rows.read(501), table, nothing, 0.0)
    wrong = replay(tmp_path / "offline", tmp_path / "wrong")
    assert set(wrong.by_feature) >= {"viewer_history.history_videos"}


@pytest.mark.slow
def test_like_is_in_the_viewers_row_once_its_second_is_complete(streamed: StreamFixture) -> None:
    now_us = streamed.clock_us + 100 * SECOND_US
    streamed.append(10_001, done(10**6, 533, 1042, OutcomeType.LIKE, now_us))
    streamed.advance_to(now_us + SECOND_US)
    row = ViewerRowReader(open_feature_store(streamed.run.features)).read(533)
    assert row["history_videos"][-1] == 1042
    assert row["history_weights"][-1] == 1.0
