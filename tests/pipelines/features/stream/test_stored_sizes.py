"""The stream's state grows in parts: no stored value and no record is larger than a Kafka message may be."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.dimensions import DIMENSIONS
from tests.support.pipelines.keyed_stores import MemoryStore
from tests.support.pipelines.stream_fixtures import START_US, TTL_US

from reelway.pipelines.features.stream.cell_records import decode_cells, encode_cells
from reelway.pipelines.features.stream.keyed_store import PART_BYTES, LargeValues, TimedBytes
from reelway.pipelines.features.stream.pending_events import PendingEvents
from reelway.pipelines.features.stream.rules import StreamRules
from reelway.pipelines.features.stream.time_buckets import ENGAGEMENT, LAYOUTS
from reelway.pipelines.features.stream.video_task import VideoTask
from reelway.pipelines.features.stream.viewer_events import EXPOSURE, ViewerEvents
from reelway.pipelines.features.stream.viewer_task import Cells, ViewerResult, ViewerTask
from reelway.pipelines.features.views import SECOND_US, ViewSettings
from reelway.pipelines.features.windows import I64
from reelway.platform.contracts.events import OutcomeType
from reelway.platform.eventlog.outcome_events import OUTCOME_TYPES

RULES = StreamRules(
    ViewSettings(DIMENSIONS, activity_grid_s=6, affinity_grid_s=6, engagement_grid_s=4, creator_grid_s=12), TTL_US
)
LIKE = np.array([OUTCOME_TYPES.index(OutcomeType.LIKE)])
SIZES = st.sampled_from([0, 1, 8, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 2 * PART_BYTES, 3 * PART_BYTES + 5])


def viewer_events(count: int, seed: int, *, span_s: int = 60, viewers: int = 4) -> ViewerEvents:
    """Returns exposures and outcomes after ``START_US`` in any order, most of them of separate impressions."""
    rng = np.random.default_rng(seed)
    impression = rng.integers(1, 2 * count + 2, count)
    time_us = START_US + rng.integers(0, span_s * SECOND_US // 250_000, count) * 250_000
    return ViewerEvents(
        impression_id=impression, viewer_id=impression % viewers, video_id=impression % 7, creator_id=impression % 3,
        topic=impression % 5 - 1, duration_ms=np.full(count, 9_000), shown_us=time_us - SECOND_US,
        kind=rng.choice([EXPOSURE, 0, 1, 2], count), value=np.full(count, 5_000, np.float32), time_us=time_us,
    )  # fmt: skip


def begun_task() -> tuple[ViewerTask, MemoryStore]:
    store = MemoryStore()
    task = ViewerTask(store, RULES)
    task.begin(START_US)
    return task, store


def same_results(one: ViewerResult, other: ViewerResult) -> bool:
    def contents(result: ViewerResult) -> list[object]:
        cells = [(c.view, c.point_us, c.entity.tolist(), c.rows.tolist()) for c in result.cells]
        rows = [(chunk.view, chunk.rows.to_pylist()) for chunk in result.rows]
        return [result.began_us, result.settled_us, result.results, result.steps, cells, rows]

    return contents(one) == contents(other)


@settings(max_examples=15, deadline=None)
@given(
    count=st.integers(1, 80),
    seed=st.integers(0, 9_999),
    cuts=st.lists(st.integers(0, 80), max_size=8),
    ends_s=st.lists(st.floats(0, 70), min_size=1, max_size=5),
)
def test_results_do_not_depend_on_how_events_are_added(
    count: int, seed: int, cuts: list[int], ends_s: list[float]
) -> None:
    events = viewer_events(count, seed)
    events = events.take(np.argsort(events.time_us, kind="stable"))
    together, _ = begun_task()
    together.add(events)
    split, store = begun_task()
    bounds = sorted({0, count, *(min(cut, count) for cut in cuts)})
    pieces = [np.arange(start, end) for start, end in pairwise(bounds)]
    for complete_us in sorted(START_US + int(end_s * SECOND_US) for end_s in ends_s):
        while pieces and events.time_us[pieces[0][0]] <= complete_us:
            split.add(events.take(pieces.pop(0)))
        assert same_results(split.advance(complete_us), together.advance(complete_us))
    for piece in pieces:
        split.add(events.take(piece))
    last_us = START_US + 80 * SECOND_US
    assert same_results(split.advance(last_us), together.advance(last_us))
    assert not [key for key in store.values if key[0] == "pending"]


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 60), seed=st.integers(0, 9_999), ends_s=st.lists(st.integers(1, 62), min_size=1))
def test_pending_events_are_taken_once_in_their_order(count: int, seed: int, ends_s: list[int]) -> None:
    events, pending = viewer_events(count, seed), PendingEvents(MemoryStore(), SECOND_US)
    pending.add(events)
    after_us = START_US
    for until_us in [*sorted(START_US + end_s * SECOND_US for end_s in ends_s), START_US + 70 * SECOND_US]:
        taken = pending.take(until_us)
        wanted = events.take((events.time_us >= after_us) & (events.time_us < until_us))
        in_order = np.argsort(wanted.time_us // SECOND_US, kind="stable")
        assert taken.packed() == wanted.take(in_order).packed()
        after_us = max(after_us, until_us)


def test_addition_writes_only_the_added_events() -> None:
    task, store = begun_task()
    first = viewer_events(20_000, 1, span_s=10)
    task.add(first)
    written = store.written_bytes
    assert written > 20_000 * 76
    task.add(viewer_events(10, 2, span_s=10))
    assert store.written_bytes - written < 10 * 76 + 500


def test_busy_viewer_is_stored_in_parts() -> None:
    """40,000 impressions of one viewer in one second: 3 MB of pending events, and a history of 1 MB."""
    store = MemoryStore()
    task = ViewerTask(store, StreamRules(ViewSettings(DIMENSIONS), TTL_US))
    task.begin(START_US)
    task.add(viewer_events(40_000, 3, span_s=1, viewers=1))
    done = task.advance(START_US + 2 * SECOND_US)
    assert done.results["outcomes", "applied"] > 20_000
    (history,) = (chunk.rows for chunk in done.rows if chunk.view == "viewer_history")
    assert history["viewer_id"].to_pylist() == [0]
    assert ("viewer_history.part1", 0) in store.values
    like = replace(viewer_events(1, 4, viewers=1), time_us=points(90_000), shown_us=points(90_000), kind=LIKE)
    task.add(like)
    task.advance(START_US + 90_002 * SECOND_US)  # all other impressions are closed, so the history is short
    assert ("viewer_history", 0) in store.values
    assert ("viewer_history.part1", 0) not in store.values


@settings(max_examples=25, deadline=None)
@given(
    writes=st.lists(st.tuples(st.integers(0, 2), st.one_of(st.none(), SIZES)), max_size=12),
    fresh=st.booleans(),
)
def test_large_values_equal_a_dictionary(writes: list[tuple[int, int | None]], fresh: bool) -> None:
    store, expected = MemoryStore(), dict[int, bytes]()
    values = LargeValues(store, "t")
    for number, (key, size) in enumerate(writes):
        values = LargeValues(store, "t") if fresh else values
        keys = np.array([key], dtype=np.int64)
        assert values.get_many(keys) == [expected.get(key)]
        if size is None:
            values.delete_many(keys)
            expected.pop(key, None)
        else:
            expected[key] = bytes([number]) * size
            values.put_many(keys, [expected[key]])
        assert sum(map(len, store.values.values())) == sum(map(len, expected.values())), "parts are left"
    every = np.arange(3)
    assert LargeValues(store, "t").get_many(every) == [expected.get(key) for key in range(3)]


@settings(max_examples=25, deadline=None)
@given(
    appends=st.lists(st.tuples(st.integers(0, 2), SIZES.filter(bool)), max_size=8), popped=st.permutations([0, 1, 2])
)
def test_timed_bytes_are_the_appended_bytes(appends: list[tuple[int, int]], popped: list[int]) -> None:
    store, expected = MemoryStore(), [b"", b"", b""]
    timed = TimedBytes(store, "t")
    for number, (place, size) in enumerate(appends):
        value = bytes([number]) * size
        expected[place] += value
        timed.append(points(place), [value])
    assert timed.pop(points(*popped)) == b"".join(expected[place] for place in popped)
    assert not store.values


def points(*seconds: int) -> I64:
    return np.array([START_US + second * SECOND_US for second in seconds], dtype=np.int64)


@pytest.mark.parametrize("counts", [(), (1,), (5_000, 1, 30_000), (3_640, 3_641, 3_642), (100_000,)])
def test_cells_are_sent_in_small_records(counts: tuple[int, ...]) -> None:
    """A video half that applies the records has the same rows as one that applies all cells together."""
    rng, width = np.random.default_rng(7), len(LAYOUTS[ENGAGEMENT].columns)
    cells = []
    for place, count in enumerate(counts, 1):
        rows = rng.integers(1, 9, (count, width))
        rows[:, 0] = START_US + place * 4 * SECOND_US
        cells.append(Cells(ENGAGEMENT, START_US + place * 4 * SECOND_US, np.arange(count), rows))
    settled_us = START_US + 4 * len(counts) * SECOND_US
    records = encode_cells(2, START_US, settled_us, cells)
    assert max(map(len, records)) <= PART_BYTES
    decoded = [decode_cells(ENGAGEMENT, record) for record in records]
    assert [(source, progress) for source, progress, _ in decoded] == [
        *[(2, START_US)] * (len(records) - 1),
        (2, settled_us),
    ]
    together, apart = VideoTask(MemoryStore(), ENGAGEMENT, RULES, 1), VideoTask(MemoryStore(), ENGAGEMENT, RULES, 1)
    together.begin(START_US)
    apart.begin(START_US)
    expected = together.add(0, settled_us, cells)
    emitted = [rows for _, progress, some in decoded for rows in apart.add(0, progress, some)]
    assert [chunk.rows for chunk in emitted] == [chunk.rows for chunk in expected]
