"""A thread that handles queued work in batches, and a bounded queue in front of it.

Many requests share one transaction or one append, and no event loop waits for a disk.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from reelway.platform.errors import ServingError
from reelway.platform.supervised_thread import SupervisedThread

log = logging.getLogger(__name__)

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(slots=True)
class _Request(Generic[_Item, _Result]):
    item: _Item
    rows: int
    done: Future[_Result] = field(default_factory=Future)


class BatchWorker(Generic[_Item, _Result]):
    """Calls ``handle`` with batches of submitted items, on a thread of its own.

    Args:
        name: name of the thread, and of the worker in messages.
        handle: handles one batch; returns one result per item. If it raises, every future of the batch fails with the
            exception and the next batch is tried.
        max_queued_rows: rows that may wait; more are rejected. An empty queue accepts an item of any size.
        max_batch_rows: a batch is closed when it has this many rows.
        interval_s: shortest time between two batches. After a rest, the first batch is handled immediately.
        on_close: called by the thread when it ends.
    """

    def __init__(
        self,
        name: str,
        handle: Callable[[Sequence[_Item]], Sequence[_Result]],
        *,
        max_queued_rows: int,
        max_batch_rows: int,
        interval_s: float,
        on_close: Callable[[], None],
    ) -> None:
        self._name = name
        self._handle = handle
        self._max_queued_rows = max_queued_rows
        self._max_batch_rows = max_batch_rows
        self._interval_s = interval_s
        self._on_close = on_close
        self._requests: queue.SimpleQueue[_Request[_Item, _Result] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards the two below
        self._queued_rows = 0
        self._closed = False
        self._thread = SupervisedThread(self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, item: _Item, rows: int) -> Future[_Result]:
        """Queues an item. Its future cannot be cancelled: the item is handled even if its caller stops waiting.

        Args:
            rows: number of rows that the item adds to the limits.

        Raises:
            ServingError: if too many rows are queued, or the worker is closed. The item was not queued.
        """
        request = _Request[_Item, _Result](item, rows)
        with self._lock:
            if self._closed:
                raise ServingError(f"{self._name}: closed; send the request again in a moment")
            if self._queued_rows and self._queued_rows + rows > self._max_queued_rows:
                raise ServingError(
                    f"{self._name}: {self._queued_rows} rows are queued, at most {self._max_queued_rows} may be; "
                    "send the request again"
                )
            self._queued_rows += rows
            request.done.set_running_or_notify_cancel()
            self._requests.put(request)
        return request.done

    def close(self) -> None:
        """Rejects new items and returns when all queued items are handled. A second call does nothing."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._requests.put(None)
        self._thread.join()

    def _run(self) -> None:
        next_batch_at, running = 0.0, True
        while running:
            batch, running = self._gather(next_batch_at)
            if batch:
                self._handle_batch(batch)
                next_batch_at = time.monotonic() + self._interval_s
        self._on_close()

    def _gather(self, next_batch_at: float) -> tuple[list[_Request[_Item, _Result]], bool]:
        """Waits for the next batch. Returns it, empty at the end, and whether the worker continues."""
        request = self._requests.get()
        batch, rows = [], 0
        while request is not None:
            batch.append(request)
            rows += request.rows
            if rows >= self._max_batch_rows:
                return batch, True
            try:
                request = self._requests.get(timeout=max(next_batch_at - time.monotonic(), 0.0))
            except queue.Empty:
                return batch, True
        return batch, False

    def _handle_batch(self, batch: Sequence[_Request[_Item, _Result]]) -> None:
        try:
            results = self._handle([request.item for request in batch])
        except Exception as error:  # every caller must see the error, and the next batch may succeed
            log.exception("%s: a batch of %d requests failed", self._name, len(batch))
            for request in batch:
                request.done.set_exception(error)
            return
        finally:
            with self._lock:
                self._queued_rows -= sum(request.rows for request in batch)
        for request, result in zip(batch, results, strict=True):
            request.done.set_result(result)
