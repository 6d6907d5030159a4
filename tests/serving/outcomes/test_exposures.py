"""Forwarding of exposures to a collector that fails, hangs or answers too late."""

from __future__ import annotations

import asyncio
import logging

import numpy as np
import pytest

from reelway.platform.contracts.events import Arm
from reelway.platform.errors import ServingError
from reelway.serving.outcomes import ArmKey, ExposureBatch, ExposureBuffer, forward_exposures

STABLE = ArmKey("r-1", Arm.STABLE, "ab" * 32)
CANARY = ArmKey("r-1", Arm.CANARY, "cd" * 32)


def rows_of(batch: ExposureBatch | None) -> list[tuple[ArmKey, int, float, int, int]]:
    assert batch is not None
    return [
        (batch.arms[arm], *rest)
        for arm, *rest in zip(
            batch.arm.tolist(), batch.viewer_id.tolist(), batch.weight.tolist(), batch.slices.tolist(),
            batch.count.tolist(), strict=True,
        )
    ]  # fmt: skip


def test_slate_is_one_row_per_mask_of_slices() -> None:
    buffer = ExposureBuffer()
    buffer.add(CANARY, 7, 0.75, [0, 2, 2, 6, 0])
    buffer.add(STABLE, 8, 0.25, [0] * 20)
    assert rows_of(buffer.next_batch()) == [
        (CANARY, 7, 0.75, 0, 2), (CANARY, 7, 0.75, 2, 2), (CANARY, 7, 0.75, 6, 1), (STABLE, 8, 0.25, 0, 20),
    ]  # fmt: skip


def test_batch_is_repeated_until_it_is_acknowledged() -> None:
    buffer = ExposureBuffer()
    buffer.add(CANARY, 7, 0.75, [0])
    first = buffer.next_batch()
    buffer.add(STABLE, 8, 0.25, [0])
    assert first is not None
    assert buffer.next_batch() is first
    buffer.acknowledge(first)
    second = buffer.next_batch()
    assert rows_of(second) == [(STABLE, 8, 0.25, 0, 1)]
    assert second is not None
    assert (second.origin, second.number) == (first.origin, first.number + 1)
    buffer.acknowledge(first)  # a repeated answer
    assert buffer.next_batch() is second


def test_arm_is_announced_once() -> None:
    buffer = ExposureBuffer()
    buffer.announce([CANARY, STABLE, ArmKey("", Arm.STABLE, "ab" * 32)])
    batch = buffer.next_batch()
    assert batch is not None
    assert (batch.arms, len(batch.arm)) == ((CANARY, STABLE), 0)
    buffer.acknowledge(batch)
    buffer.add(ArmKey("", Arm.STABLE, "ab" * 32), 7, 0.0, [0])
    assert buffer.next_batch() is None


def test_full_buffer_counts_dropped_impressions() -> None:
    buffer = ExposureBuffer(max_rows=2)
    for viewer in range(4):
        buffer.add(CANARY, viewer, 0.5, [0, 0, 0])
    assert (len(rows_of(buffer.next_batch())), buffer.dropped) == (2, 6)


def test_every_start_of_a_router_has_its_own_origin() -> None:
    buffers = ExposureBuffer(), ExposureBuffer()
    for buffer in buffers:
        buffer.announce([CANARY])
    first, second = (buffer.next_batch() for buffer in buffers)
    assert first is not None
    assert second is not None
    assert first.origin != second.origin


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arm": [5]}, "an arm index outside of the 1"),
        ({"weight": [1.5]}, r"a weight outside 0\.\.1"),
        ({"weight": [float("nan")]}, r"a weight outside 0\.\.1"),
        ({"slices": [8]}, "unknown slices"),
        ({"count": [-1]}, "negative count"),
        ({"viewer_id": [1, 2]}, r"columns of \[1, 2\] rows"),
    ],
)
def test_invalid_batch_is_rejected(change: dict[str, list[float]], message: str) -> None:
    columns = {"arm": [0], "viewer_id": [1], "weight": [0.5], "slices": [0], "count": [1], **change}
    types = {"arm": np.int32, "viewer_id": np.int64, "weight": np.float32, "slices": np.uint8, "count": np.int32}
    with pytest.raises(ServingError, match=message):
        ExposureBatch("router", 1, (CANARY,), **{name: np.array(columns[name], types[name]) for name in types})


class UnreliableCollector:
    """A collector that fails, hangs, or counts a batch and loses its answer."""

    def __init__(self, *behaviours: str) -> None:
        self._behaviours = list(behaviours)
        self.counted: dict[int, int] = {}
        self.calls = 0

    async def send(self, batch: ExposureBatch) -> None:
        self.calls += 1
        behaviour = self._behaviours.pop(0) if self._behaviours else "answers"
        if behaviour == "fails":
            raise ConnectionError("no collector")
        if behaviour == "hangs":
            await asyncio.sleep(60)
        self.counted.setdefault(batch.number, len(batch.arm))
        if behaviour == "loses the answer":
            raise TimeoutError


def test_forwarding_repeats_a_batch_until_it_is_acknowledged(caplog: pytest.LogCaptureFixture) -> None:
    collector = UnreliableCollector("fails", "hangs", "loses the answer", "answers")
    with caplog.at_level(logging.WARNING):
        asyncio.run(_forward_two_batches(collector))
    assert collector.counted == {1: 1, 2: 1}
    assert [record.message.split(",")[0] for record in caplog.records] == [
        "exposures not acknowledged",
        "exposures acknowledged again",
    ]


async def _forward_two_batches(collector: UnreliableCollector) -> None:
    buffer = ExposureBuffer()
    buffer.add(CANARY, 1, 0.5, [0])
    task = asyncio.create_task(forward_exposures(buffer, collector.send, every_s=0.001, ack_timeout_s=0.02))
    async with asyncio.timeout(5):
        while collector.calls < 4 or buffer.next_batch() is not None:
            await asyncio.sleep(0.005)
        buffer.add(CANARY, 2, 0.5, [0])
        while len(collector.counted) < 2:
            await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
