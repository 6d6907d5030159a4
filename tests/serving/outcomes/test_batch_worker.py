"""The batching thread: shared batches, pacing, bounded queue, errors and shutdown."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import pytest

from reelway.platform.errors import ServingError, StorageError
from reelway.serving.outcomes.batch_worker import BatchWorker


class Handler:
    """Records batches. A batch waits for ``resume``, and fails if it contains ``bad``."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.started, self.resume = threading.Event(), threading.Event()
        self.resume.set()
        self.closed = False

    def __call__(self, items: Sequence[str]) -> list[str]:
        self.batches.append(list(items))
        self.started.set()
        assert self.resume.wait(10)
        if "bad" in items:
            raise StorageError("no space left on device")
        return [item.upper() for item in items]

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def handler() -> Handler:
    return Handler()


@pytest.fixture
def worker(handler: Handler) -> Iterator[BatchWorker[str, str]]:
    worker = BatchWorker[str, str](
        "test", handler, max_queued_rows=3, max_batch_rows=100, interval_s=0.0, on_close=handler.close
    )
    yield worker
    handler.resume.set()
    worker.close()


def test_items_submitted_during_a_batch_share_the_next(worker: BatchWorker[str, str], handler: Handler) -> None:
    handler.resume.clear()
    futures = [worker.submit("a", 1)]
    assert handler.started.wait(10)
    futures += [worker.submit("b", 1), worker.submit("c", 1)]
    handler.resume.set()
    assert [future.result(10) for future in futures] == ["A", "B", "C"]
    assert handler.batches == [["a"], ["b", "c"]]


def test_interval_collects_items(handler: Handler) -> None:
    worker = BatchWorker[str, str](
        "test", handler, max_queued_rows=99, max_batch_rows=3, interval_s=5.0, on_close=handler.close
    )
    worker.submit("a", 1).result(10)
    futures = []
    for item in "bcd":
        time.sleep(0.02)  # so far apart that only the interval can combine them
        futures.append(worker.submit(item, 1))
    assert [future.result(4) for future in futures] == ["B", "C", "D"], "a full batch does not wait for the interval"
    worker.close()
    assert handler.batches == [["a"], ["b", "c", "d"]]


def test_full_queue_rejects_items(worker: BatchWorker[str, str], handler: Handler) -> None:
    handler.resume.clear()
    worker.submit("big", 9)  # an empty queue accepts any size
    assert handler.started.wait(10)
    with pytest.raises(ServingError, match="9 rows are queued, at most 3 may be"):
        worker.submit("a", 1)
    handler.resume.set()
    deadline = time.monotonic() + 10
    while worker._queued_rows:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert worker.submit("a", 1).result(10) == "A"


def test_failed_batch_fails_all_of_its_futures(worker: BatchWorker[str, str], handler: Handler) -> None:
    handler.resume.clear()
    worker.submit("a", 1)
    assert handler.started.wait(10)
    futures = [worker.submit("bad", 1), worker.submit("b", 1)]
    handler.resume.set()
    for future in futures:
        with pytest.raises(StorageError, match="no space"):
            future.result(10)
    assert worker.submit("c", 1).result(10) == "C"


def test_close_handles_the_queued_items(worker: BatchWorker[str, str], handler: Handler) -> None:
    futures = [worker.submit(item, 1) for item in "abc"]
    worker.close()
    assert [future.result(0) for future in futures] == ["A", "B", "C"]
    assert handler.closed
    with pytest.raises(ServingError, match="closed"):
        worker.submit("d", 1)
    worker.close()


def test_future_of_an_item_cannot_be_cancelled(worker: BatchWorker[str, str]) -> None:
    future = worker.submit("a", 1)
    assert not future.cancel()
    assert future.result(10) == "A"
