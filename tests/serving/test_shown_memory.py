"""A router's memory of its slates: correct at once, written soon, and bounded when the store fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from tests.support.release_files import make_release_folder

from reelway.platform.contracts.blend import MAX_SHOWN_VIDEOS, RetrievalSettings
from reelway.platform.errors import MalformedFileError, StorageError
from reelway.platform.features.viewer_memory import NO_MEMORY, ShownSlate, ViewerMemoryState
from reelway.platform.features.viewer_memory_sqlite import SqliteViewerMemory
from reelway.serving.metrics import ShownMemoryMetrics
from reelway.serving.release_loader import ReleaseLoader
from reelway.serving.shown_memory import RECENT_S, ShownMemory
from reelway.serving.video_table import VideoTable
from reelway.serving.viewer_query import exclusions_of

NOW_S = 1_718_000_000.0
WAIT_S = 10.0


class ControlledMemory(SqliteViewerMemory):
    """A SQLite memory whose writes can fail, or wait for a gate."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, lambda: NOW_S)
        self.fails = False
        self.failure: Exception = StorageError("the disk is full")
        self.gate = threading.Event()
        self.gate.set()
        self.attempted = threading.Event()
        self.batches: list[int] = []

    def remember_slates(self, slates: Sequence[ShownSlate]) -> None:
        self.batches.append(len(slates))
        self.attempted.set()
        assert self.gate.wait(WAIT_S)
        if self.fails:
            raise self.failure
        super().remember_slates(slates)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ControlledMemory]:
    memory = ControlledMemory(tmp_path / "memory.db")
    yield memory
    memory.close()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def shown(store: ControlledMemory, registry: CollectorRegistry, clock: Clock) -> Iterator[ShownMemory]:
    memory = ShownMemory(store, ShownMemoryMetrics(registry), max_slates=50, clock=clock)
    yield memory
    store.fails = False
    store.gate.set()
    memory.close(WAIT_S)
    assert not memory._writer.is_alive()


@pytest.fixture
def table(tmp_path: Path) -> VideoTable:
    make_release_folder(tmp_path / "release", videos=50)
    return ReleaseLoader(tmp_path / "release").table()


def ids(state: ViewerMemoryState) -> list[int]:
    return state.shown_ids.tolist()


def counted(registry: CollectorRegistry, name: str, **labels: str) -> float:
    return registry.get_sample_value(name, labels) or 0.0


def test_slate_is_known_before_it_is_written(shown: ShownMemory, store: ControlledMemory) -> None:
    store.gate.clear()
    shown.remember(1, [10, 11], NOW_S)
    assert ids(shown.with_recent(1, NO_MEMORY)) == [10, 11]
    assert ids(shown.with_recent(2, NO_MEMORY)) == []
    assert ids(store.read(1)) == []
    store.gate.set()
    assert shown.flush(WAIT_S)
    assert ids(store.read(1)) == [10, 11]


def test_recent_slates_follow_those_of_the_store_in_time(shown: ShownMemory) -> None:
    stored = ViewerMemoryState(np.array([1, 2]), np.array([NOW_S, NOW_S + 20]))
    shown.remember(1, [7], NOW_S + 10)
    state = shown.with_recent(1, stored)
    assert ids(state) == [1, 7, 2]
    assert state.shown_at_s.tolist() == [NOW_S, NOW_S + 10, NOW_S + 20]


def test_waiting_slates_are_written_together(shown: ShownMemory, store: ControlledMemory) -> None:
    store.gate.clear()
    shown.remember(1, [0], NOW_S)
    assert store.attempted.wait(WAIT_S)
    for video in range(1, 40):
        shown.remember(1, [video], NOW_S)
    store.gate.set()
    assert shown.flush(WAIT_S)
    assert store.batches == [1, 39]
    assert ids(store.read(1)) == list(range(40))


@pytest.mark.parametrize(
    "failure", [StorageError("full"), MalformedFileError("memory.db", "a SQLite file", seen=b""), ValueError("a bug")]
)
def test_failed_write_is_counted_and_repeated(
    shown: ShownMemory, store: ControlledMemory, registry: CollectorRegistry, failure: Exception
) -> None:
    store.fails, store.failure = True, failure
    shown.remember(1, [10], NOW_S)
    assert store.attempted.wait(WAIT_S)
    shown.remember(1, [11], NOW_S)
    assert not shown.flush(0.05)
    store.fails = False
    assert shown.flush(WAIT_S)
    assert ids(store.read(1)) == [10, 11]
    assert counted(registry, "reelway_ingress_memory_faults_total", kind="write") >= 1
    assert counted(registry, "reelway_ingress_memory_lost_total") == 0


def test_broken_store_bounds_the_waiting_slates(
    shown: ShownMemory, store: ControlledMemory, registry: CollectorRegistry
) -> None:
    store.fails = True
    shown.remember(1, [0], NOW_S)
    assert store.attempted.wait(WAIT_S)
    for video in range(1, 200):
        shown.remember(1, [video], NOW_S)
    store.fails = False
    assert shown.flush(WAIT_S)
    lost = counted(registry, "reelway_ingress_memory_lost_total")
    assert lost in (149, 150)  # the first slate may be written before the others arrive
    assert ids(store.read(1))[-50:] == list(range(150, 200))


def test_router_forgets_its_own_slates_after_a_while(shown: ShownMemory, clock: Clock) -> None:
    shown.remember(1, [1], NOW_S)
    clock.now_s = RECENT_S - 1
    shown.remember(2, [2], NOW_S)
    assert ids(shown.with_recent(1, NO_MEMORY)) == [1]
    clock.now_s = RECENT_S + 1
    shown.remember(3, [3], NOW_S)
    assert ids(shown.with_recent(1, NO_MEMORY)) == []
    assert ids(shown.with_recent(2, NO_MEMORY)) == [2]
    for video in range(60):
        shown.remember(4, [video], NOW_S)
    assert ids(shown.with_recent(4, NO_MEMORY)) == list(range(10, 60))
    assert list(shown._of_viewer) == [4]


def test_empty_slate_is_not_remembered(shown: ShownMemory, store: ControlledMemory) -> None:
    shown.remember(1, [], NOW_S)
    assert shown.flush(WAIT_S)
    assert store.batches == []


def test_busy_viewer_has_at_most_the_newest_videos(
    store: ControlledMemory, registry: CollectorRegistry, clock: Clock
) -> None:
    """One viewer id with many slates, such as a load test, does not lengthen its own requests without a bound."""
    shown = ShownMemory(store, ShownMemoryMetrics(registry), clock=clock)
    pages = 3 * MAX_SHOWN_VIDEOS // 100
    for page in range(pages):
        shown.remember(1, np.arange(100) + 100 * page, NOW_S)
        if page == pages // 2:
            clock.now_s = RECENT_S / 2
    newest = list(range(100 * pages - MAX_SHOWN_VIDEOS, 100 * pages))
    assert ids(shown.with_recent(1, NO_MEMORY)) == newest
    clock.now_s = RECENT_S + 1  # the first half of the slates becomes old
    shown.remember(2, [7], NOW_S)
    assert ids(shown.with_recent(1, NO_MEMORY)) == list(range(max(newest[0], 100 * (pages // 2 + 1)), 100 * pages))
    clock.now_s = 2 * RECENT_S
    shown.remember(2, [8], NOW_S)
    assert list(shown._of_viewer) == [2]
    shown.close(WAIT_S)


def test_written_slates_do_not_displace_older_videos(
    shown: ShownMemory, store: ControlledMemory, table: VideoTable
) -> None:
    """The store has the router's recent slates too; both copies together must not use up the release's limit."""
    videos = table.video_id[:40].tolist()
    for page in range(4):
        shown.remember(1, videos[10 * page : 10 * page + 10], NOW_S + page)
    assert shown.flush(WAIT_S)
    state = shown.with_recent(1, store.read(1))
    assert len(state.shown_ids) == 80
    policy = RetrievalSettings(shown_videos=40)
    assert exclusions_of(state, policy, NOW_S + 10, table).shown_rows.tolist() == list(range(40))


def test_slates_not_written_at_the_end_are_counted(
    shown: ShownMemory, store: ControlledMemory, registry: CollectorRegistry
) -> None:
    store.fails = True
    for video in range(3):
        shown.remember(1, [video], NOW_S)
    shown.close(0.2)
    assert not shown._writer.is_alive()
    assert counted(registry, "reelway_ingress_memory_lost_total") == 3
