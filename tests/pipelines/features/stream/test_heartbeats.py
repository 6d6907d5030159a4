"""When heartbeats are due, and for which partitions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from reelway.pipelines.features.stream.heartbeats import (
    AFTER_POINT_S,
    REPEAT_S,
    HeartbeatGrid,
    LastRead,
    partitions_behind,
)

SECOND_US = 1_000_000
POINT_US = 100 * SECOND_US
NOW_S = 50.0


@given(now_us=st.integers(0, 10**16), grid_us=st.integers(10**5, 10**8), offset_us=st.integers(0, 10**16))
def test_last_point_is_at_most_a_grid_step_ago(now_us: int, grid_us: int, offset_us: int) -> None:
    grid = HeartbeatGrid(grid_us, offset_us)
    point_us = grid.last_point_us(now_us)
    assert 0 <= now_us - point_us < grid_us
    assert (point_us - offset_us) % grid_us == 0


@given(now_us=st.integers(0, 10**16), offset_us=st.integers(0, 10**16))
def test_heartbeats_are_due_right_after_each_point(now_us: int, offset_us: int) -> None:
    grid = HeartbeatGrid(SECOND_US, offset_us)
    wait_s = grid.wait_s(now_us)
    assert 0 < wait_s <= REPEAT_S
    next_us = now_us + round(wait_s * 1e6)
    if grid.last_point_us(next_us) > grid.last_point_us(now_us):
        assert next_us - grid.last_point_us(next_us) <= round(AFTER_POINT_S * 1e6)


def test_partition_with_an_earlier_last_record_is_behind() -> None:
    reads = {
        ("outcomes", 0): LastRead(7, POINT_US - 1, NOW_S - 0.1),
        ("outcomes", 1): LastRead(7, POINT_US, NOW_S - 0.1),
        ("exposures", 2): LastRead(7, POINT_US - 1, NOW_S - 0.1),
    }
    assert partitions_behind("outcomes", 4, reads, POINT_US, NOW_S) == [0]


def test_partition_of_another_member_gets_no_heartbeat() -> None:
    reads = {("outcomes", 0): LastRead(7, POINT_US - 1, NOW_S - 40)}
    assert partitions_behind("outcomes", 4, reads, POINT_US, NOW_S) == []


def test_partition_with_a_backlog_gets_no_heartbeat() -> None:
    reads = {
        ("outcomes", 0): LastRead(7, POINT_US - 60 * SECOND_US, NOW_S - 0.1),  # records follow one another
        ("outcomes", 1): LastRead(7, POINT_US - 60 * SECOND_US, NOW_S - 1),  # nothing follows
    }
    assert partitions_behind("outcomes", 4, reads, POINT_US, NOW_S) == [1]
