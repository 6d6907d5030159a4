"""The viewer's memory in retrieval and in the popular list: what is left out, and how a short slate is completed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.release_files import NOW_S, make_release_folder

from reelway.platform.contracts.api import RequestContext
from reelway.platform.contracts.blend import Blend, RetrievalSettings
from reelway.platform.features.viewer_memory import ViewerMemoryState
from reelway.platform.features.watched_filter import (
    add_to_filter,
    as_filter,
    bit_positions,
    generation_at,
    is_watched,
)
from reelway.serving.popular import PopularLists, open_popular_lists
from reelway.serving.release_loader import ReleaseLoader
from reelway.serving.stages.arrays import Exclusions, ViewerQuery
from reelway.serving.stages.exclusion import SearchableRows, completing_rows
from reelway.serving.stages.retrieval import Retrieval
from reelway.serving.stages.sources import AnnSource, SourceQuery
from reelway.serving.video_table import VideoTable
from reelway.serving.viewer_query import exclusions_of, viewer_query

VIDEOS = 200
CANDIDATES = 40
COUNT = 20
POLICY = RetrievalSettings(candidates=CANDIDATES)
HOUR_S = 3_600.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("release")
    make_release_folder(path, videos=VIDEOS, blend=Blend(retrieval=POLICY))
    return path


@pytest.fixture(scope="module")
def loader(folder: Path) -> ReleaseLoader:
    return ReleaseLoader(folder)


@pytest.fixture(scope="module")
def retrieval(loader: ReleaseLoader) -> Retrieval:
    return loader.retrieval()


@pytest.fixture(scope="module")
def table(loader: ReleaseLoader) -> VideoTable:
    return loader.table()


@pytest.fixture(scope="module")
def lists(folder: Path, table: VideoTable) -> PopularLists:
    return open_popular_lists(folder, table)


def filter_of(ids: Any) -> Any:
    return as_filter(add_to_filter(b"", bit_positions(np.asarray(ids))))[None]


def memory(
    table: VideoTable,
    shown: list[int] = [],  # noqa: B006
    *,
    watched: list[int] = [],  # noqa: B006
    creators: list[int] = [],  # noqa: B006
    topics: list[int] = [],  # noqa: B006
    apart_s: float = 1.0,
) -> ViewerMemoryState:
    """Returns a memory of these rows, the last one shown now and each ``apart_s`` seconds before the next."""
    return ViewerMemoryState(
        shown_ids=table.video_id[shown],
        shown_at_s=NOW_S - apart_s * np.arange(len(shown))[::-1],
        watched=filter_of(table.video_id[watched]) if watched else np.empty((0, 2048), np.uint8),
        watched_generations=np.full(int(bool(watched)), generation_at(NOW_S)),
        blocked_creators=np.array(sorted(creators), np.int64),
        blocked_topics=np.array(sorted(topics), np.int64),
    )


def query(table: VideoTable, state: ViewerMemoryState, row: dict[str, Any] | None = None) -> ViewerQuery:
    exclusions = exclusions_of(state, POLICY, NOW_S, table)
    return viewer_query(row or {}, RequestContext(), NOW_S, table, 3, exclusions, COUNT)


ROWS = st.lists(st.integers(0, VIDEOS - 1), max_size=VIDEOS, unique=True)


@given(ROWS, st.lists(st.integers(0, VIDEOS - 1), max_size=30, unique=True), st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_candidates_follow_the_memory(
    retrieval: Retrieval, table: VideoTable, shown: list[int], watched: list[int], data: st.DataObject
) -> None:
    creators = data.draw(st.lists(st.sampled_from(np.unique(table.creator_id).tolist()), max_size=3, unique=True))
    topics = data.draw(st.lists(st.sampled_from(np.unique(table.topic).tolist()), max_size=1))
    candidates = retrieval.retrieve(
        query(table, memory(table, shown, watched=watched, creators=creators, topics=topics))
    )
    rows = candidates.rows.tolist()
    blocked = np.isin(table.creator_id, creators) | np.isin(table.topic, topics)
    unseen = set(np.flatnonzero(~blocked & (table.uploaded_at_s.base <= NOW_S)).tolist()) - set(shown) - set(watched)
    if watched:  # a Bloom filter may report a few more
        unseen -= set(np.flatnonzero(is_watched(filter_of(table.video_id[watched]), table.video_id.base)).tolist())
    assert len(set(rows)) == len(rows)
    assert not blocked[rows].any()
    if len(unseen) >= COUNT:
        assert not set(rows) & (set(shown) | set(watched))
        assert len(rows) >= COUNT
    else:
        assert set(rows) >= unseen  # never shown first
        assert len(rows) >= min(COUNT, int((~blocked & (table.uploaded_at_s.base <= NOW_S)).sum()))


def test_slate_is_completed_in_the_written_order(table: VideoTable) -> None:
    """All rows were shown; two were watched, one is in the history, one disliked, and one creator is blocked."""
    order = np.random.default_rng(5).permutation(VIDEOS).tolist()
    creator = int(table.creator_id[order[2]])
    state = memory(table, order, watched=[order[0], order[1]], creators=[creator])
    row = {
        "history_videos": table.video_id[[order[3], order[4]]].tolist(),
        "history_weights": [1.0, -2.0],
        "history_times_s": [NOW_S, NOW_S],
    }
    last = [row for row in (order[0], order[1], order[3]) if table.creator_id[row] != creator]
    full = query(table, state, row)
    allowed = [
        row for row in order
        if row not in (*last, order[4]) and table.creator_id[row] != creator
        and not is_watched(full.exclusions.watched, table.video_id[[row]])[0]
    ]  # fmt: skip
    nothing = np.empty(0, np.int32)
    assert completing_rows(nothing, full, table).tolist() == allowed[:COUNT]
    every = ViewerQuery(
        full.arrays, full.history_rows, full.history_weights, None, NOW_S, 3, full.exclusions, count=VIDEOS
    )
    completed = completing_rows(nothing, every, table).tolist()
    assert completed[: len(allowed)] == allowed
    assert set(last) <= set(completed[len(allowed) :])
    assert order[4] not in completed
    assert creator not in table.creator_id[completed]


def test_video_shown_twice_counts_from_the_last_time(table: VideoTable) -> None:
    state = memory(table, [*range(VIDEOS), 0, 1])
    rows = completing_rows(np.empty(0, np.int32), query(table, state), table).tolist()
    assert rows == list(range(2, 2 + COUNT))


def test_popular_list_obeys_the_memory(lists: PopularLists, table: VideoTable) -> None:
    top = lists.popular[:30].tolist()
    candidates = lists.candidates(query(table, memory(table, top)))
    assert not set(candidates.rows.tolist()) & set(top)
    assert candidates.filtered_counts["shown"] == 30
    everything = lists.candidates(query(table, memory(table, list(range(VIDEOS)))))
    assert everything.rows.tolist() == list(range(COUNT))  # shown longest ago first


def test_filters_count_shown_watched_and_blocked(retrieval: Retrieval, table: VideoTable, lists: PopularLists) -> None:
    first, second, third = lists.popular[:3].tolist()
    creator = int(table.creator_id[third])
    state = memory(table, [first], watched=[second], creators=[creator])
    counts = retrieval.retrieve(query(table, state)).filtered_counts
    assert min(counts["shown"], counts["watched"], counts["blocked"]) >= 1


@pytest.mark.parametrize("factory", ["Flat", "IVF64,Flat", "IVF128,PQ16x4fsr", "HNSW16"])
def test_viewer_who_saw_2000_videos_gets_the_next_nearest(factory: str) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((10_000, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = faiss.index_factory(16, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    if inverted := faiss.try_extract_index_ivf(index):
        inverted.nprobe = inverted.nlist
    if factory.startswith("HNSW"):
        index.hnsw.efSearch = 4_000
    viewer = vectors[:1].copy()
    by_similarity = np.argsort(-(vectors @ viewer[0])).astype(np.int32)
    shown = by_similarity[:2_000]
    bits = np.full(10_000 // 8, 0xFF, np.uint8)
    np.bitwise_and.at(bits, shown >> 3, ~(1 << (shown & 7)).astype(np.uint8))
    no_ids = np.empty(0, np.int64)
    seen = Exclusions(shown, np.empty((0, 2048), np.uint8), no_ids, no_ids)
    asks = ViewerQuery(None, shown[:0], np.empty(0, np.float32), None, NOW_S, 0, seen)  # type: ignore[arg-type]
    found = AnnSource(index, vectors).propose(SourceQuery(asks, viewer, 100 + len(shown), bits, 100)).rows
    assert len(found) == 100
    assert not set(found.tolist()) & set(shown.tolist())
    assert len(set(found.tolist()) & set(by_similarity[2_000:2_400].tolist())) >= 97


def test_bitmap_leaves_out_shown_and_blocked_rows(table: VideoTable) -> None:
    searchable = SearchableRows(table)
    creator, topic = int(table.creator_id[3]), int(table.topic[9])
    state = memory(table, [0, 8, 199], creators=[creator], topics=[topic])
    bits = searchable.bits(exclusions_of(state, POLICY, NOW_S, table))
    assert bits is not None
    is_set = np.unpackbits(bits, bitorder="little")[:VIDEOS].astype(bool)
    expected = (table.creator_id.base != creator) & (table.topic.base != topic)
    expected[[0, 8, 199]] = False
    assert is_set.tolist() == expected.tolist()
    assert searchable.bits(exclusions_of(ViewerMemoryState(), POLICY, NOW_S, table)) is None


@pytest.mark.parametrize(
    ("policy", "left_out"),
    [
        ({}, [1, 2, 3]),  # 30 h, 20 h, 10 h and 0 h ago
        ({"shown_hours": 0}, []),
        ({"shown_hours": 15}, [2, 3]),
        ({"shown_hours": 48}, [0, 1, 2, 3]),
        ({"shown_videos": 1}, [3]),
        ({"shown_videos": 0}, []),
    ],
)
def test_policy_limits_what_counts_as_shown(table: VideoTable, policy: Any, left_out: list[int]) -> None:
    state = memory(table, [0, 1, 2, 3], apart_s=10 * HOUR_S)
    assert exclusions_of(state, RetrievalSettings(**policy), NOW_S, table).shown_rows.tolist() == left_out


def test_policy_limits_what_counts_as_watched(table: VideoTable) -> None:
    state = memory(table, watched=[1])
    days = 86_400.0
    for watched_days, later_d, filters in ((30, 0, 1), (30, 29, 1), (30, 45, 0), (0, 0, 0), (5, 20, 0)):
        policy = RetrievalSettings(watched_days=watched_days)
        found = exclusions_of(state, policy, NOW_S + later_d * days, table).watched
        assert len(found) == filters, (watched_days, later_d)


def test_shown_video_of_another_release_is_ignored(table: VideoTable) -> None:
    state = ViewerMemoryState(shown_ids=np.array([2**50, int(table.video_id[4])]), shown_at_s=np.array([NOW_S, NOW_S]))
    assert exclusions_of(state, POLICY, NOW_S, table).shown_rows.tolist() == [4]


@given(st.lists(st.integers(0, 30), max_size=80), st.integers(0, 40))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_shown_videos_count_once_against_the_limit(table: VideoTable, shown: list[int], limit: int) -> None:
    policy = RetrievalSettings(candidates=CANDIDATES, shown_videos=limit)
    rows = exclusions_of(memory(table, shown), policy, NOW_S, table).shown_rows.tolist()
    distinct = list(dict.fromkeys(reversed(shown)))[:limit]
    assert rows == distinct[::-1]


@given(st.lists(st.integers(0, 60), max_size=80, unique=True), st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bitmap_agrees_with_a_scan_of_the_creators(table: VideoTable, others: list[int], data: st.DataObject) -> None:
    known = data.draw(st.lists(st.sampled_from(np.unique(table.creator_id.base).tolist()), max_size=40, unique=True))
    creators = sorted({*known, *(2**52 + other for other in others)})
    bits = SearchableRows(table).bits(exclusions_of(memory(table, creators=creators), POLICY, NOW_S, table))
    expected = ~np.isin(table.creator_id.base, creators)
    if bits is None:
        assert expected.all()
    else:
        assert np.unpackbits(bits, bitorder="little")[:VIDEOS].astype(bool).tolist() == expected.tolist()


def test_blocked_creators_are_found_without_a_scan(table: VideoTable) -> None:
    """With 2,000 scans of the table per request, one viewer who blocks many creators would slow down all others."""

    class CountedColumn(np.ndarray):
        comparisons = 0

        def __eq__(self, other: Any) -> Any:
            CountedColumn.comparisons += 1
            return super().__eq__(other)

    batch = table.creator_id.base
    table.creator_id.base = batch.view(CountedColumn)
    try:
        state = memory(table, creators=np.unique(batch).tolist())
        bits = SearchableRows(table).bits(exclusions_of(state, POLICY, NOW_S, table))
    finally:
        table.creator_id.base = batch
    assert bits is not None
    assert not np.unpackbits(bits, bitorder="little")[:VIDEOS].any()
    assert CountedColumn.comparisons == 0
