"""Accepts reported outcomes on behalf of a router: appends them to the event log and updates the viewers' memories."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Final

from reelway.platform.contracts.api import OutcomesRequest, OutcomesResponse
from reelway.platform.errors import ServingError
from reelway.platform.features.viewer_memory import ViewerMemory
from reelway.platform.tokens import TokenSigner
from reelway.serving.metrics import IntakeMetrics
from reelway.serving.outcomes.event_log_writer import EventLogWriter
from reelway.serving.outcomes.memory_writer import OutcomeMemoryWriter, memory_update
from reelway.serving.outcomes.reported import OutcomeColumns, read_outcomes

READ_INLINE: Final = 50
"""Outcomes of one request above which their tokens are checked on a thread, so that slates do not wait: about 1 ms."""
MEMORY_TIMEOUT_S: Final = 0.5
MAX_WAITING_REQUESTS: Final = 150
"""Requests that may wait for the event log. A router has 200 places for requests (``applications.router``); with a slow
log, outcomes must leave some of them to slates."""


class OutcomeIntake:
    """Validates outcomes and answers when they are in the event log.

    Args:
        memory: learns which videos were watched to the end, what was blocked and who was followed. A failed write is
            counted and repeated; it does not fail the request.
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
        self._memory = OutcomeMemoryWriter(memory, metrics) if memory else None
        self._clock = clock
        self._waiting = 0
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="outcomes")

    async def accept(self, request: OutcomesRequest, viewer_id: int | None = None) -> OutcomesResponse:
        """Records the valid outcomes and returns why the others were refused.

        Args:
            viewer_id: the proven viewer, whose outcomes alone are valid. None: nobody has proven an identity.

        Raises:
            ServingError: if too many outcomes are queued, or too many requests wait. None was accepted.
            StorageError: if the log cannot be written. Any may be in it; the client sends all again.
        """
        loop = asyncio.get_running_loop()
        reported, read = request.outcomes, partial(read_outcomes, received_at_s=self._clock())
        if len(reported) <= READ_INLINE:
            columns, refused = read(reported, self._signer, viewer_id)
        else:
            columns, refused = await loop.run_in_executor(self._threads, read, reported, self._signer, viewer_id)
        if refused:
            self._metrics.refused.inc(len(refused))
        if len(columns):
            with self._waiting_place():
                appended = asyncio.wrap_future(self._writer.append(columns))
                await asyncio.gather(appended, self._remember(columns))
        return OutcomesResponse(accepted=len(columns), refused=refused)

    def close(self) -> None:
        """Appends the accepted outcomes and writes them to the memories. A second call does nothing."""
        self._writer.close()
        if self._memory is not None:
            self._memory.close()
        self._threads.shutdown(wait=False)

    @contextmanager
    def _waiting_place(self) -> Iterator[None]:
        if self._waiting >= MAX_WAITING_REQUESTS:
            raise ServingError(f"event log: {self._waiting} requests wait for it; send the request again")
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    async def _remember(self, columns: OutcomeColumns) -> None:
        """Starts the update of the memories and waits for it for a moment, so that the next slate follows it."""
        update = memory_update(columns, self._clock())
        if self._memory is None or not len(update):
            return
        written = asyncio.wrap_future(self._memory.write(update))
        await asyncio.wait([written], timeout=MEMORY_TIMEOUT_S)
        if not written.done() or not written.result():
            self._metrics.memory_failures.inc()
