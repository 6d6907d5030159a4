"""Sends impressions from a router to the collector in batches, ten times per second, each counted once.

A router never waits for the collector. It adds exposures to an ``ExposureBuffer``, and a task sends them. A batch
without an acknowledgement is sent again with the same number, so a collector that restarts loses nothing and counts
nothing twice. Only a full buffer drops exposures, and it counts them.
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

MAX_BUFFERED_ROWS: Final = 200_000
"""Rows that a buffer holds while the collector is unreachable: over a minute at 1,000 requests per second."""


class ArmKey(NamedTuple):
    """Key of one arm of a rollout. An arm with another release has another key."""

    rollout: str
    arm: Arm
    release: str


@dataclass(frozen=True, slots=True)
class ExposureBatch:
    """N rows, one per request and mask of slices. About 20 bytes per row.

    ``origin`` identifies one start of one router, which sends one batch at a time. ``number`` ascends; a batch whose
    number is not above the last one has been counted before. ``arms`` may contain arms without a row, whose series are
    published with zeros.
    """

    origin: str
    number: int
    arms: tuple[ArmKey, ...]
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
            raise ServingError(f"exposures of {self.origin}: an arm index outside of the {len(self.arms)} arms")
        if not (np.all(self.weight >= 0) and np.all(self.weight <= 1)):
            raise ServingError(f"exposures of {self.origin}: a weight outside 0..1; use sequential.overlap_weight")
        if self.slices.max() > ALL_SLICES or self.count.min() < 0:
            raise ServingError(f"exposures of {self.origin}: unknown slices or a negative count")


class ExposureBuffer:
    """Exposures that the collector has not acknowledged yet. Used by one thread, the event loop."""

    def __init__(self, max_rows: int = MAX_BUFFERED_ROWS) -> None:
        self._origin = secrets.token_hex(8)
        self._number = 0
        self._max_rows = max_rows
        self._arms: dict[ArmKey, int] = {}
        self._rows: list[tuple[int, int, float, int, int]] = []
        self._sent: ExposureBatch | None = None
        self.dropped = 0
        """Number of impressions dropped because the buffer was full."""

    def announce(self, arms: Iterable[ArmKey]) -> None:
        """Adds the arms of a new routing, so that their series exist before the first impression."""
        for arm in arms:
            if arm.rollout:
                self._code(arm)

    def add(self, arm: ArmKey, viewer_id: int, weight: float, slices: Sequence[int]) -> None:
        """Adds one slate, with one mask of slices per video. Slates outside of a rollout are ignored."""
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

    def next_batch(self) -> ExposureBatch | None:
        """The batch to send: the previous one until it is acknowledged, then the exposures added since."""
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
        """Marks a batch as on the collector's disk."""
        if self._sent is not None and batch.number == self._sent.number:
            self._sent = None

    def _code(self, arm: ArmKey) -> int:
        return self._arms.setdefault(arm, len(self._arms))


async def forward_exposures(
    buffer: ExposureBuffer,
    send: Callable[[ExposureBatch], Awaitable[object]],
    *,
    every_s: float = 0.1,
    ack_timeout_s: float = 10.0,
) -> None:
    """Sends the buffer's batches until it is cancelled. Exposures without an acknowledgement are then lost.

    Args:
        send: returns once the collector has the batch on disk; raises if that failed or is unknown.
        ack_timeout_s: seconds to wait for an acknowledgement before the batch is sent again.
    """
    failed = False
    while True:
        await asyncio.sleep(every_s)
        batch = buffer.next_batch()
        if batch is None:
            continue
        try:
            await asyncio.wait_for(send(batch), ack_timeout_s)
        except Exception as error:  # the transport may raise anything; the batch is sent again
            if not failed:
                log.warning("exposures not acknowledged, sending them again: %s: %s", type(error).__name__, error)
            failed = True
            await asyncio.sleep(min(10 * every_s, 1.0))
            continue
        if failed:
            log.warning("exposures acknowledged again")
        failed = False
        buffer.acknowledge(batch)
