"""Sources and retrieval on a small release: proposals, filters and counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.release_files import NOW_S, make_release_folder

from reelway.platform.contracts.api import RequestContext
from reelway.platform.contracts.blend import Blend, RetrievalSettings
from reelway.platform.errors import IncompatibleReleaseError, ServingError
from reelway.serving.live_lists import CurrentLists
from reelway.serving.popular import ListRows, PopularLists, open_popular_lists
from reelway.serving.release_loader import ReleaseLoader
from reelway.serving.stages.arrays import SOURCE_CODES, SOURCES, ViewerQuery
from reelway.serving.stages.list_source import ListSource
from reelway.serving.stages.retrieval import Retrieval
from reelway.serving.stages.sources import FreshSource, NeighbourSource, SourceQuery
from reelway.serving.video_table import VideoTable
from reelway.serving.viewer_query import viewer_query

VIDEOS = 200
CANDIDATES = 40
EMBEDDING = np.zeros((1, 16), dtype=np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("release")
    make_release_folder(path, videos=VIDEOS, blend=Blend(retrieval=RetrievalSettings(candidates=CANDIDATES)))
    return path


@pytest.fixture(scope="module")
def retrieval(folder: Path) -> Retrieval:
    return ReleaseLoader(folder).retrieval()


@pytest.fixture(scope="module")
def table(folder: Path) -> VideoTable:
    return ReleaseLoader(folder).table()


@pytest.fixture(scope="module")
def lists(folder: Path, table: VideoTable) -> PopularLists:
    return open_popular_lists(folder, table)


def viewer(table: VideoTable, watched: dict[int, float], region: str | None = None) -> ViewerQuery:
    """Returns a viewer who watched the rows with these weights, one per hour, the last one now."""
    row = {
        "region": region,
        "history_videos": table.video_id[list(watched)].tolist(),
        "history_weights": list(watched.values()),
        "history_times_s": [NOW_S - 3600.0 * (len(watched) - i) for i in range(len(watched))],
    }
    return viewer_query(row, RequestContext(), NOW_S, table, seed=1)


@given(st.dictionaries(st.integers(0, VIDEOS - 1), st.sampled_from([-2.0, -0.5, 1.0, 3.0]), max_size=50))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_candidates_are_unseen_distinct_and_complete(
    retrieval: Retrieval, table: VideoTable, watched: dict[int, float]
) -> None:
    candidates = retrieval.retrieve(viewer(table, watched))
    rows = candidates.rows.tolist()
    assert not set(rows) & set(watched)
    assert len(set(rows)) == len(rows) == CANDIDATES
    exact = table.embedding[candidates.rows] @ candidates.viewer_embedding[0]
    np.testing.assert_allclose(candidates.similarity, exact, atol=1e-5)


def test_each_source_fills_its_quota(retrieval: Retrieval, table: VideoTable) -> None:
    candidates = retrieval.retrieve(viewer(table, dict.fromkeys(range(0, 60, 3), 1.0)))
    counts = {SOURCES[code]: int(n) for code, n in enumerate(np.bincount(candidates.source, minlength=len(SOURCES)))}
    quotas = {"fresh": 2, "trending": 6, "similar_creators": 2, "content": 4, "neighbours": 4, "popular": 4, "ann": 16}
    # Nobody is followed; the next source in the order of the quotas takes these two places.
    assert counts == {**quotas, "followed_creators": 0, "fresh": 4}


def test_followed_creators_fill_their_quota(retrieval: Retrieval, table: VideoTable) -> None:
    query = replace(viewer(table, {3: 1.0}), followed_creators=table.creator_id[[50, 60]])
    candidates = retrieval.retrieve(query)
    followed = candidates.rows[candidates.source == SOURCE_CODES["followed_creators"]]
    assert len(followed) == 2
    assert set(table.creator_id[followed].tolist()) == set(table.creator_id[[50, 60]].tolist())


def test_viewer_without_history_gets_all_candidates(retrieval: Retrieval, table: VideoTable) -> None:
    candidates = retrieval.retrieve(viewer(table, {}))
    assert len(candidates) == CANDIDATES
    assert SOURCE_CODES["neighbours"] not in candidates.source.tolist()


def test_filtered_proposals_are_counted_by_kind(retrieval: Retrieval, table: VideoTable, lists: PopularLists) -> None:
    first, second = lists.popular[:2].tolist()  # proposed to all viewers
    left = retrieval.retrieve(viewer(table, {first: 2.0, second: -2.0})).filtered_counts
    assert left["seen"] >= 1
    assert left["not_interested"] >= 1
    assert left["duplicate"] > 0
    assert left["over_quota"] > 0
    assert left["unservable"] == 0


def test_index_returns_the_nearest_videos_first(retrieval: Retrieval, table: VideoTable) -> None:
    candidates = retrieval.retrieve(viewer(table, {10: 3.0}))
    by_index = np.flatnonzero(candidates.source == SOURCE_CODES["ann"])
    exact = table.embedding.base @ candidates.viewer_embedding[0]
    exact[10] = -np.inf
    exact[candidates.rows[candidates.source != SOURCE_CODES["ann"]]] = -np.inf  # an earlier source took them
    assert candidates.rows[by_index].tolist() == np.argsort(-exact)[: len(by_index)].tolist()
    np.testing.assert_allclose(candidates.similarity[by_index], exact[candidates.rows[by_index]], atol=1e-5)


def test_fresh_source_returns_the_newest_past_uploads(table: VideoTable) -> None:
    now_s = float(np.median(table.uploaded_at_s))
    query = viewer_query({}, RequestContext(), now_s, table, seed=0)
    rows = FreshSource(table, fresh_hours=48).propose(SourceQuery(query, EMBEDDING, 1000)).rows
    age_s = now_s - table.uploaded_at_s.base
    expected = np.flatnonzero((age_s >= 0) & (age_s <= 48 * 3600))
    assert sorted(rows.tolist()) == expected.tolist()
    assert (np.diff(age_s[rows]) >= 0).all()
    assert len(FreshSource(table, 48).propose(SourceQuery(query, EMBEDDING, 3)).rows) == 3


def test_neighbours_follow_the_latest_liked_videos(table: VideoTable) -> None:
    neighbours = np.full((VIDEOS, 20), -1, dtype=np.int32)
    neighbours[1, :2], neighbours[2, :2], neighbours[3, :2] = (11, 12), (21, 22), (31, 32)
    query = viewer(table, {1: 1.0, 2: -2.0, 3: 1.0})
    proposal = NeighbourSource(neighbours).propose(SourceQuery(query, EMBEDDING, 10))
    assert proposal.rows.tolist() == [31, 11, 32, 12]
    assert proposal.trigger_rows is not None
    assert proposal.trigger_rows.tolist() == [3, 1, 3, 1]


def test_trending_starts_with_the_region_of_the_viewer(table: VideoTable) -> None:
    global_rows, local = np.array([1, 2], dtype=np.int32), np.array([9], dtype=np.int32)
    lists = PopularLists(ListRows(global_rows), ListRows(global_rows, {"eu": local}), table)
    source = ListSource(CurrentLists(lists), "trending")
    assert source.propose(SourceQuery(viewer(table, {}, "eu"), EMBEDDING, 5)).rows.tolist() == [9, 1, 2]
    assert source.propose(SourceQuery(viewer(table, {}, "mars"), EMBEDDING, 5)).rows.tolist() == [1, 2]
    assert source.propose(SourceQuery(viewer(table, {}), EMBEDDING, 1)).rows.tolist() == [1]


def test_popular_fallback_leaves_out_seen_videos(lists: PopularLists, table: VideoTable) -> None:
    top = lists.popular[:3].tolist()
    candidates = lists.candidates(viewer(table, {top[0]: 1.0, top[2]: -1.0}))
    assert candidates.rows.tolist() == [row for row in lists.popular.tolist() if row not in (top[0], top[2])]
    assert (candidates.source == SOURCE_CODES["popular"]).all()
    assert {kind: n for kind, n in candidates.filtered_counts.items() if n} == {"not_interested": 1, "seen": 1}


def test_quota_of_an_unknown_source_raises(retrieval: Retrieval) -> None:
    with pytest.raises(ServingError, match="fresh"):
        Retrieval(
            retrieval._tower,
            {"ann": retrieval._sources[0]},
            RetrievalSettings(quotas={"ann": 0.5, "fresh": 0.5}),
            retrieval._table,
        )


def test_index_of_another_size_raises(tmp_path: Path) -> None:
    make_release_folder(tmp_path / "a", videos=VIDEOS)
    make_release_folder(tmp_path / "b", videos=VIDEOS - 1)
    (tmp_path / "b" / "index.faiss").replace(tmp_path / "a" / "index.faiss")
    with pytest.raises(IncompatibleReleaseError, match="199"):
        ReleaseLoader(tmp_path / "a").retrieval()
