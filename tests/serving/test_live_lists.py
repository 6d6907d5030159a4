"""Live lists in place of those of the release: mapping, order, age, versions, the follower's end."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import numpy as np
import pytest
from tests.support.release_files import NOW_S, make_release_folder

from reelway.platform.contracts.api import RequestContext
from reelway.platform.errors import DataError
from reelway.platform.eventlog.live_lists_file import LISTS_FILE, MAX_AGE_S, LiveListsFile, LiveListsSnapshot, RankedIds
from reelway.serving import live_lists
from reelway.serving.live_lists import CurrentLists, ListFollower, start_list_follower
from reelway.serving.popular import open_popular_lists
from reelway.serving.release_loader import ReleaseLoader
from reelway.serving.slates import reason_text
from reelway.serving.stages.list_source import ListSource
from reelway.serving.stages.sources import SourceQuery
from reelway.serving.video_table import VideoTable
from reelway.serving.viewer_query import viewer_query

RELEASE = "ab" * 32


class Clock:
    now_s = NOW_S

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_release_folder(tmp_path / "release", videos=60)
    return tmp_path / "release"


@pytest.fixture
def table(folder: Path) -> VideoTable:
    return ReleaseLoader(folder).table()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lists(folder: Path, table: VideoTable, clock: Clock) -> CurrentLists:
    return CurrentLists(open_popular_lists(folder, table), clock)


def write(overlay: Path, table: VideoTable, as_of_s: float, **rows: list[int]) -> None:
    """Writes lists by rows; row -1 is a video that the release lacks. ``trending_region_eu`` names a region's list."""
    named = {name.replace("_", ":", 1).replace("_", "=", 1): of_list for name, of_list in rows.items()}
    LiveListsFile(overlay).write(
        LiveListsSnapshot(
            int(as_of_s * 1e6),
            {
                name: RankedIds(
                    np.array([table.video_id[row] if row >= 0 else 7 for row in of_list], np.int64),
                    np.linspace(9, 1, len(of_list), dtype=np.float32),
                )
                for name, of_list in named.items()
            },
        )
    )


def proposed(lists: CurrentLists, table: VideoTable, kind: str, region: str | None, language: str | None) -> list[int]:
    query = viewer_query({}, RequestContext(region=region, language=language), NOW_S, table, seed=0)
    source = ListSource(lists, kind)
    return source.propose(SourceQuery(query, np.zeros((1, 16), np.float32), 100)).rows.tolist()


def test_sources_propose_the_live_lists(lists: CurrentLists, table: VideoTable, tmp_path: Path) -> None:
    write(
        tmp_path, table, NOW_S, popular=[5, -1, 6], trending=[1, 2], trending_region_eu=[3], trending_language_de=[4, 2]
    )
    follower = ListFollower(lists, table, tmp_path, RELEASE)
    assert follower.poll()
    assert not follower.poll()
    assert proposed(lists, table, "trending", "eu", "de") == [3, 4, 2, 1, 2]
    assert proposed(lists, table, "trending", "us", "de") == [4, 2, 1, 2]
    assert proposed(lists, table, "trending", None, None) == [1, 2]
    popular = proposed(lists, table, "popular", None, None)
    of_release = [row for row in lists.of_release.popular.tolist() if row not in (5, 6)]
    assert popular == [5, 6, *of_release]


def test_later_file_replaces_the_lists(lists: CurrentLists, table: VideoTable, tmp_path: Path) -> None:
    follower = ListFollower(lists, table, tmp_path, RELEASE)
    write(tmp_path, table, NOW_S, popular=[5], trending=[1])
    follower.poll()
    before = lists.current()
    write(tmp_path, table, NOW_S + 1, popular=[5], trending=[2])
    assert follower.poll()
    assert before.by_kind["trending"].of_all.tolist() == [1]
    assert lists.current().by_kind["trending"].of_all.tolist() == [2]


def test_stale_lists_give_way_to_those_of_the_release(
    lists: CurrentLists, table: VideoTable, clock: Clock, tmp_path: Path
) -> None:
    follower = ListFollower(lists, table, tmp_path, "cd" * 32)
    follower.poll()
    assert lists.current() is lists.of_release
    write(tmp_path, table, NOW_S, popular=[5], trending=[1])
    follower.poll()
    assert lists.current() is not lists.of_release
    clock.now_s += MAX_AGE_S + 1
    assert lists.current() is lists.of_release
    follower.poll()
    follower.poll()
    write(tmp_path, table, clock.now_s, popular=[5], trending=[1])
    follower.poll()
    assert lists.current() is not lists.of_release

    def fallbacks(kind: str) -> float | None:
        name = "reelway_retrieval_lists_fallbacks_total"
        return live_lists._REGISTRY.get_sample_value(name, {"release": "cd" * 6, "kind": kind})

    assert fallbacks("missing") == 1
    assert fallbacks("stale") == 1


def test_malformed_file_leaves_the_lists(lists: CurrentLists, table: VideoTable, tmp_path: Path) -> None:
    follower = ListFollower(lists, table, tmp_path, RELEASE)
    write(tmp_path, table, NOW_S, popular=[5], trending=[1])
    follower.poll()
    (tmp_path / LISTS_FILE).write_bytes(b"not Arrow")
    with pytest.raises(DataError, match="lists"):
        follower.poll()
    assert lists.current().by_kind["trending"].of_all.tolist() == [1]


def test_reason_names_the_region_of_a_live_list(lists: CurrentLists, table: VideoTable, tmp_path: Path) -> None:
    write(tmp_path, table, NOW_S, popular=[5], trending=[1, 2], trending_region_eu=[3])
    ListFollower(lists, table, tmp_path, RELEASE).poll()
    assert reason_text("trending", 3, None, "eu", lists.current()) == "rising in eu"
    assert reason_text("trending", 1, None, "eu", lists.current()) == "rising now"


def test_follower_ends_when_its_release_is_closed(folder: Path, tmp_path: Path) -> None:
    loader = ReleaseLoader(folder)
    table = loader.table()
    lists = CurrentLists(open_popular_lists(folder, table))
    thread = start_list_follower(lists, table, str(tmp_path), RELEASE, every_s=0.01)
    write(tmp_path, table, time.time(), popular=[5], trending=[1])
    deadline = time.monotonic() + 10
    while lists.current() is lists.of_release and time.monotonic() < deadline:
        time.sleep(0.01)
    assert lists.current().by_kind["trending"].of_all.tolist() == [1]
    del lists
    gc.collect()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_follower_goes_on_after_an_unexpected_error(
    lists: CurrentLists, table: VideoTable, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: LiveListsFile) -> LiveListsSnapshot:
        raise ValueError("not JSON")

    def metric(name: str) -> float:
        return live_lists._REGISTRY.get_sample_value(f"reelway_retrieval_lists_{name}", {"release": "ef" * 6}) or 0.0

    write(tmp_path, table, NOW_S, popular=[5], trending=[1])
    monkeypatch.setattr(LiveListsFile, "read", broken)
    thread = start_list_follower(lists, table, str(tmp_path), "ef" * 32, every_s=0.01)
    clock.now_s += 30
    deadline = time.monotonic() + 20
    while metric("faults_total") < 3 or metric("age_seconds") != 30:
        assert time.monotonic() < deadline
        assert thread.is_alive()
        time.sleep(0.01)
    monkeypatch.undo()
    while lists.current() is lists.of_release:
        assert time.monotonic() < deadline
        assert thread.is_alive()
        time.sleep(0.01)
    assert lists.current().by_kind["trending"].of_all.tolist() == [1]


def test_loader_with_an_overlay_serves_live_lists(folder: Path, table: VideoTable, tmp_path: Path) -> None:
    write(tmp_path / "overlay", table, time.time(), popular=[5], trending=[1])
    lists = ReleaseLoader(folder, overlay=str(tmp_path / "overlay")).lists()
    deadline = time.monotonic() + 10
    while lists.current() is lists.of_release and time.monotonic() < deadline:
        time.sleep(0.01)
    assert lists.current().popular[0] == 5
