"""The viewers' memory after a loss: what the event log holds, beside what routers wrote meanwhile."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.support.pipelines.stream_fixtures import SteppedClock, open_logs

from reelway.pipelines.features.stream.memory_rebuild import RebuiltMemory, rebuild_viewer_memory
from reelway.platform.contracts.blend import MAX_SHOWN_HOURS, MAX_SHOWN_VIDEOS
from reelway.platform.eventlog import EventLog
from reelway.platform.eventlog.erasures import encode_erasures
from reelway.platform.eventlog.event_log import LogRecord
from reelway.platform.eventlog.exposure_events import EXPOSURE_EVENT_SCHEMA, encode_exposures
from reelway.platform.eventlog.outcome_events import OUTCOME_EVENT_SCHEMA, encode_outcomes
from reelway.platform.eventlog.topics import Topic
from reelway.platform.features.viewer_memory import F64, I64
from reelway.platform.features.viewer_memory_sqlite import SqliteViewerMemory
from reelway.platform.features.watched_filter import is_watched

NOW_S = float(int(time.time()))
CLOCK = SteppedClock(0)
"""Time of the logs: that of the record that is appended."""
HOUR_S = 3_600.0
DAY_S = 24 * HOUR_S


def rows(schema: pa.Schema, columns: dict[str, Any]) -> pa.RecordBatch:
    """Returns a batch with these columns; the others have constant values."""
    count = len(next(iter(columns.values())))
    arrays = []
    for field in schema:
        values = columns.get(field.name, [None if field.nullable else "x" if "dict" in str(field.type) else 0] * count)
        if pa.types.is_timestamp(field.type):
            values = [None if v is None else int(v * 1e6) for v in values]
            arrays.append(pa.array(values, pa.int64()).cast(field.type))
        else:
            arrays.append(pa.array(values).cast(field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def expose(log: EventLog, viewer: int, videos: list[int], at_s: float) -> None:
    batch = rows(
        EXPOSURE_EVENT_SCHEMA,
        {"viewer_id": [viewer] * len(videos), "video_id": videos, "shown_at": [at_s] * len(videos)},
    )
    CLOCK.now_us = int(at_s * 1e6)
    log.append(list(encode_exposures(batch, log.partitions, log.max_record_bytes)))


def report(log: EventLog, *outcomes: tuple[int, int, str, float], at_s: float = NOW_S) -> None:
    """Appends outcomes (viewer, video, type, value) of videos of 20 s, creator 7 and topic 3."""
    viewers, videos, types, values = zip(*outcomes, strict=True)
    count = len(outcomes)
    columns = {
        "viewer_id": list(viewers), "video_id": list(videos), "type": list(types), "value": list(values),
        "event_time": [at_s] * count, "creator_id": [7] * count, "topic": [3] * count, "duration_ms": [20_000] * count,
    }  # fmt: skip
    batch = rows(OUTCOME_EVENT_SCHEMA, columns)
    CLOCK.now_us = int(at_s * 1e6)
    log.append(list(encode_outcomes(batch, log.partitions, log.max_record_bytes)))


class Store:
    """A SQLite event log and a memory that can be lost."""

    def __init__(self, folder: Path) -> None:
        logs = open_logs(folder / "events", CLOCK)
        self.exposures, self.outcomes = logs[Topic.EXPOSURES], logs[Topic.OUTCOMES]
        self.folder = folder
        self.memory = self._open()

    def _open(self) -> SqliteViewerMemory:
        return SqliteViewerMemory(self.folder / "memory" / "memory.db", lambda: NOW_S)

    def lose_memory(self) -> None:
        self.memory.close()
        shutil.rmtree(self.folder / "memory")
        self.memory = self._open()

    def rebuild(self) -> RebuiltMemory | None:
        return rebuild_viewer_memory(self.memory, self.exposures, self.outcomes, NOW_S, threading.Event())

    def close(self) -> None:
        for part in (self.exposures, self.outcomes, self.memory):
            part.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path)
    yield opened
    opened.close()


def test_memory_after_a_loss_equals_the_memory_before(store: Store) -> None:
    rng = np.random.default_rng(0)
    for page in range(60):
        viewer, videos, at_s = int(rng.integers(1, 6)), rng.integers(0, 1_000, 10), NOW_S - 60.0 * (60 - page)
        store.memory.remember_shown(viewer, videos, at_s)
        expose(store.exposures, viewer, videos.tolist(), at_s)
    store.memory.remember_watched(np.array([1, 2]), np.array([5, 6]), np.array([NOW_S, NOW_S]))
    store.memory.block(3, creators=[7], topics=[3])
    store.memory.follow(4, [7])
    report(store.outcomes, (1, 5, "watch", 20_000.0), (2, 6, "watch", 25_000.0), (2, 8, "watch", 19_999.0))
    report(store.outcomes, (3, 9, "block_creator", 1.0), (3, 9, "block_topic", 1.0), (4, 9, "like", 1.0))
    report(store.outcomes, (4, 9, "follow", 1.0))
    before = {viewer: store.memory.read(viewer) for viewer in range(1, 6)}
    store.lose_memory()
    assert not len(store.memory.read(1).shown_ids)
    rebuilt = store.rebuild()
    assert rebuilt is not None
    assert (rebuilt.watched, rebuilt.choices, rebuilt.unreadable) == (2, 3, 0)
    for viewer, expected in before.items():
        found = store.memory.read(viewer)
        shown = sorted(zip(found.shown_at_s.tolist(), found.shown_ids.tolist(), strict=True))
        assert shown == sorted(set(zip(expected.shown_at_s.tolist(), expected.shown_ids.tolist(), strict=True)))
        assert np.array_equal(found.watched, expected.watched)
        assert found.blocked_creators.tolist() == expected.blocked_creators.tolist()
        assert found.blocked_topics.tolist() == expected.blocked_topics.tolist()
        assert found.followed_creators.tolist() == expected.followed_creators.tolist()


def test_complete_memory_is_not_rebuilt(store: Store) -> None:
    expose(store.exposures, 1, [10], NOW_S)
    assert store.rebuild() == RebuiltMemory(shown=1)
    expose(store.exposures, 1, [11], NOW_S)
    assert store.rebuild() is None
    assert store.memory.read(1).shown_ids.tolist() == [10]


def test_slates_written_meanwhile_stay_the_newest(store: Store) -> None:
    expose(store.exposures, 1, list(range(MAX_SHOWN_VIDEOS + 500)), NOW_S - 10)
    store.memory.remember_shown(1, [9_999], NOW_S)
    store.rebuild()
    ids = store.memory.read(1).shown_ids.tolist()
    assert ids[-1] == 9_999
    assert ids[:-1] == list(range(501, MAX_SHOWN_VIDEOS + 500))


def test_exposures_in_the_log_twice_count_once(store: Store) -> None:
    for _ in range(3):
        expose(store.exposures, 1, [10, 11], NOW_S)
    assert store.rebuild() == RebuiltMemory(shown=2)


def test_expired_events_are_left_out(store: Store) -> None:
    expose(store.exposures, 1, [10], NOW_S - MAX_SHOWN_HOURS * HOUR_S - 1)
    expose(store.exposures, 1, [11], NOW_S - MAX_SHOWN_HOURS * HOUR_S + 60)
    report(store.outcomes, (1, 12, "watch", 30_000.0), at_s=NOW_S - 50 * DAY_S)
    report(store.outcomes, (1, 13, "watch", 30_000.0), at_s=NOW_S - 20 * DAY_S)
    report(store.outcomes, (1, 14, "block_creator", 1.0), at_s=NOW_S - 300 * DAY_S)
    store.rebuild()
    state = store.memory.read(1)
    assert state.shown_ids.tolist() == [11]
    assert is_watched(state.watched, np.array([12, 13])).tolist() == [False, True]
    assert state.blocked_creators.tolist() == [7]


def test_unreadable_record_is_counted(store: Store) -> None:
    CLOCK.now_us = int(NOW_S * 1e6)
    store.exposures.append([LogRecord("bad", 0, b"not a batch")])
    expose(store.exposures, 1, [10], NOW_S)
    assert store.rebuild() == RebuiltMemory(shown=1, unreadable=1)


def test_what_precedes_an_erasure_is_not_restored(store: Store) -> None:
    expose(store.exposures, 1, [10], NOW_S - HOUR_S)
    expose(store.exposures, 2, [10], NOW_S - HOUR_S)
    report(store.outcomes, (1, 12, "watch", 30_000.0), at_s=NOW_S - HOUR_S)
    report(store.outcomes, (1, 14, "block_creator", 1.0), at_s=NOW_S - HOUR_S)
    for topic, log in ((Topic.EXPOSURES, store.exposures), (Topic.OUTCOMES, store.outcomes)):
        log.append(list(encode_erasures([1], topic, 1)))
    expose(store.exposures, 1, [11], NOW_S)
    report(store.outcomes, (1, 14, "block_topic", 1.0), at_s=NOW_S)
    store.rebuild()
    state = store.memory.read(1)
    assert state.shown_ids.tolist() == [11]
    assert (len(state.watched), len(state.blocked_creators), len(state.blocked_topics)) == (0, 0, 1)
    assert store.memory.read(2).shown_ids.tolist() == [10]


def test_empty_log_completes_the_memory(store: Store) -> None:
    assert store.rebuild() == RebuiltMemory()
    assert store.memory.is_complete()


def test_exposures_long_before_the_limit_are_not_read(store: Store) -> None:
    CLOCK.now_us = int((NOW_S - (MAX_SHOWN_HOURS + 2) * HOUR_S) * 1e6)
    store.exposures.append([LogRecord("unreadable", 0, b"not a batch")])
    expose(store.exposures, 1, [10], NOW_S)
    assert store.rebuild() == RebuiltMemory(shown=1, unreadable=0)


def test_stopped_rebuild_ends_without_the_marker(store: Store) -> None:
    """The memory stops the rebuild when it is written for the second time."""
    stop, writes = threading.Event(), []

    class StoppingMemory(SqliteViewerMemory):
        def restore_shown(self, viewer_id: int, video_ids: I64, shown_at_s: F64) -> None:
            super().restore_shown(viewer_id, video_ids, shown_at_s)
            writes.append(viewer_id)
            if len(writes) == 2:
                stop.set()

    for viewer in range(1, 6):
        expose(store.exposures, viewer, [10], NOW_S)
    memory = StoppingMemory(store.folder / "stopping.db", lambda: NOW_S)
    assert rebuild_viewer_memory(memory, store.exposures, store.outcomes, NOW_S, stop) is None
    assert (len(writes), memory.is_complete()) == (2, False)
    memory.close()
