"""The sources by creator on a small release: order, exclusions, unknown viewers, the opened file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tests.support.release_files import NOW_S, make_release_folder, write_arrow

from reelway.platform.contracts.api import RecommendRequest, RequestContext
from reelway.platform.contracts.manifest import CREATORS_FILE
from reelway.platform.errors import IncompatibleReleaseError
from reelway.platform.features.viewer_memory_local import LocalViewerMemory
from reelway.platform.tokens import TokenSigner
from reelway.serving.in_process import InProcessRecommender
from reelway.serving.release_loader import ReleaseLoader
from reelway.serving.stages.arrays import ViewerQuery
from reelway.serving.stages.creator_sources import (
    CreatorVideos,
    FollowedCreatorsSource,
    SimilarCreatorsSource,
    open_creator_videos,
)
from reelway.serving.stages.sources import NeighbourSource, SourceQuery
from reelway.serving.video_table import VideoTable
from reelway.serving.viewer_query import viewer_query

EMBEDDING = np.zeros((1, 16), np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("release")
    make_release_folder(path, videos=120)
    return path


@pytest.fixture(scope="module")
def table(folder: Path) -> VideoTable:
    return ReleaseLoader(folder).table()


@pytest.fixture(scope="module")
def creators(folder: Path, table: VideoTable) -> CreatorVideos:
    return open_creator_videos(folder, table)


def viewer(table: VideoTable, liked: list[int], followed: list[int], now_s: float = NOW_S) -> ViewerQuery:
    row = {
        "history_videos": table.video_id[liked].tolist(),
        "history_weights": [1.0] * len(liked),
        "history_times_s": [NOW_S - 60.0 * (len(liked) - i) for i in range(len(liked))],
    }
    query = viewer_query(row, RequestContext(), now_s, table, seed=0)
    return replace(query, followed_creators=np.array(followed, dtype=np.int64))


def test_followed_creators_are_proposed_in_turn_latest_follow_first(table: VideoTable, creators: CreatorVideos) -> None:
    followed = [2, 5, 99_999]
    rows = FollowedCreatorsSource(creators).propose(SourceQuery(viewer(table, [], followed), EMBEDDING, 100)).rows
    newest = {c: max(np.flatnonzero(table.creator_id.base == c), key=lambda r: table.uploaded_at_s[r]) for c in (2, 5)}
    first, second = sorted((2, 5), key=lambda c: -table.uploaded_at_s[newest[c]])
    assert table.creator_id[rows[:4]].tolist() == [first, second, first, second]
    assert rows[:2].tolist() == [newest[first], newest[second]]
    assert set(table.creator_id[rows].tolist()) == {5, 2}
    limited = FollowedCreatorsSource(creators).propose(SourceQuery(viewer(table, [], followed), EMBEDDING, 3))
    assert limited.rows.tolist() == rows[:3].tolist()


def test_future_uploads_are_not_proposed(table: VideoTable, creators: CreatorVideos) -> None:
    now_s = float(np.median(table.uploaded_at_s))
    query = SourceQuery(viewer(table, [], list(range(15)), now_s), EMBEDDING, 1000)
    rows = FollowedCreatorsSource(creators).propose(query).rows
    assert len(rows) > 0
    assert (table.uploaded_at_s[rows] <= now_s).all()


def test_similar_creators_leave_out_liked_and_followed_creators(table: VideoTable, creators: CreatorVideos) -> None:
    liked = [int(np.flatnonzero(table.creator_id.base == creator)[0]) for creator in (3, 7)]
    query = SourceQuery(viewer(table, liked, [8]), EMBEDDING, 1000)
    rows = SimilarCreatorsSource(creators).propose(query).rows
    proposed = table.creator_id[rows]
    # The fixture's similar creators are the following ones. Creator 7 is the latest liked one; 8 is followed.
    assert proposed[:3].tolist() == [4, 9, 5]
    assert not set(proposed.tolist()) & {3, 7, 8}


def test_unknown_viewers_get_no_proposals(table: VideoTable, creators: CreatorVideos) -> None:
    query = SourceQuery(viewer(table, [], []), EMBEDDING, 100)
    assert len(FollowedCreatorsSource(creators).propose(query).rows) == 0
    assert len(SimilarCreatorsSource(creators).propose(query).rows) == 0
    strangers = SourceQuery(viewer(table, [], [10**9]), EMBEDDING, 100)
    assert len(FollowedCreatorsSource(creators).propose(strangers).rows) == 0


def test_neighbour_source_ignores_videos_after_the_release(table: VideoTable) -> None:
    neighbours = np.full((10, 20), -1, dtype=np.int32)
    neighbours[4, :2] = (1, 2)
    query = replace(viewer(table, [4], []), history_rows=np.array([4, 500], np.int32), history_weights=np.ones(2))
    assert NeighbourSource(neighbours).propose(SourceQuery(query, EMBEDDING, 9)).rows.tolist() == [1, 2]


def test_creators_of_another_release_are_rejected(tmp_path: Path) -> None:
    make_release_folder(tmp_path, videos=60)
    other = pa.ipc.open_file(tmp_path / CREATORS_FILE).read_all()
    write_arrow(tmp_path / CREATORS_FILE, other.slice(1))
    with pytest.raises(IncompatibleReleaseError, match="creators differ"):
        open_creator_videos(tmp_path, ReleaseLoader(tmp_path).table())


def test_slate_shows_videos_of_followed_creators(folder: Path) -> None:
    memory = LocalViewerMemory(lambda: NOW_S)
    signer = TokenSigner(b"0" * 32)
    recommender = InProcessRecommender(
        ReleaseLoader(folder).router_release(), ReleaseLoader(folder).stages(), signer, memory=memory
    )
    request = RecommendRequest(viewer_id=7, count=20)

    def followed_videos() -> set[int]:
        videos = recommender.recommend(request, {}, NOW_S).videos
        return {video.creator_id for video in videos if video.reason == "from a creator you follow"}

    assert followed_videos() == set()
    memory.follow(7, [11])
    assert followed_videos() == {11}
