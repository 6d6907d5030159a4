"""Impressions on their way from a router to the collector: a few columns per tenth of a second, counted once.

A router never waits for the collector: it notes what it shows in an ``ExposureBuffer`` and a task sends what has
gathered. A batch that was not acknowledged is sent again, with its number, so a collector that restarts loses nothing
and counts nothing twice. Only a buffer that is full drops, and it says how much.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from reelway.platform.contracts.events import Arm
from reelway.platform.errors import ServingError
from reelway.platform.tokens import ALL_SLICES

log = logging.getLogger(__name__)

MAX_ROWS: Final = 200_000
"""What a buffer holds while nobody takes it: over a minute at 1,000 requests a second."""


class ExposedArm(NamedTuple):
    """One side of a rollout. An arm that gets another release is another one."""

    rollout: str
    arm: Arm
    release: str


@dataclass(frozen=True, slots=True)
class ExposureBatch:
    """Shapes: N rows, one per (request, mask of slices). About 20 bytes a row.

    ``origin`` names one start of one router, which sends one batch at a time; ``number`` ascends, and one that is not
    above the last is a batch that was counted. ``arms`` may name arms without a row: these are published with zeros,
    so that "nobody yet" differs from "nobody knows".
    """

    origin: str
    number: int
    arms: tuple[ExposedArm, ...]
    arm: NDArray[np.int32]  # index into arms
    viewer_id: NDArray[np.int64]
    weight: NDArray[np.float32]  # overlap weight, as in the tokens
    slices: NDArray[np.uint8]  # tokens.SLICE_BITS
    count: NDArray[np.int32]  # impressions of this request with these slices

    def __post_init__(self) -> None:
        rows = {len(column) for column in (self.arm, self.viewer_id, self.weight, self.slices, self.count)}
        if len(rows) != 1:
            raise ServingError(f"exposures of {self.origin}: columns of {sorted(rows)} rows, expected equal lengths")
        if not len(self.arm):
            return
        if not (self.arm.min() >= 0 and self.arm.max() < len(self.arms)):
            raise ServingError(f"exposures of {self.origin}: an arm outside of the {len(self.arms)} that are named")
        if not (np.all(self.weight >= 0) and np.all(self.weight <= 1)):
            raise ServingError(f"exposures of {self.origin}: a weight outside 0..1; use sequential.overlap_weight")
        if self.slices.max() > ALL_SLICES or self.count.min() < 0:
            raise ServingError(f"exposures of {self.origin}: unknown slices or a negative count")


class ExposureBuffer:
    """What a router has shown and the collector has not acknowledged. For one thread (the event loop)."""

    def __init__(self, max_rows: int = MAX_ROWS) -> None:
        self._origin = secrets.token_hex(8)
        self._number = 0
        self._max_rows = max_rows
        self._arms: dict[ExposedArm, int] = {}
        self._rows: list[tuple[int, int, float, int, int]] = []
        self._sent: ExposureBatch | None = None
        self.dropped = 0
        """Impressions that found the buffer full."""

    def announce(self, arms: Iterable[ExposedArm]) -> None:
        """Name the arms of a new routing, so that each is published before its first impression."""
        for arm in arms:
            if arm.rollout:
                self._code(arm)

    def add(self, arm: ExposedArm, viewer_id: int, weight: float, slices: Sequence[int]) -> None:
        """Note one slate: one mask of slices per video shown. Outside of a rollout nothing is noted."""
        if not arm.rollout:
            return
        if len(self._rows) >= self._max_rows:
            self.dropped += len(slices)
            return
        code = self._code(arm)
        if not any(slices):
            self._rows.append((code, viewer_id, weight, 0, len(slices)))
            return
        for mask, count in Counter(slices).items():
            self._rows.append((code, viewer_id, weight, mask, count))

    def take(self) -> ExposureBatch | None:
        """The batch to send now: the last one again until it is acknowledged, then what has gathered since."""
        if self._sent is None and (self._rows or self._arms):
            self._number += 1
            columns = tuple(zip(*self._rows, strict=True)) or ((),) * 5
            self._sent = ExposureBatch(
                self._origin, self._number, tuple(self._arms),
                np.array(columns[0], np.int32), np.array(columns[1], np.int64), np.array(columns[2], np.float32),
                np.array(columns[3], np.uint8), np.array(columns[4], np.int32),
            )  # fmt: skip
            self._rows, self._arms = [], {}
        return self._sent

    def acknowledge(self, batch: ExposureBatch) -> None:
        """The collector has it on disk."""
        if self._sent is not None and batch.number == self._sent.number:
            self._sent = None

    def _code(self, arm: ExposedArm) -> int:
        return self._arms.setdefault(arm, len(self._arms))


async def forward_exposures(
    buffer: ExposureBuffer,
    send: Callable[[ExposureBatch], Awaitable[object]],
    *,
    every_s: float = 0.1,
    patience_s: float = 10.0,
) -> None:
    """Send what the buffer holds, for ever. Cancel it to stop; what was not acknowledged is then lost with the router.

    Args:
        send: returns when the collector has the batch on disk, raises when it has not or nobody knows.
        patience_s: for one answer, before it is sent again.
    """
    failed = False
    while True:
        await asyncio.sleep(every_s)
        batch = buffer.take()
        if batch is None:
            continue
        try:
            await asyncio.wait_for(send(batch), patience_s)
        except Exception as error:  # whatever carries it may raise anything; nothing is lost, it is sent again
            if not failed:
                log.warning(
                    "exposures are not taken, they are kept and sent again: %s: %s", type(error).__name__, error
                )
            failed = True
            await asyncio.sleep(min(10 * every_s, 1.0))
            continue
        if failed:
            log.warning("exposures are taken again")
        failed = False
        buffer.acknowledge(batch)
