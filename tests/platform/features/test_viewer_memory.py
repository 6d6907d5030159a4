"""Viewer memory in SQLite, in a real Redis and in a process: order, limits, expiry, filters and blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reelway.platform.contracts.blend import MAX_SHOWN_HOURS, MAX_SHOWN_VIDEOS, MAX_WATCHED_DAYS
from reelway.platform.errors import StorageError
from reelway.platform.features import viewer_memory_sqlite
from reelway.platform.features.viewer_memory import (
    MAX_CHOICES,
    ShownSlate,
    ViewerMemory,
    ViewerMemoryState,
)
from reelway.platform.features.viewer_memory_local import LocalViewerMemory
from reelway.platform.features.viewer_memory_redis import RedisViewerMemory
from reelway.platform.features.viewer_memory_sqlite import SqliteViewerMemory
from reelway.platform.features.watched_filter import GENERATION_DAYS, is_watched
from reelway.platform.viewer_pseudonyms import viewer_pseudonym

NOW_S = 1_718_000_000.0
HOUR_S = 3_600.0
DAY_S = 24 * HOUR_S
VIEWERS = count(1)
"""Viewers are never used twice: the tests of a store share it."""


class VirtualClock:
    def __init__(self) -> None:
        self.now_s = NOW_S

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


Opener = Callable[[Callable[[], float]], ViewerMemory]


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.redis), "local"])
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    """Opens the same store again and again, as the processes of a service do."""
    if request.param == "redis":
        client = redis.Redis.from_url(f"redis://{request.getfixturevalue('redis_server')}/3")
        client.flushdb()
        yield lambda clock: RedisViewerMemory(client, clock)
        client.close()
    elif request.param == "sqlite":
        opened: list[SqliteViewerMemory] = []

        def open_file(clock: Callable[[], float]) -> ViewerMemory:
            opened.append(SqliteViewerMemory(tmp_path / "memory.db", clock))
            return opened[-1]

        yield open_file
        for memory in opened:
            memory.close()
    else:
        yield LocalViewerMemory


@pytest.fixture
def memory(opener: Opener, clock: VirtualClock) -> ViewerMemory:
    return opener(clock)


def shown(state: ViewerMemoryState) -> list[tuple[int, float]]:
    return list(zip(state.shown_ids.tolist(), state.shown_at_s.tolist(), strict=True))


def watched_ids(state: ViewerMemoryState, *ids: int) -> list[int]:
    return [i for i, is_in in zip(ids, is_watched(state.watched, np.array(ids)), strict=True) if is_in]


def test_unknown_viewer_has_an_empty_memory(memory: ViewerMemory) -> None:
    state = memory.read(next(VIEWERS))
    assert not any(len(getattr(state, name)) for name in ViewerMemoryState.__slots__)


class ShownModel:
    """The rules in plain Python: a list of (video, second), cut at both ends."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, float]] = []

    def add(self, videos: list[int], at_s: float, now_s: float) -> None:
        kept = [*self.entries, *((video, float(int(at_s))) for video in videos)][-MAX_SHOWN_VIDEOS:]
        while kept and kept[0][1] < int(now_s) - MAX_SHOWN_HOURS * 3600:
            kept.pop(0)
        self.entries = kept


STEPS = st.lists(
    st.tuples(
        st.floats(0, 20 * HOUR_S),  # time since the step before
        st.lists(st.integers(0, 2**53 - 1), min_size=1, max_size=100),
        st.integers(1, 12),  # so many slates at once
    ),
    min_size=1,
    max_size=12,
)


@given(STEPS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_shown_videos_follow_the_ring_rules(memory: ViewerMemory, clock: VirtualClock, steps: Any) -> None:
    viewer, model = next(VIEWERS), ShownModel()
    for later_s, videos, slates in steps:
        clock.now_s += later_s
        memory.remember_slates([ShownSlate(viewer, np.array(videos), clock.now_s)] * slates)
        for _ in range(slates):
            model.add(videos, clock.now_s, clock.now_s)
        assert shown(memory.read(viewer)) == model.entries


def test_only_the_newest_videos_are_kept(memory: ViewerMemory) -> None:
    viewer = next(VIEWERS)
    for page in range(MAX_SHOWN_VIDEOS // 100 + 5):
        memory.remember_shown(viewer, np.arange(100) + 100 * page, NOW_S)
    assert memory.read(viewer).shown_ids.tolist() == list(range(500, MAX_SHOWN_VIDEOS + 500))


def test_memories_of_two_processes_are_one(opener: Opener, clock: VirtualClock) -> None:
    if opener is LocalViewerMemory:
        pytest.skip("the memory of one process is not shared")
    here, there, viewer = opener(clock), opener(clock), next(VIEWERS)
    here.remember_shown(viewer, [1, 2], NOW_S)
    there.remember_shown(viewer, [3], NOW_S + 1)
    there.block(viewer, creators=[9])
    assert here.read(viewer).shown_ids.tolist() == [1, 2, 3]
    assert here.read(viewer).blocked_creators.tolist() == [9]


def test_restored_videos_are_older_than_those_of_the_store(memory: ViewerMemory) -> None:
    viewer = next(VIEWERS)
    memory.remember_shown(viewer, [7], NOW_S)
    for _ in range(2):  # idempotent
        memory.restore_shown(viewer, np.array([1, 2]), np.array([NOW_S - 20, NOW_S - 10]))
    state = memory.read(viewer)
    assert list(dict.fromkeys(state.shown_ids.tolist())) == [1, 2, 7]
    assert (np.diff(state.shown_at_s) >= 0).all()


def test_restoring_too_many_videos_keeps_the_newest(memory: ViewerMemory) -> None:
    viewer = next(VIEWERS)
    memory.remember_shown(viewer, [5_000], NOW_S)
    memory.restore_shown(viewer, np.arange(3_000), np.full(3_000, NOW_S - 5))
    ids = memory.read(viewer).shown_ids.tolist()
    assert ids == [*range(3_001 - MAX_SHOWN_VIDEOS, 3_000), 5_000]


def test_watched_video_is_recognised_for_thirty_days(memory: ViewerMemory, clock: VirtualClock) -> None:
    viewer, other = next(VIEWERS), next(VIEWERS)
    times_s = np.array([NOW_S, NOW_S + 15 * DAY_S, NOW_S])
    memory.remember_watched(np.array([viewer, viewer, other]), np.array([11, 12, 13]), times_s)
    clock.now_s = NOW_S + 15 * DAY_S
    assert watched_ids(memory.read(viewer), 11, 12, 13) == [11, 12]
    assert len(memory.read(viewer).watched) == len(memory.read(viewer).watched_generations) == 2
    clock.now_s = NOW_S + MAX_WATCHED_DAYS * DAY_S - 1
    assert watched_ids(memory.read(viewer), 11, 12) == [11, 12]
    clock.now_s = NOW_S + (MAX_WATCHED_DAYS + GENERATION_DAYS) * DAY_S
    assert watched_ids(memory.read(viewer), 11, 12) == [12]
    assert watched_ids(memory.read(other), 13) == []


def test_watched_videos_are_added_to_earlier_ones(memory: ViewerMemory) -> None:
    viewer, videos = next(VIEWERS), np.arange(300) * 977
    for part in np.array_split(videos, 7):
        memory.remember_watched(np.full(len(part), viewer), part, np.full(len(part), NOW_S))
    assert is_watched(memory.read(viewer).watched, videos).all()


def test_blocks_do_not_expire(memory: ViewerMemory, clock: VirtualClock) -> None:
    viewer = next(VIEWERS)
    memory.block(viewer, creators=[5, 2**52], topics=[3])
    memory.block(viewer, creators=[5, 1])
    memory.block(viewer)
    clock.now_s += 1_000 * DAY_S
    state = memory.read(viewer)
    assert state.blocked_creators.tolist() == [1, 5, 2**52]
    assert state.blocked_topics.tolist() == [3]


def test_follows_are_a_set_apart_from_blocks(memory: ViewerMemory, clock: VirtualClock) -> None:
    viewer = next(VIEWERS)
    memory.follow(viewer, [9, 2**52])
    memory.follow(viewer, [9, 4])
    memory.follow(viewer, [])
    memory.block(viewer, creators=[5], topics=[3])
    clock.now_s += 1_000 * DAY_S
    state = memory.read(viewer)
    assert state.followed_creators.tolist() == [4, 9, 2**52]
    assert state.blocked_creators.tolist() == [5]
    assert state.blocked_topics.tolist() == [3]


def test_marker_is_set_once_complete(opener: Opener, clock: VirtualClock) -> None:
    memory = opener(clock)
    assert not memory.is_complete()
    memory.mark_complete()
    memory.mark_complete()
    assert memory.is_complete()


def test_pruned_file_forgets_only_expired_viewers(tmp_path: Path, clock: VirtualClock) -> None:
    memory = SqliteViewerMemory(tmp_path / "memory.db", clock)
    early, late = next(VIEWERS), next(VIEWERS)
    memory.remember_shown(early, [1], clock.now_s)
    memory.remember_watched(np.array([early]), np.array([1]), np.array([clock.now_s]))
    clock.now_s += (MAX_WATCHED_DAYS + GENERATION_DAYS) * DAY_S
    memory.remember_shown(late, [2], clock.now_s)
    rows = {table: _rows(memory, table) for table in ("shown", "watched")}
    assert rows == {"shown": 1, "watched": 0}
    memory.close()


def _rows(memory: SqliteViewerMemory, table: str) -> int:
    with memory._read.reading() as db:
        return int(db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


def test_another_version_of_the_file_is_rejected(tmp_path: Path) -> None:
    SqliteViewerMemory(tmp_path / "memory.db").close()
    import sqlite3

    with sqlite3.connect(tmp_path / "memory.db") as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(StorageError, match="delete the file; the stream rebuilds it"):
        SqliteViewerMemory(tmp_path / "memory.db")
    assert viewer_memory_sqlite._FORMAT.version == 2


@pytest.mark.redis
def test_idle_viewers_expire_in_redis(redis_server: str) -> None:
    client = redis.Redis.from_url(f"redis://{redis_server}/4")
    client.flushdb()
    memory = RedisViewerMemory(client)
    memory.remember_shown(1, [1, 2], NOW_S * 2)
    memory.remember_watched(np.array([1]), np.array([1]), np.array([NOW_S]))
    memory.block(1, topics=[4])
    lifetimes_s = {key.decode().split(":")[2]: client.ttl(key) for key in client.scan_iter()}
    assert lifetimes_s["blocked"] == -1
    assert 0 < lifetimes_s["shown"] <= MAX_SHOWN_HOURS * HOUR_S
    assert 0 < lifetimes_s["watched"] <= (MAX_WATCHED_DAYS + GENERATION_DAYS) * DAY_S


def test_unreachable_redis_raises_a_storage_error() -> None:
    memory = RedisViewerMemory(redis.Redis(port=1, socket_connect_timeout=0.2, retry=None))
    with pytest.raises(StorageError, match=f"memory of {viewer_pseudonym(5)}"):
        memory.read(5)
    with pytest.raises(StorageError, match="cannot write shown videos"):
        memory.remember_shown(5, [1], NOW_S)


def test_only_the_choices_reported_last_are_kept(memory: ViewerMemory, clock: VirtualClock) -> None:
    viewer, other = next(VIEWERS), next(VIEWERS)
    memory.block(other, creators=[1])
    memory.follow(other, [1])
    creators = list(range(1, MAX_CHOICES + 101))
    for first in range(0, len(creators), 100):
        clock.now_s += 1
        memory.block(viewer, creators=creators[first : first + 100])
        memory.follow(viewer, creators[first : first + 100])
    clock.now_s += 1
    memory.block(viewer, creators=[150], topics=[7])  # 150 is now among the newest
    memory.follow(viewer, [150, 5_000])
    clock.now_s += 1
    memory.block(viewer, creators=list(range(10_000, 10_000 + MAX_CHOICES - 2)))
    memory.follow(viewer, list(range(10_000, 10_000 + MAX_CHOICES - 2)))
    state = memory.read(viewer)
    assert state.blocked_creators.tolist() == [150, *range(10_000, 10_000 + MAX_CHOICES - 2)]
    assert state.blocked_topics.tolist() == [7]
    assert state.followed_creators.tolist() == [150, 5_000, *range(10_000, 10_000 + MAX_CHOICES - 2)]
    assert memory.read(other).blocked_creators.tolist() == memory.read(other).followed_creators.tolist() == [1]
