"""Rows that a server reads from the stream's real stores equal the rows recomputed from the log; faults are named."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from tests.support.dimensions import DIMENSIONS
from tests.support.pipelines.served_stream import (
    FIRST_VIDEO,
    FIRST_VIEWER,
    HOUR_US,
    SECOND_US,
    VIEWERS,
    ServedStream,
    build_run,
    copied_run,
    event,
)
from tests.support.pipelines.stream_fixtures import catalogue

from reelway.pipelines.features import views
from reelway.pipelines.features.materialisation import materialise, materialised_at_s
from reelway.platform.contracts.events import OutcomeType
from reelway.platform.errors import ParityError
from reelway.platform.eventlog import StoredRecord
from reelway.platform.eventlog.arrow_records import encode_rows
from reelway.platform.eventlog.catalogue_events import VideoUpsert
from reelway.platform.eventlog.outcome_events import decode_outcomes
from reelway.platform.eventlog.topics import Topic
from reelway.platform.run_directory import RunDirectory
from reelway.platform.viewer_pseudonyms import viewer_pseudonym

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built_run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return build_run(tmp_path_factory.mktemp("built") / "run")


@pytest.fixture
def run(built_run: RunDirectory, tmp_path: Path) -> RunDirectory:
    return copied_run(built_run, tmp_path / "run")


def test_served_values_equal_the_values_recomputed_from_the_log(run: RunDirectory) -> None:
    streamed = ServedStream(run)
    served = streamed.serve(30)
    assert streamed.stream.behind_us > 399 * 24 * HOUR_US
    assert streamed.table.live.version > 10
    report = streamed.replay()
    assert [str(miss) for miss in report.mismatches[:3]] == []
    assert report.vectors == served
    assert report.values > 9_000


def test_row_that_is_not_due_yet_is_no_mismatch(run: RunDirectory) -> None:
    """The store is filled up to hours after the data set's last event. The stream's time begins there."""
    ended_s = materialised_at_s(run.features)
    assert ended_s is not None
    materialise(run.features, ended_s + 3 * 3600)
    streamed = ServedStream(run)
    new_viewer = 10**6
    streamed.append(*(event(9_000 + i, new_viewer, FIRST_VIDEO + i, None, streamed.clock_us) for i in range(8)))
    streamed.clock_us += 5 * SECOND_US
    assert streamed.stream.began_us >= round(ended_s * SECOND_US) + 3 * HOUR_US
    streamed.run_stream()
    streamed.overlay.poll()
    streamed.offer(new_viewer, np.arange(8, dtype=np.int32))
    assert streamed.rows.read(new_viewer)["impressions_1d"] is None
    report = streamed.replay()
    assert (report.vectors, [str(miss) for miss in report.mismatches[:3]]) == (1, [])


def test_features_before_the_first_change_are_those_of_the_release(run: RunDirectory) -> None:
    streamed = ServedStream(run)
    # The log's first event is of the video in row 1.
    others = np.flatnonzero(streamed.table.creator_id.base != streamed.table.creator_id.base[1])
    streamed.offer(FIRST_VIEWER, others.astype(np.int32))
    assert streamed.table.live.as_of_s is None
    report = streamed.replay()
    assert (report.vectors, [str(miss) for miss in report.mismatches[:3]]) == (1, [])


def test_replay_takes_only_new_vectors(run: RunDirectory) -> None:
    streamed = ServedStream(run)
    streamed.serve(9)
    assert streamed.replay().vectors == 9
    assert streamed.replay().vectors == 0
    streamed.restart_stream()
    streamed.serve(5)
    report = streamed.replay(vectors_at_once=2)
    assert (report.vectors, report.mismatch_count) == (5, 0)


def test_replay_needs_no_record_that_the_log_has_deleted(run: RunDirectory) -> None:
    streamed = ServedStream(run)
    streamed.serve(9)
    streamed.replay()
    streamed.clock_us += 8 * 24 * HOUR_US
    streamed.run_stream()
    assert streamed.logs[Topic.OUTCOMES].apply_retention() == 10
    streamed.serve(9)
    report = streamed.replay()
    assert (report.vectors, [str(miss) for miss in report.mismatches[:3]]) == (9, [])


def edited_ids(record: StoredRecord, added: int) -> StoredRecord:
    """Returns the record with other impressions."""
    table = decode_outcomes(record.payload)
    at = table.schema.get_field_index("impression_id")
    table = table.set_column(at, table.schema.field(at), pc.add(table["impression_id"], pa.scalar(added, pa.int64())))
    return record._replace(payload=encode_rows(table.combine_chunks().to_batches()[0]))


def test_lost_record_is_found(run: RunDirectory) -> None:
    def without_one(record: StoredRecord) -> Sequence[StoredRecord]:
        return [] if record.offset == 4 else [record]

    streamed = ServedStream(run, edit=without_one)
    streamed.serve(3 * VIEWERS)
    report = streamed.replay()
    viewer = viewer_pseudonym(FIRST_VIEWER + 3)  # offset 1 is record 0
    of_viewer = [miss for miss in report.mismatches if miss.entity == viewer]
    assert {miss.view for miss in of_viewer} >= {"viewer_activity", "viewer_history"}
    assert {miss.entity for miss in report.mismatches if miss.entity.startswith("viewer")} == {viewer}
    counts = [(miss.served, miss.offline) for miss in of_viewer if miss.feature == "impressions_1d"]
    assert counts
    assert all(served < offline for served, offline in counts)
    with pytest.raises(ParityError, match=rf"viewer_activity\.impressions_1d of {viewer_pseudonym(503)}"):
        report.raise_if_bad()


def test_lost_exposures_are_found(run: RunDirectory) -> None:
    def without_one(record: StoredRecord) -> Sequence[StoredRecord]:
        return [] if record.offset == 3 else [record]

    streamed = ServedStream(run, edit=without_one, edited=Topic.EXPOSURES)
    streamed.serve(2 * VIEWERS)
    report = streamed.replay()
    of_viewers = [miss for miss in report.mismatches if miss.entity.startswith("viewer")]
    assert {miss.entity for miss in of_viewers} == {
        viewer_pseudonym(FIRST_VIEWER + 3)
    }  # the first hour's viewer is 501
    assert {miss.view for miss in of_viewers} == {"viewer_activity"}, "a history has no impressions without outcomes"
    assert all(miss.served < miss.offline for miss in of_viewers if miss.feature == "impressions_1d")


def test_doubled_record_is_found(run: RunDirectory) -> None:
    def one_twice(record: StoredRecord) -> Sequence[StoredRecord]:
        return [record, edited_ids(record, 10**12)] if record.offset == 5 else [record]

    streamed = ServedStream(run, edit=one_twice)
    streamed.serve(2 * VIEWERS)
    report = streamed.replay()
    viewer = viewer_pseudonym(FIRST_VIEWER + 4)
    assert {miss.entity for miss in report.mismatches if miss.entity.startswith("viewer")} == {viewer}
    counts = [
        (miss.served, miss.offline) for miss in report.mismatches
        if (miss.view, miss.feature) == ("video_engagement", "video_impressions_30d")
    ]  # fmt: skip
    assert counts
    assert all(served > offline for served, offline in counts)


def test_wrong_window_is_found(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    shorter = tuple(
        dataclasses.replace(w, length_s=w.length_s // 2) if w.name == "24h" else w for w in views.names.VIDEO_WINDOWS
    )
    with monkeypatch.context() as patch:
        patch.setattr(views.names, "VIDEO_WINDOWS", shorter)
        streamed = ServedStream(run)
        streamed.serve(20)
    report = streamed.replay()
    assert {(miss.view, miss.feature[-4:]) for miss in report.mismatches} == {("video_engagement", "_24h")}
    assert all(miss.entity.startswith("video ") for miss in report.mismatches)


def test_late_row_is_found(run: RunDirectory) -> None:
    streamed = ServedStream(run)
    streamed.serve(VIEWERS)
    streamed.serve(2, stream_runs=False)
    streamed.clock_us += HOUR_US
    streamed.offer(FIRST_VIEWER + 1, np.zeros(0, np.int32))
    streamed.offer(FIRST_VIEWER + 2, np.arange(40, dtype=np.int32))
    report = streamed.replay()
    late = [miss for miss in report.mismatches if miss.feature == "as_of_s"]
    assert {miss.view for miss in late} >= {"viewer_history", "viewer_activity", "video_engagement"}
    assert {viewer_pseudonym(FIRST_VIEWER + 1), viewer_pseudonym(FIRST_VIEWER + 2)} <= {miss.entity for miss in late}
    assert all(miss.served < miss.offline for miss in late)
    assert len(late) == report.mismatch_count, "the values are those of the time that the rows state"


def test_short_pause_of_the_stream_is_no_mismatch(run: RunDirectory) -> None:
    streamed = ServedStream(run)
    streamed.serve(VIEWERS)
    streamed.append(event(1, FIRST_VIEWER, FIRST_VIDEO, OutcomeType.LIKE, streamed.clock_us))
    streamed.clock_us += 200 * SECOND_US
    streamed.offer(FIRST_VIEWER, np.arange(8, dtype=np.int32))
    streamed.run_stream()
    assert streamed.replay().mismatch_count == 0


def test_skewed_clock_is_found(run: RunDirectory) -> None:
    streamed = ServedStream(run, stream_ahead_us=2 * HOUR_US)
    streamed.serve(VIEWERS)
    report = streamed.replay()
    ahead = [miss for miss in report.mismatches if miss.feature == "as_of_s"]
    assert {miss.view for miss in ahead} >= {"viewer_activity", "video_engagement"}
    assert all(miss.served > miss.offline for miss in ahead)


def upload(video: int, **fields: object) -> VideoUpsert:
    """Returns the upload of a video of ``stream_fixtures.catalogue``, whose records state its properties."""
    known = next(row for row in catalogue().videos.to_pylist() if row["video_id"] == video)
    stated = {name: known[name] for name in ("video_id", "creator_id", "topic", "uploaded_at", "duration_ms")}
    return VideoUpsert.model_validate({**stated, "version": 1, "visual": [0.5] * DIMENSIONS.visual, **fields})


def test_uploads_and_updates_are_recomputed_from_their_topic(run: RunDirectory) -> None:
    streamed = ServedStream(run)
    streamed.serve(2)
    new = streamed.upload(upload(3))  # by a creator that the data set does not contain
    streamed.offer(FIRST_VIEWER, new)  # the stream's values follow
    changed = streamed.upload(upload(1, video_id=FIRST_VIDEO + 5, creator_id=7))
    rows = np.concatenate([new, changed])
    hours = 36  # a creator's row is due once a day
    for hour in range(hours):
        now_us = streamed.clock_us
        streamed.append(
            event(10**7 + 10 * hour, FIRST_VIEWER, 3, None, now_us),
            event(10**7 + 10 * hour, FIRST_VIEWER, 3, OutcomeType.FOLLOW, now_us),
            event(10**7 + 10 * hour + 1, FIRST_VIEWER, FIRST_VIDEO + 5, None, now_us),
        )
        streamed.serve(1)
        streamed.offer(FIRST_VIEWER, rows)
    live = streamed.table.live.at(rows.astype(np.int64))
    assert np.isfinite(live).all(), "both rows have live values"
    streamed.upload(upload(3, version=2, duration_ms=7_000))
    streamed.offer(FIRST_VIEWER, rows)  # a replica that has not yet read the new version
    report = streamed.replay()
    assert [str(miss) for miss in report.mismatches[:3]] == []
    assert report.vectors == 2 + 1 + 2 * hours + 1


def test_wrong_upload_is_found(run: RunDirectory) -> None:
    streamed = ServedStream(run)
    streamed.serve(1)
    row = streamed.upload(upload(1), served=upload(1, duration_ms=7_000))
    streamed.offer(FIRST_VIEWER, row)
    report = streamed.replay()
    assert [(miss.feature, miss.entity, miss.served, miss.offline) for miss in report.mismatches] == [
        ("duration_s", "video 1", 7.0, 20.0)
    ]


def test_upload_without_live_values_is_found_when_they_are_late(run: RunDirectory) -> None:
    streamed = ServedStream(run)
    streamed.serve(1)
    row = streamed.upload(upload(1, creator_id=0))
    streamed.clock_us += HOUR_US
    streamed.run_stream()
    streamed.offer(FIRST_VIEWER, row)  # the overlay was not polled
    assert "creator_statistics.creator_uploads" in streamed.replay().by_feature
