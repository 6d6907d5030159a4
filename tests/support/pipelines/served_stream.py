"""A run with its real stream and real stores, served as a router serves it, and its parity replay."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from tests.support.dimensions import DIMENSIONS
from tests.support.pipelines.event_tables import random_dataset
from tests.support.pipelines.stream_fixtures import LoggedEvent, append, open_logs
from tests.support.pipelines.view_files import write_views

from reelway.pipelines.features.materialisation import materialise, materialised_at_s
from reelway.pipelines.features.parity.comparison import ParityReport
from reelway.pipelines.features.parity.replay import ReplayOptions, replay
from reelway.pipelines.features.registry import register_features
from reelway.pipelines.features.stream.clock import StreamClock, write_stream_clock
from reelway.pipelines.features.stream.local_stream import LocalStream
from reelway.pipelines.features.stream.run_inputs import load_dataset, video_facts, view_settings, view_ttl_us
from reelway.pipelines.features.stream.sinks import FeatureSinks
from reelway.pipelines.features.stream.sqlite_store import SqliteStore
from reelway.pipelines.features.stream.uploads import upload_snapshot
from reelway.pipelines.features.training_rows import video_snapshot
from reelway.pipelines.features.views import ViewSettings
from reelway.pipelines.release_tables import video_columns, write_videos
from reelway.platform.atomic_files import write_json
from reelway.platform.contracts.api import RecommendRequest
from reelway.platform.contracts.events import OutcomeType
from reelway.platform.contracts.release_files import videos_schema
from reelway.platform.eventlog import EventLog, Offsets, ReadBatch, StoredRecord
from reelway.platform.eventlog.catalogue_events import VideoUpsert, as_record
from reelway.platform.eventlog.feature_changelog import FeatureChangelog
from reelway.platform.eventlog.sqlite_log import SqliteLog
from reelway.platform.eventlog.topics import Topic
from reelway.platform.features.assembly import assemble_videos, columns_from_table
from reelway.platform.features.feast_store import open_feature_store
from reelway.platform.features.vector_log import SampledVectors, VectorLog
from reelway.platform.features.viewer_rows import ViewerRowReader
from reelway.platform.run_directory import RunDirectory
from reelway.serving.live_overlay import FeatureOverlay
from reelway.serving.parity_sample import ParitySampler
from reelway.serving.video_table import open_video_table

SECOND_US = 1_000_000
HOUR_US = 3_600 * SECOND_US
DATASET_AGE_US = 4_000 * 24 * HOUR_US
"""Time since the end of the data set, whose end the stream's time continues from.

The clock is later than the machine's: a replay reads by the machine's clock, and the log's time never goes back.
"""
VIEWERS, FIRST_VIEWER, FIRST_VIDEO, VIDEOS = 7, 500, 1000, 60


class InlineExecutor:
    """Runs the work inline instead of in a thread."""

    def submit(self, work, *arguments):  # type: ignore[no-untyped-def]
        work(*arguments)


class EditedLog:
    """A log whose reader sees edited records, as a faulty stream would."""

    def __init__(self, log: EventLog, edit: Callable[[StoredRecord], Sequence[StoredRecord]]) -> None:
        self._log, self._edit = log, edit
        self.name, self.partitions, self.max_record_bytes = log.name, log.partitions, log.max_record_bytes

    def read(self, position: Offsets, *, limit: int, wait_s: float = 0.0) -> ReadBatch:
        batch = self._log.read(position, limit=limit, wait_s=wait_s)
        return replace(batch, records=[edited for record in batch.records for edited in self._edit(record)])

    def __getattr__(self, name: str):  # type: ignore[no-untyped-def]
        return getattr(self._log, name)


def build_run(folder: Path) -> RunDirectory:
    """Builds a run of a small random data set, registered and materialised."""
    run = RunDirectory(folder)
    _, until_us = write_views(run, random_dataset(), ViewSettings(DIMENSIONS))
    register_features(run.features, DIMENSIONS, "sqlite")
    materialise(run.features, until_us / 1e6)
    write_json(run.record_path("features"), {"config": {"views": asdict(ViewSettings(DIMENSIONS))}})
    return run


def copied_run(run: RunDirectory, folder: Path) -> RunDirectory:
    """Copies a built run."""
    shutil.copytree(run.path, folder)
    return RunDirectory(folder)


class ServedStream:
    """A run with its stream, as a server sees it. ``clock_us`` is the time of everything.

    Args:
        edit: what the stream sees of each record of ``edited``; by default the record.
        stream_ahead_us: how far the clock of the stream's process is ahead.
    """

    def __init__(
        self, run: RunDirectory, *, edit: Callable[[StoredRecord], Sequence[StoredRecord]] | None = None,
        edited: Topic = Topic.OUTCOMES, stream_ahead_us: int = 0, vectors: SampledVectors | None = None,
        outcomes_per_hour: int = 12,
    ) -> None:  # fmt: skip
        self.run, self.rng = run, np.random.default_rng(3)
        self.outcomes_per_hour, self.next_record = outcomes_per_hour, 0
        ended_s = materialised_at_s(run.features)
        assert ended_s is not None
        self.ended_s = ended_s
        self.clock_us = round(ended_s * SECOND_US) + DATASET_AGE_US
        self.logs = open_logs(run.events, lambda: self.clock_us / 1e6)
        seen: dict[Topic, EventLog] = {**open_logs(run.events, lambda: (self.clock_us + stream_ahead_us) / 1e6)}
        if edit is not None:
            seen[edited] = EditedLog(seen[edited], edit)  # type: ignore[assignment]
        self._stream_logs = seen
        self.catalogue = SqliteLog(run.events / f"{Topic.CATALOGUE}.db", clock=lambda: self.clock_us / 1e6)
        self.append(event(10**6, FIRST_VIEWER, FIRST_VIDEO + 1, OutcomeType.LIKE, self.clock_us))
        self.start_stream()
        self._open_release()
        self.vectors = vectors or VectorLog(run.path / "serving" / "vectors.jsonl", ratio=1.0)
        self._sample = ParitySampler(self.vectors, InlineExecutor())  # type: ignore[arg-type]

    def start_stream(self) -> None:
        """Starts the stream's process, which continues from its state."""
        self.state = SqliteStore(self.run.path / "stream" / "state.db")
        sinks = FeatureSinks(open_feature_store(self.run.features), FeatureChangelog(self.run.overlay))
        self.stream = LocalStream(
            self._stream_logs, self.state, sinks, view_settings(self.run), view_ttl_us(self.run),
            video_facts(self.run), clock=lambda: self.clock_us / 1e6,
        )  # fmt: skip
        self.stream.start(lambda: load_dataset(self.run))
        write_stream_clock(self.run, StreamClock(self.stream.began_us, self.stream.behind_us))

    def restart_stream(self) -> None:
        """Ends the process without a goodbye and starts another."""
        self.state.close()
        self.start_stream()

    def _open_release(self) -> None:
        snapshot = video_snapshot(self.run.features, self.ended_s)
        path = self.run.path / "videos.arrow"
        arrays = assemble_videos(columns_from_table(snapshot), np.zeros(snapshot.num_rows), DIMENSIONS)
        embeddings = np.eye(1, 4, dtype=np.float32).repeat(snapshot.num_rows, axis=0)
        write_videos(path, snapshot, arrays, embeddings, DIMENSIONS)
        self.table = open_video_table(path)
        self.overlay = FeatureOverlay(self.table, FeatureChangelog(self.run.overlay))
        self.rows = ViewerRowReader(open_feature_store(self.run.features))

    def append(self, *events: LoggedEvent) -> None:
        """Appends one record per topic, at the present time."""
        append(self.logs, events, self.next_record)
        self.next_record += 1

    def upload(self, upsert: VideoUpsert, *, served: VideoUpsert | None = None) -> np.ndarray:
        """Appends an upload or update to the log, and to the video table as the overlay does. Returns its row.

        Args:
            served: what the table gets instead of the upload.
        """
        self.catalogue.append([as_record(upsert, 1)])
        snapshot = upload_snapshot([served or upsert])
        videos = assemble_videos(columns_from_table(snapshot), np.zeros(1), DIMENSIONS)
        columns = video_columns(snapshot, videos, np.eye(1, 4, dtype=np.float32))
        row = len(self.table) + self.table.uploads.rows
        self.table.append_uploads(pa.Table.from_arrays(columns, schema=videos_schema(4)))
        return np.array([row], dtype=np.int32)

    def run_stream(self) -> None:
        """Processes what is in the log by now."""
        while (done := self.stream.run_micro_batch(wait_s=0)).records or done.steps:
            pass

    def serve(self, hours: int, *, slates: int = 1, slate: int = 8, stream_runs: bool = True) -> int:
        """Serves a viewer's slates some seconds after exposures and outcomes of the viewer.

        Each hour has another viewer. Some of the impressions have outcomes.

        Returns the number of slates.
        """
        for _ in range(hours):
            viewer = FIRST_VIEWER + self.next_record % VIEWERS
            now_us = self.clock_us + 2_700 * SECOND_US
            kinds = self.rng.choice(list(OutcomeType), self.outcomes_per_hour).tolist()
            videos = self.rng.integers(FIRST_VIDEO, FIRST_VIDEO + VIDEOS, self.outcomes_per_hour).tolist()
            first = 1_000 * self.next_record
            self.clock_us = now_us
            self.append(
                *(
                    event(first + i // 2, viewer, videos[i // 2], OutcomeType(kind), now_us, 9e3)
                    for i, kind in enumerate(kinds)
                ),
                *(
                    event(first + i, viewer, videos[i], None, now_us)
                    for i in (0, *range(self.outcomes_per_hour // 2, self.outcomes_per_hour))
                ),
            )
            self.clock_us = now_us + int(self.rng.integers(2, 9)) * SECOND_US
            if stream_runs:
                self.run_stream()
            self.overlay.poll()
            for _ in range(slates):
                rows = self.rng.integers(0, len(self.table), slate).astype(np.int32)
                self.offer(viewer, self.table.servable_rows(rows))  # an update of a video is a row of its own
        return hours * slates

    def offer(self, viewer: int, rows: np.ndarray) -> None:
        """Samples a slate of these rows of the video table."""
        now_s = self.clock_us / 1e6
        self._sample.offer(
            int(self.rng.integers(1 << 40)), RecommendRequest(viewer_id=viewer), "r1", None, self.rows.read(viewer),
            self.table, rows, now_s, now_s,
        )  # fmt: skip

    def replay(self, location: str | None = None, vectors: str | None = None, **options: float) -> ParityReport:
        """Replays what was served since the last replay, with the run and the vectors at a path or URL."""
        location = location or str(self.run.path)
        where = vectors or f"{location}/serving/vectors.jsonl"
        settings = ReplayOptions(vectors=where, events=str(self.run.events), **options)  # type: ignore[arg-type]
        return replay(location, settings, self.clock_us / 1e6)[0]


def event(
    impression: int, viewer: int, video: int, kind: OutcomeType | None, at_us: int, value: float = 1.0
) -> LoggedEvent:
    """An exposure or outcome that is appended at ``at_us``, nine seconds after its impression."""
    return LoggedEvent(10**9 + impression, viewer, video, kind, value, at_us - 9 * SECOND_US, at_us)
