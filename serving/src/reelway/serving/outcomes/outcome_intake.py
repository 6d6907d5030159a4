"""Accepts reported outcomes on behalf of a router: appends them to the event log and updates the viewers' memories."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from reelway.platform.contracts.api import OutcomesRequest, OutcomesResponse
from reelway.platform.contracts.events import OutcomeType
from reelway.platform.features.viewer_memory import ViewerMemory
from reelway.platform.tokens import TokenSigner
from reelway.serving.metrics import IntakeMetrics
from reelway.serving.outcomes.event_log_writer import EventLogWriter
from reelway.serving.outcomes.reported import OutcomeColumns, read_outcomes

log = logging.getLogger(__name__)

READ_INLINE: Final = 50
"""Outcomes of one request above which their tokens are checked on a thread, so that slates do not wait: about 1 ms."""
MEMORY_TIMEOUT_S: Final = 0.5


class OutcomeIntake:
    """Validates outcomes and answers when they are in the event log.

    Args:
        memory: learns which videos were watched to the end and what was blocked. A failure is counted and does not fail
            the request, because a stream rebuilds the memory from the event log.
        clock: Unix seconds.
    """

    def __init__(
        self,
        signer: TokenSigner,
        writer: EventLogWriter,
        metrics: IntakeMetrics,
        memory: ViewerMemory | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._signer = signer
        self._writer = writer
        self._metrics = metrics
        self._memory = memory
        self._clock = clock
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="outcomes")

    async def accept(self, request: OutcomesRequest) -> OutcomesResponse:
        """Records the valid outcomes and returns why the others were refused.

        Raises:
            ServingError: if too many outcomes are queued. None was accepted.
            StorageError: if the log cannot be written. Any may be in it; the client sends all again.
        """
        loop = asyncio.get_running_loop()
        reported = request.outcomes
        if len(reported) <= READ_INLINE:
            columns, refused = read_outcomes(reported, self._signer)
        else:
            columns, refused = await loop.run_in_executor(self._threads, read_outcomes, reported, self._signer)
        if refused:
            self._metrics.refused.inc(len(refused))
        if len(columns):
            appended = asyncio.wrap_future(self._writer.append(columns))
            await asyncio.gather(appended, self._remember(columns))
        return OutcomesResponse(accepted=len(columns), refused=refused)

    def close(self) -> None:
        """Appends the accepted outcomes. A second call does nothing."""
        self._writer.close()
        self._threads.shutdown(wait=False)

    async def _remember(self, columns: OutcomeColumns) -> None:
        memory = self._memory
        if memory is None:
            return
        loop = asyncio.get_running_loop()
        try:
            remembered = loop.run_in_executor(self._threads, remember, memory, columns, self._clock())
            await asyncio.wait_for(remembered, MEMORY_TIMEOUT_S)
        except Exception as error:  # the outcomes are in the log, from which the memory is rebuilt
            self._metrics.memory_failures.inc()
            log.warning("outcomes not remembered: %s: %s", type(error).__name__, error)


def remember(memory: ViewerMemory, columns: OutcomeColumns, now_s: float) -> None:
    """Passes on the videos watched to the end, the blocked creators and topics, and the followed creators."""
    watched = columns.watched_to_the_end
    if len(watched):
        memory.remember_watched(columns.viewer_id[watched], columns.video_id[watched], np.full(len(watched), now_s))
    creators = _by_viewer(columns, OutcomeType.BLOCK_CREATOR, columns.creator_id)
    topics = _by_viewer(columns, OutcomeType.BLOCK_TOPIC, columns.topic)
    for viewer in sorted(creators.keys() | topics.keys()):
        memory.block(viewer, creators=creators.get(viewer, []), topics=topics.get(viewer, []))
    for viewer, followed in _by_viewer(columns, OutcomeType.FOLLOW, columns.creator_id).items():
        memory.follow(viewer, followed)


def _by_viewer(columns: OutcomeColumns, kind: OutcomeType, of_video: NDArray[Any]) -> dict[int, list[int]]:
    """Returns the known values of the videos with an outcome of the type, by viewer."""
    rows = columns.rows_of_type(kind)
    rows = rows[of_video[rows] >= 0]
    values: dict[int, list[int]] = {}
    for viewer, value in zip(columns.viewer_id[rows].tolist(), of_video[rows].tolist(), strict=True):
        values.setdefault(viewer, []).append(value)
    return values
