"""The overlay of a video table: newest rows of videos and creators, one version per poll of the changelog."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from tests.support.release_files import make_release_folder
from tests.support.serving.feature_changes import change, rows_of

from reelway.platform.contracts.feature_names import VIDEO_LIVE_DENSE
from reelway.platform.contracts.manifest import VIDEOS_FILE
from reelway.platform.errors import DataError
from reelway.platform.eventlog.feature_changelog import (
    CREATORS,
    ENGAGEMENT,
    FIELDS,
    FeatureChangelog,
)
from reelway.serving.live_overlay import FeatureOverlay, OverlayFollower, start_follower
from reelway.serving.metrics import OverlayMetrics
from reelway.serving.video_table import VideoTable, open_video_table

LIKES = VIDEO_LIVE_DENSE.index("video_like_rate_1h")
FOLLOWERS = VIDEO_LIVE_DENSE.index("creator_followers")


@pytest.fixture
def table(tmp_path: Path) -> VideoTable:
    make_release_folder(tmp_path / "release", videos=60)
    return open_video_table(tmp_path / "release" / VIDEOS_FILE)


def test_change_updates_only_the_rows_it_names(table: VideoTable, tmp_path: Path) -> None:
    log, before = FeatureChangelog(tmp_path / "overlay"), table.live.at(np.arange(len(table)))
    creator = int(table.creator_id[7])
    creator_rows = np.flatnonzero(table.creator_id.base == creator)
    video = int(table.video_id[3])
    log.append(change(1, rows_of(ENGAGEMENT, {video: 0.25, 999_999: 1.0}), rows_of(CREATORS, {creator: 77.0})))
    overlay = FeatureOverlay(table, log)
    assert overlay.poll() == len({3, *creator_rows.tolist()})
    after = table.live.at(np.arange(len(table)))
    assert after[3, LIKES] == 0.25
    assert (after[creator_rows, FOLLOWERS] == 77.0).all()
    engagement, statistics = ([VIDEO_LIVE_DENSE.index(n) for n in FIELDS[view]] for view in (ENGAGEMENT, CREATORS))
    expected = before.copy()
    expected[3, engagement] = 0.25
    expected[np.ix_(creator_rows, statistics)] = 77.0
    np.testing.assert_array_equal(after, expected)
    assert table.live.as_of_s == 1.0
    assert overlay.poll() == 0


def test_changes_of_one_poll_become_one_version(table: VideoTable, tmp_path: Path) -> None:
    log = FeatureChangelog(tmp_path / "overlay")
    ids = table.video_id.base.tolist()
    for sequence in (1, 2, 3):
        log.append(change(sequence, rows_of(ENGAGEMENT, {ids[sequence]: sequence / 8, ids[0]: sequence / 4})))
    overlay = FeatureOverlay(table, log)
    overlay.poll()
    assert table.live.version == 1
    assert table.live.at(np.arange(4))[:, LIKES].tolist() == [0.75, 0.125, 0.25, 0.375]
    assert (overlay.sequence, table.live.as_of_s) == (3, 3.0)


def test_expired_row_becomes_unknown(table: VideoTable, tmp_path: Path) -> None:
    log = FeatureChangelog(tmp_path / "overlay")
    log.append(change(1, rows_of(ENGAGEMENT, {int(table.video_id[3]): None})))
    FeatureOverlay(table, log).poll()
    assert np.isnan(table.live.at(np.array([3]))[0, LIKES])


def test_snapshot_replaces_its_changes_for_all_readers(table: VideoTable, tmp_path: Path) -> None:
    log = FeatureChangelog(tmp_path / "overlay")
    ids = table.video_id.base.tolist()
    log.append(change(1, rows_of(ENGAGEMENT, {ids[1]: 0.5})))
    old = FeatureOverlay(table, log)
    old.poll()
    for sequence in range(2, 6):
        log.append(change(sequence, rows_of(ENGAGEMENT, {ids[sequence % 2]: sequence / 16})))
    assert log.compact(at_least=5)
    assert not log.compact(at_least=1)
    assert [path.name for path in (tmp_path / "overlay").iterdir()] == ["snapshot-00000000000000000005.arrow"]
    log.append(change(6, rows_of(ENGAGEMENT, {ids[2]: 0.0625})))
    make_release_folder(tmp_path / "other", videos=60)
    other = open_video_table(tmp_path / "other" / VIDEOS_FILE)
    new = FeatureOverlay(other, log)
    for reader, its in ((old, table), (new, other)):
        reader.poll()
        assert its.live.at(np.arange(3))[:, LIKES].tolist() == [0.25, 0.3125, 0.0625]
        assert reader.sequence == 6


def test_malformed_change_raises(table: VideoTable, tmp_path: Path) -> None:
    overlay = FeatureOverlay(table, FeatureChangelog(tmp_path / "overlay"))
    assert overlay.poll() == 0
    (tmp_path / "overlay").mkdir()
    (tmp_path / "overlay" / "00000000000000000001.arrow").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="not an Arrow file"):
        overlay.poll()
    assert table.live.version == 0


def test_changelog_url_reads_like_a_folder(table: VideoTable) -> None:
    log = FeatureChangelog("memory://overlay-test/changes")
    for sequence in (1, 2):
        log.append(change(sequence, rows_of(ENGAGEMENT, {int(table.video_id[3]): sequence / 4})))
    overlay = FeatureOverlay(table, log)
    overlay.poll()
    assert table.live.at(np.array([3]))[0, LIKES] == 0.5
    assert log.compact(at_least=2)
    assert [one.is_snapshot for one in log.changes_after(0)] == [True]


def test_follower_ends_with_its_table(table: VideoTable, tmp_path: Path) -> None:
    other = open_video_table(tmp_path / "release" / VIDEOS_FILE)
    thread = start_follower(other, str(tmp_path / "overlay"), "release", every_s=0.01)
    FeatureChangelog(tmp_path / "overlay").append(change(1, rows_of(ENGAGEMENT, {int(table.video_id[3]): 0.5})))
    deadline = time.monotonic() + 20
    while other.live.version == 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert other.live.at(np.array([3]))[0, LIKES] == 0.5
    del other
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()


def test_follower_goes_on_after_an_unexpected_error(
    table: VideoTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = CollectorRegistry()
    follower = OverlayFollower(table, str(tmp_path / "overlay"), "release", OverlayMetrics(registry, "release"))

    def broken() -> int:
        raise ValueError("the table is full")

    def metric(name: str) -> float:
        return registry.get_sample_value(f"reelway_overlay_{name}", {"release": "release"}) or 0.0

    monkeypatch.setattr(follower._uploads, "poll", broken)
    threading.Thread(target=follower.follow, args=(0.01,), daemon=True).start()
    deadline = time.monotonic() + 20
    while metric("faults_total") < 3 or metric("age_seconds") < 0.05:
        assert time.monotonic() < deadline, "the follower has ended"
        time.sleep(0.01)
    monkeypatch.undo()
    FeatureChangelog(tmp_path / "overlay").append(change(1, rows_of(ENGAGEMENT, {int(table.video_id[3]): 0.5})))
    while table.live.version == 0:
        assert time.monotonic() < deadline, "the follower has ended"
        time.sleep(0.01)
