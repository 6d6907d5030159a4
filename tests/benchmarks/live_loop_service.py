"""The arms of the live loop: the request path of one release in this process, with and without the live parts.

The parts are the product's classes under a simulated clock. Feast's online store, the event log, the stream's state and
the overlay are files in the arm's own copy of the run.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from prometheus_client import CollectorRegistry

from reelway.pipelines.features.follows import restore_follows
from reelway.pipelines.features.labels import times_us
from reelway.pipelines.features.stream.list_writer import ListWriter
from reelway.pipelines.features.stream.local_stream import LocalStream
from reelway.pipelines.features.stream.overlay_writer import OverlayOptions, OverlayWriter, OverlayWriterMetrics
from reelway.pipelines.features.stream.run_inputs import load_dataset, video_facts, view_settings, view_ttl_us
from reelway.pipelines.features.stream.sinks import FeatureSinks
from reelway.pipelines.features.stream.sqlite_store import SqliteStore
from reelway.pipelines.simulation.live_viewers import ShownSlate
from reelway.pipelines.simulation.world import World
from reelway.platform.contracts.api import RecommendRequest, ReportedOutcome, RequestContext
from reelway.platform.contracts.blend import MAX_SHOWN_HOURS
from reelway.platform.contracts.events import OutcomeType
from reelway.platform.contracts.ids import ReleaseId
from reelway.platform.eventlog.catalogue_events import VideoUpsert
from reelway.platform.eventlog.catalogue_log import CataloguePublisher
from reelway.platform.eventlog.exposure_events import encode_exposures
from reelway.platform.eventlog.feature_changelog import FeatureChangelog
from reelway.platform.eventlog.outcome_events import encode_outcomes
from reelway.platform.eventlog.topics import Topic, open_topic
from reelway.platform.eventlog.upload_overlay import OverlayRequests, UploadChangelog
from reelway.platform.features.feast_store import open_feature_store
from reelway.platform.features.viewer_memory import NO_MEMORY
from reelway.platform.features.viewer_memory_local import LocalViewerMemory
from reelway.platform.features.viewer_rows import ViewerRowReader
from reelway.platform.release.store import ReleaseStore
from reelway.platform.run_directory import RunDirectory
from reelway.platform.tokens import TokenSigner
from reelway.serving.live_lists import ListFollower
from reelway.serving.live_overlay import FeatureOverlay, UploadOverlay
from reelway.serving.metrics import IngressMetrics
from reelway.serving.outcomes.event_log_writer import logged_outcomes
from reelway.serving.outcomes.exposures import SlateExposure, exposure_rows
from reelway.serving.outcomes.memory_writer import memory_update
from reelway.serving.outcomes.reported import OutcomeColumns, read_outcomes
from reelway.serving.release_loader import ReleaseLoader
from reelway.serving.request_path import PathCall, RequestPath, run_without_waiting
from reelway.serving.slates import sign_tokens

LISTS_INTERVAL_S: Final = 300.0
"""Simulated time between two lists: one bucket of their windows."""
SLATE: Final = 10
_FIRST_IMPRESSION, _IMPRESSIONS_PER_REQUEST = 1 << 40, 1 << 8
"""Ids of impressions begin after those of the log."""


class Part(StrEnum):
    """A part of the live arm that can be left out."""

    VIEWER_ROWS = "viewer rows"
    VIDEO_ROWS = "video rows"
    UPLOADS = "uploads"
    LISTS = "lists"


@dataclass
class SimulatedClock:
    """Unix seconds of the simulated world."""

    now_s: float

    def __call__(self) -> float:
        return self.now_s


class LoopService:
    """One release behind its request path. Without ``memory`` nothing is remembered, without ``live`` nothing changes.

    Args:
        read_row: returns the row of a viewer.
    """

    def __init__(
        self,
        loader: ReleaseLoader,
        read_row: Callable[[int], Mapping[str, Any]],
        clock: SimulatedClock,
        memory: LocalViewerMemory | None = None,
        live: LiveParts | None = None,
    ) -> None:
        self._signer = TokenSigner(b"a secret of the benchmark")
        metrics = IngressMetrics(CollectorRegistry())
        self._path = RequestPath(loader.router_release(), loader.stages(), self._signer, metrics)
        self.read_row, self._clock, self._memory, self._live = read_row, clock, memory, live
        self._exposures: list[SlateExposure] = []

    def advance(self, now_s: float) -> None:
        """See ``Service.advance``."""
        self._clock.now_s = now_s
        if self._live:
            self._live.advance()

    def recommend(self, viewer_id: int, device: str, now_s: float, request_id: int) -> ShownSlate:
        """Returns a slate and remembers it, as the router does."""
        memory = self._memory.read(viewer_id) if self._memory else NO_MEMORY
        request = RecommendRequest(viewer_id=viewer_id, count=SLATE, context=RequestContext(device=device))
        call = PathCall(request, self.read_row(viewer_id), now_s, request_id, memory=memory)
        result = run_without_waiting(self._path.run(call))
        if result.exposure is None or result.degraded:
            raise RuntimeError(f"viewer {viewer_id}: the slate is degraded: {result.degraded}")
        # ids that do not differ between runs, in the order of the positions
        first = _FIRST_IMPRESSION + request_id * _IMPRESSIONS_PER_REQUEST
        exposure = replace(result.exposure, impression_id=first + np.arange(len(result.slate), dtype=np.int64))
        if self._memory:
            self._memory.remember_shown(viewer_id, exposure.video_id, now_s)
        self._exposures.append(exposure)
        return ShownSlate(viewer_id, exposure.video_id.tolist(), sign_tokens(exposure, self._signer))

    def report(self, outcomes: Sequence[dict[str, Any]], now_s: float) -> None:
        """Updates the viewers' memories and appends exposures and outcomes to the log, as the router does."""
        self._clock.now_s = now_s
        columns, refused = read_outcomes([ReportedOutcome(**outcome) for outcome in outcomes], self._signer)
        if refused:
            raise RuntimeError(f"{len(refused)} outcomes were refused: {refused[0].message}")
        if self._memory and len(columns):
            memory_update(columns, now_s).apply(self._memory)
        if self._live:
            self._live.append(self._exposures, columns)
        self._exposures = []


class LiveParts:
    """The stream, the overlay writer, the list task and their followers in the replica, as one thread of a clock.

    Args:
        run: the arm's own copy of the run.
        parts: those that are on.
    """

    def __init__(
        self, run: RunDirectory, release: str, loader: ReleaseLoader, world: World, clock: SimulatedClock,
        parts: Collection[Part],
    ) -> None:  # fmt: skip
        self._world, self._clock, self._release, self._parts = world, clock, release, frozenset(parts)
        self._stack = ExitStack()
        self._logs = {
            topic: self._stack.enter_context(closing(open_topic(run.events, topic, clock)))
            for topic in (Topic.EXPOSURES, Topic.OUTCOMES)
        }
        self._stream = self._open_stream(run)
        self.table = table = loader.table()
        overlay = str(run.overlay)
        self._features = FeatureOverlay(table, FeatureChangelog(overlay))
        self._uploads = UploadOverlay(table, UploadChangelog(overlay, release, table.embedding.shape[1]))
        self._publisher = self._stack.enter_context(closing(CataloguePublisher(run.events)))
        self._requests = OverlayRequests(overlay)
        options = OverlayOptions(
            str(run.events), overlay, str(run.release_store), run.path / "cache", run.keys, run.path / "lists.npz"
        )
        metrics = OverlayWriterMetrics(CollectorRegistry())
        self._overlay_writer = self._stack.enter_context(closing(OverlayWriter(options, metrics, clock)))
        self._videos = world.all_videos_table().sort_by("video_id")
        self._published = world.config.videos
        lists = ListWriter(run.events, overlay, options.lists_state, CollectorRegistry(), clock=clock, log_clock=clock)
        self._lists = self._stack.enter_context(closing(lists))
        self.lists = loader.lists()
        self._list_follower = ListFollower(self.lists, table, overlay, release)
        self._next_lists_s = clock()

    def advance(self) -> None:
        """Brings rows, uploads and lists to the clock's time."""
        if self._stream:
            while (done := self._stream.run_micro_batch(wait_s=0)).records or done.steps:
                pass
        if Part.UPLOADS in self._parts:
            self._take_in_uploads()
        if Part.VIDEO_ROWS in self._parts:
            self._features.poll()
        if Part.LISTS in self._parts and self._clock() >= self._next_lists_s:
            self._next_lists_s = self._clock() + LISTS_INTERVAL_S
            self._lists.poll()
            self._list_follower.poll()

    def append(self, exposures: Sequence[SlateExposure], outcomes: OutcomeColumns) -> None:
        """Appends what was shown and done to the log, at the clock's time."""
        log = self._logs[Topic.EXPOSURES]
        log.append(list(encode_exposures(exposure_rows(exposures), log.partitions, log.max_record_bytes)))
        if len(outcomes):
            log = self._logs[Topic.OUTCOMES]
            batch = logged_outcomes([outcomes], round(self._clock() * 1e6))
            log.append(list(encode_outcomes(batch, log.partitions, log.max_record_bytes)))

    def close(self) -> None:
        self._stack.close()

    def _open_stream(self, run: RunDirectory) -> LocalStream | None:
        if not self._parts & {Part.VIEWER_ROWS, Part.VIDEO_ROWS}:
            return None
        store = self._stack.enter_context(closing(SqliteStore(run.path / "stream" / "state.db")))
        sinks = FeatureSinks(open_feature_store(run.features), FeatureChangelog(run.overlay))
        stream = LocalStream(
            self._logs, store, sinks, view_settings(run), view_ttl_us(run), video_facts(run), clock=self._clock
        )
        stream.start(lambda: load_dataset(run))
        return stream

    def _take_in_uploads(self) -> None:
        """Publishes the videos uploaded by now, and appends their rows to the video table."""
        available = len(self._world.available_videos(self._clock()))
        if available <= self._published:
            return
        rows = self._videos.slice(self._published, available - self._published).to_pylist()
        self._publisher.publish([VideoUpsert(**row) for row in rows])
        self._published = available
        self._requests.request(self._release, self._clock())
        while self._overlay_writer.step():
            pass
        appended = self._uploads.poll()
        if appended != len(rows):
            raise RuntimeError(f"{len(rows)} videos were uploaded, but {appended} rows appended")


@dataclass(frozen=True)
class LoopRelease:
    """The run of the loop and its release; ``folder`` holds the arms' files."""

    run: RunDirectory
    release: str  # id
    world: World
    folder: Path

    def frozen(self, *, memory: bool) -> LoopService:
        """Opens an arm whose rows, lists and videos stay those of the release."""
        clock = SimulatedClock(self.world.end_s)
        return LoopService(self._loader(clock), self._frozen_rows(), clock, self._memory(clock) if memory else None)

    def live(self, name: str, parts: Collection[Part]) -> tuple[LoopService, LiveParts]:
        """Opens an arm with the viewers' memory and these live parts."""
        clock = SimulatedClock(self.world.end_s)
        run = self._copied_run(name)
        loader = self._loader(clock)
        live = LiveParts(run, self.release, loader, self.world, clock, parts)
        reader = ViewerRowReader(open_feature_store(run.features))
        read_row = reader.read if Part.VIEWER_ROWS in parts else self._frozen_rows()
        return LoopService(loader, read_row, clock, self._memory(clock), live), live

    def _loader(self, clock: SimulatedClock) -> ReleaseLoader:
        folder = ReleaseStore(str(self.run.release_store)).fetch(ReleaseId(self.release), self.folder / "cache")
        return ReleaseLoader(folder, clock=clock)

    def _frozen_rows(self) -> Callable[[int], Mapping[str, Any]]:
        return cache(ViewerRowReader(open_feature_store(self.run.features)).read)

    def _memory(self, clock: SimulatedClock) -> LocalViewerMemory:
        """Returns the memory that a service of the log's days would have at their end."""
        memory = LocalViewerMemory(clock)
        end_us = round(self.world.end_s * 1e6)
        impressions = pq.read_table(
            self.run.dataset / "impressions.parquet", columns=["viewer_id", "video_id", "event_time"]
        )
        recent = impressions.filter(times_us(impressions["event_time"]) >= end_us - MAX_SHOWN_HOURS * 3600 * 10**6)
        shown = zip(recent["viewer_id"].to_pylist(), recent["video_id"].to_pylist(),
                    (times_us(recent["event_time"]) / 1e6).tolist(), strict=True)  # fmt: skip
        for viewer, video, time_s in shown:
            memory.remember_shown(viewer, [video], time_s)
        outcomes = pq.read_table(self.run.dataset / "outcomes.parquet")
        watch = outcomes.filter(pc.equal(outcomes["type"].cast("string"), OutcomeType.WATCH.value))
        video = watch["video_id"].to_numpy()
        ended = watch["value"].to_numpy() >= self.world.videos.duration_ms[video - 1]
        at_s = times_us(watch["event_time"])[ended] / 1e6
        memory.remember_watched(watch["viewer_id"].to_numpy()[ended], video[ended], at_s)
        restore_follows(memory, self.run.features, self.world.end_s)
        return memory

    def _copied_run(self, name: str) -> RunDirectory:
        copy = RunDirectory(self.folder / name)
        shutil.rmtree(copy.path, ignore_errors=True)
        shutil.copytree(self.run.path, copy.path)
        return copy
