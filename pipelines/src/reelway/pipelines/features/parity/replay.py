"""The parity replay: takes the vectors that were not yet replayed, recomputes their rows and compares them.

For each vector the replay uses the time that each served row states. A row that states a later time than the request,
or that was replaced long before the request, is a mismatch of the view's ``as_of_s``. Vectors are replayed some at a
time, and the position is recorded after each time, so memory is bounded and a killed replay continues.
"""

# Shapes: Q rows of several vectors

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reelway.pipelines.features import views
from reelway.pipelines.features.labels import times_us
from reelway.pipelines.features.parity.comparison import (
    TOLERANCE,
    Mismatch,
    ParityReport,
    compare_row,
    is_missing,
    same_value,
)
from reelway.pipelines.features.parity.event_copy import PARTS, EventCopy
from reelway.pipelines.features.parity.impression_versions import Versions, dataset_versions, log_versions
from reelway.pipelines.features.parity.progress import ReplayProgress
from reelway.pipelines.features.parity.run_files import RunFiles, RunTables, label_batches, read_run_tables
from reelway.pipelines.features.parity.upload_copy import UploadVersion, copy_uploads, read_uploads
from reelway.pipelines.features.parity.view_rows import (
    CREATORS,
    ENGAGEMENT,
    NO_ROW_US,
    ViewEvents,
    ViewRule,
    collect_events,
    creator_rule,
    last_row_us,
    recompute_rows,
    view_rules,
)
from reelway.pipelines.features.windows import I64
from reelway.platform.contracts.feature_names import VIDEO_LIVE_DENSE, VIEWER_VIEWS, VIEWS
from reelway.platform.eventlog import EventLog
from reelway.platform.eventlog.topics import Topic, open_topic
from reelway.platform.features.on_demand import hours_since_upload
from reelway.platform.features.vector_log import ServedVector
from reelway.platform.features.vector_reader import VectorReader
from reelway.platform.features.viewer_rows import AS_OF
from reelway.platform.viewer_pseudonyms import viewer_pseudonym

log = logging.getLogger(__name__)

PROFILE: Final = "viewer_profile"
CONTENT: Final = "video_content"
FEATURES_OF_CONTENT: Final = ("visual", "audio", "text")
VIEWER_TOPICS: Final = (Topic.EXPOSURES, Topic.OUTCOMES)


@dataclass(frozen=True)
class ReplayOptions:
    """What a replay reads and how it judges.

    ``late_after_s``: seconds after which a row of the stream must be served. ``clock_skew_s``: seconds by which a row's
    time may be after the request's.
    """

    vectors: str
    events: str | None = None
    """Address of the event log; None if there is none."""
    tolerance: float = TOLERANCE
    late_after_s: float = 300.0
    clock_skew_s: float = 5.0
    vectors_at_once: int = 250


def replay(run: str, options: ReplayOptions, checked_at: float) -> tuple[ParityReport, ReplayProgress]:
    """Replays the vectors that are new since the last replay, and records the position and the findings.

    Args:
        run: path or URL of the run directory.
        checked_at: Unix seconds, for the findings.

    Returns:
        The report of this replay, and the progress with the findings of the last day.

    Raises:
        FeatureError: if the run has no features.
        MalformedFileError: if the vector log is damaged.
        StorageError: if the event log or a file cannot be read or written.
    """
    files = RunFiles(run)
    progress = ReplayProgress.read(files)
    report = ParityReport(tolerance=options.tolerance)
    reader = VectorReader(options.vectors, progress.vectors)
    vectors = reader.vectors()
    some = list(islice(vectors, options.vectors_at_once))
    if some:
        tables = read_run_tables(files)
        rows = _Recomputation(files, tables, options)
        while some:
            # The rows of these vectors depend on records that were in the log before the vectors were.
            rows.copy_records(progress)
            part = ParityReport(tolerance=options.tolerance)
            rows.compare(part, some)
            progress.vectors = dict(reader.position)
            progress.add_findings(part, checked_at)
            progress.write(files)
            _merge(report, part)
            some = list(islice(vectors, options.vectors_at_once))
    if reader.delete_old_segments(checked_at):
        progress.vectors = dict(reader.position)
        progress.write(files)
    return report, progress


def _merge(total: ParityReport, part: ParityReport) -> None:
    total.vectors += part.vectors
    total.values += part.values
    total.rows += part.rows
    counted = total.by_feature + part.by_feature, total.differing + part.differing
    for mismatch in part.mismatches:
        total.add(mismatch)
    total.by_feature, total.differing = counted


class _Recomputation:
    """Recomputes and compares the rows of some vectors at a time."""

    def __init__(self, files: RunFiles, tables: RunTables, options: ReplayOptions) -> None:
        self._files, self._tables, self._options = files, tables, options
        self._copies = {topic: EventCopy(files, topic) for topic in VIEWER_TOPICS if options.events and tables.clock}
        self._uploads = read_uploads(files)
        self._rules = view_rules(tables.settings, dict(tables.ttl_us))
        self._rules[CREATORS] = creator_rule(tables.settings, tables.videos, tables.creators)
        self._profiles = views.viewer_profile(tables.viewers)
        self._contents = views.video_content(tables.videos)

    def copy_records(self, progress: ReplayProgress) -> None:
        """Copies the new records of the event log, and records how far."""
        if self._options.events is None:
            return
        for topic, copy in self._copies.items():
            with closing(open_topic(self._options.events, topic)) as events:
                self._copy_topic(progress, topic, copy, events)
        before = progress.offsets.get(Topic.CATALOGUE, {})
        with closing(open_topic(self._options.events, Topic.CATALOGUE)) as events:
            offsets = copy_uploads(self._files, events, before)
        if offsets != before:
            progress.offsets[Topic.CATALOGUE] = dict(offsets)
            progress.write(self._files)
            self._uploads = read_uploads(self._files)

    def _copy_topic(self, progress: ReplayProgress, topic: Topic, copy: EventCopy, events: EventLog) -> None:
        offsets, newest_us = progress.offsets.get(topic, {}), progress.newest_us.get(topic, {})
        for step in copy.copy_new(events, offsets, newest_us, progress.next_file):
            progress.offsets[topic], progress.newest_us[topic], progress.next_file = step
            progress.write(self._files)
        copy.join_files(progress.next_file)

    def compare(self, report: ParityReport, vectors: list[ServedVector]) -> None:
        """Compares all values of the vectors."""
        report.vectors += len(vectors)
        for vector in vectors:
            report.rows[vector.release] += 1 + len(vector.videos)
        viewer = np.array([vector.viewer_id for vector in vectors], dtype=np.int64)
        owner = np.array([i for i, vector in enumerate(vectors) for _ in vector.videos], dtype=np.int64)
        video = np.array([row["video_id"] for vector in vectors for row in vector.videos], dtype=np.int64)
        events = self._events(np.unique(viewer), np.unique(video))
        limit_us, late_us = self._request_limits(vectors)
        for view in VIEWER_VIEWS:
            at_us = np.array([self._viewer_time_us(vector, view) for vector in vectors], dtype=np.int64)
            rows = self._viewer_rows(view, events, viewer, at_us).to_pylist()
            for vector, offline in zip(vectors, rows, strict=True):
                compare_row(
                    report, view, VIEWS[view], viewer_pseudonym(vector.viewer_id), vector, vector.viewer, offline
                )
            if view in self._rules:
                entity = [viewer_pseudonym(one) for one in viewer.tolist()]
                self._check_times(report, view, events, vectors, viewer, at_us, limit_us, late_us, entity)
        if len(owner):
            self._compare_videos(report, events, vectors, owner, video, limit_us, late_us)

    def _compare_videos(
        self, report: ParityReport, events: dict[str, ViewEvents], vectors: list[ServedVector], owner: I64, video: I64,
        limit_us: I64, late_us: I64,
    ) -> None:  # fmt: skip
        served = [row for vector in vectors for row in vector.videos]
        time_us = np.array([self._videos_time_us(vector) for vector in vectors], np.int64)
        at_us = time_us[owner]
        known = _fields_at(self._contents, "video_id", CONTENT, video, at_us).to_pylist()
        for i, one in enumerate(served):
            known[i] |= self._served_version(one, known[i], vectors[owner[i]])
        creator = np.array([-1 if one["creator_id"] is None else one["creator_id"] for one in known], dtype=np.int64)
        engagement = self._recomputed(ENGAGEMENT, events, video, at_us).to_pylist()
        statistics = self._recomputed(CREATORS, events, creator, at_us).to_pylist()
        for i, one in enumerate(served):
            vector, offline = vectors[owner[i]], known[i] | engagement[i] | statistics[i]
            without_live = self._may_lack_live_values(one, vector)
            for view, name, value in _video_values(offline, vector.request_time_s):
                if name in one and not (without_live and view in (ENGAGEMENT, CREATORS)):
                    report.compare(view, name, f"video {one['video_id']}", vector, one[name], value)
        entity = [f"video {one}" for one in video.tolist()]
        owners = [vectors[i] for i in owner.tolist()]
        if self._tables.clock:  # the release's own features are from before the stream
            unstated = np.array([vector.videos_as_of_s is None for vector in owners])
            at_us = np.where(unstated, np.minimum(at_us, self._tables.clock.began_us), at_us)
        self._check_times(report, ENGAGEMENT, events, owners, video, at_us, limit_us[owner], late_us[owner], entity)

    def _served_version(
        self, served: Mapping[str, Any], of_dataset: dict[str, Any], vector: ServedVector
    ) -> dict[str, Any]:
        """Returns the content of the version that was served: the newest that equals the row, else the newest.

        A replica may serve an earlier version for some time, so each version that the log contained is accepted.
        """
        known = [version.content for version in self._versions_until(served["video_id"], vector)]
        known += [of_dataset] if of_dataset["creator_id"] is not None or not known else []
        equal = (content for content in known if _has_content(served, content, self._options.tolerance))
        return next(equal, known[0])

    def _versions_until(self, video_id: int, vector: ServedVector) -> list[UploadVersion]:
        """Returns the versions of a video that were in the log when the vector was served."""
        served_us = _us(vector.request_time_s if vector.served_at_s is None else vector.served_at_s)
        until_us = served_us + _us(self._options.clock_skew_s)
        return [version for version in self._uploads.versions_of(video_id) if version.append_us <= until_us]

    def _may_lack_live_values(self, served: Mapping[str, Any], vector: ServedVector) -> bool:
        """Returns whether a row is a new upload's, which gets the stream's values some moments after it is served."""
        if any(not is_missing(served[name]) for name in VIDEO_LIVE_DENSE if name in served):
            return False
        versions = self._versions_until(served["video_id"], vector)
        if not versions or self._tables.clock is None:
            return bool(versions)
        served_us = _us(vector.request_time_s if vector.served_at_s is None else vector.served_at_s)
        return versions[0].append_us >= served_us - _us(self._options.late_after_s)

    def _check_times(
        self, report: ParityReport, view: str, events: dict[str, ViewEvents], vectors: list[ServedVector], ids: I64,
        at_us: I64, limit_us: I64, late_us: I64, entity: list[str],
    ) -> None:  # fmt: skip
        """Counts rows that state a time after the request, and rows that were replaced long before it."""
        clock = self._tables.clock
        if clock is None:
            return
        ahead = at_us > limit_us
        rows = np.flatnonzero(late_us > at_us)
        newest_us = np.full(len(ids), NO_ROW_US, dtype=np.int64)
        newest_us[rows] = last_row_us(self._rules[view], events[view], self._tables.settings, ids[rows], late_us[rows])
        # Rows up to the first watermark are those of the data set.
        late = (newest_us > at_us) & (newest_us > clock.began_us)
        for i in np.flatnonzero(ahead | late).tolist():
            expected = newest_us[i] if late[i] else limit_us[i]
            vector = vectors[i]
            report.add(
                Mismatch(view, AS_OF, entity[i], vector.request_id, at_us[i] / 1e6, expected / 1e6, vector.release)
            )

    def _request_limits(self, vectors: list[ServedVector]) -> tuple[I64, I64]:
        """Returns for each vector the latest time that its rows may state, and the time until which rows must be there.

        Both in the stream's time, and without effect if the vector does not state when it was served.
        """
        behind_us = self._tables.clock.behind_us if self._tables.clock else 0
        served_us = np.array([-1 if v.served_at_s is None else _us(v.served_at_s) for v in vectors], dtype=np.int64)
        known = served_us >= 0
        limit_us = served_us - behind_us + _us(self._options.clock_skew_s)
        late_us = served_us - behind_us - _us(self._options.late_after_s)
        return np.where(known, limit_us, -NO_ROW_US), np.where(known, late_us, NO_ROW_US)

    def _viewer_time_us(self, vector: ServedVector, view: str) -> int:
        """Returns the time of the row that was served. Without a row, only the data set's events must be in it.

        The store is filled up to a time that can be after the data set's last event, where the stream's time begins.
        ``_check_times`` finds rows of the stream that are missing for long.
        """
        stated = vector.viewer.get(AS_OF, {}).get(view)
        choices = (vector.viewer_as_of_s, stated, self._tables.materialised_at_s, vector.request_time_s)
        time_us = _us(next(choice for choice in choices if choice is not None))
        is_known = vector.viewer_as_of_s is not None or stated is not None
        return time_us if is_known or self._tables.clock is None else min(time_us, self._tables.clock.began_us)

    def _videos_time_us(self, vector: ServedVector) -> int:
        """Returns the time that the videos' features describe. Before the first change, they are the release's own."""
        if vector.videos_as_of_s is not None:
            return _us(vector.videos_as_of_s)
        built_s = self._tables.materialised_at_s if self._tables.clock else None
        return _us(vector.request_time_s if built_s is None else min(built_s, vector.request_time_s))

    def _viewer_rows(self, view: str, events: dict[str, ViewEvents], viewer: I64, at_us: I64) -> pa.Table:
        if view == PROFILE:
            return _fields_at(self._profiles, "viewer_id", PROFILE, viewer, at_us)
        return self._recomputed(view, events, viewer, at_us)

    def _recomputed(self, view: str, events: dict[str, ViewEvents], ids: I64, at_us: I64) -> pa.Table:
        rule = self._rules[view]
        return recompute_rows(rule, events[view], self._tables.settings, self._tables, ids, at_us).values

    def _events(self, viewers: I64, videos: I64) -> dict[str, ViewEvents]:
        row = self._tables.video_rows(videos)
        of_dataset = self._tables.videos["creator_id"].to_numpy()[row[row >= 0]]
        creators = np.union1d(of_dataset, self._uploads.creators_of(videos))
        entities = {"viewer_id": viewers, "video_id": videos, "creator_id": creators}
        wanted: list[tuple[ViewRule, I64]] = [(rule, entities[rule.key]) for rule in self._rules.values()]
        return collect_events(wanted, self._versions(viewers, videos, creators))

    def _versions(self, viewers: I64, videos: I64, creators: I64) -> Iterator[Versions]:
        """Yields everything known about these entities, some at a time."""
        ids = {"viewer_id": pa.array(viewers), "video_id": pa.array(videos), "creator_id": pa.array(creators)}
        for labels in label_batches(self._files):
            for batch in labels.to_batches():
                yield dataset_versions(pa.Table.from_batches([batch.filter(pa.array(_of(batch, ids)))]))
        if self._tables.clock is None:
            return
        known_creator = self._tables.videos["creator_id"].to_numpy()
        uploads = self._tables.videos["video_id"].to_numpy()[np.isin(known_creator, creators)]
        ids["video_id"] = pa.array(np.union1d(videos, uploads))  # a record need not name its video's creator
        for part in range(PARTS):
            rows = [copy.read_part(part, lambda batch: _of(batch, ids)) for copy in self._copies.values()]
            if rows and any(table.num_rows for table in rows):
                yield log_versions(pa.concat_tables(rows).combine_chunks(), self._tables, self._tables.clock)


def _of(batch: pa.RecordBatch, ids: dict[str, pa.Array]) -> NDArray[np.bool_]:
    found = [pc.is_in(batch[name], values).to_numpy(zero_copy_only=False) for name, values in ids.items()]
    return np.asarray(np.logical_or.reduce(found), dtype=np.bool_)


def _fields_at(rows: pa.Table, key: str, view: str, ids: I64, at_us: I64) -> pa.Table:
    """Returns the fields of a view with one row per entity, null before the row's time."""
    order = np.argsort(rows[key].to_numpy(), kind="stable")
    known, since_us = rows[key].to_numpy()[order], times_us(rows["event_timestamp"])[order]
    if not len(known):
        return rows.select(VIEWS[view]).take(pa.array(ids, mask=np.ones(len(ids), dtype=np.bool_)))
    place = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    valid = (known[place] == ids) & (since_us[place] <= at_us)
    return rows.select(VIEWS[view]).take(pa.array(order[place], mask=~valid))


def _has_content(served: Mapping[str, Any], content: dict[str, Any], tolerance: float) -> bool:
    values = content | {f"has_{name}": float(content[name] is not None) for name in FEATURES_OF_CONTENT}
    return all(same_value(served[name], value, tolerance) for name, value in values.items() if name in served)


def _video_values(offline: dict[str, Any], request_time_s: float) -> Iterator[tuple[str, str, Any]]:
    for view in (CONTENT, ENGAGEMENT, CREATORS):
        for name in VIEWS[view]:
            yield view, name, offline[name]
    for name in FEATURES_OF_CONTENT:
        yield CONTENT, f"has_{name}", float(offline[name] is not None)
    uploaded_s = offline["uploaded_at_s"]
    age = None
    if uploaded_s is not None:
        age = float(hours_since_upload(np.array([request_time_s]), np.array([uploaded_s]))[0])
    yield "request_context", "hours_since_upload", age


def _us(seconds: float) -> int:
    return round(seconds * 1e6)
