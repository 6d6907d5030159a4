"""The batching thread: order of batches, and housekeeping between them."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from reelway.serving.outcomes.batch_worker import BatchWorker


def test_item_that_ends_a_batch_separates_batches() -> None:
    batches: list[list[str]] = []
    started, resume = threading.Event(), threading.Event()

    def handle(items: Sequence[str]) -> list[str]:
        batches.append(list(items))
        started.set()
        resume.wait(10)
        return [item.upper() for item in items]

    worker = BatchWorker[str, str](
        "test", handle, max_queued_rows=100, max_batch_rows=100, interval_s=0.0, on_close=lambda: None
    )
    futures = [worker.submit("a", 1)]
    assert started.wait(10)  # the following items wait for this batch
    futures += [worker.submit("b", 1), worker.submit("c", 1, ends_batch=True), worker.submit("d", 1)]
    resume.set()
    assert [future.result(10) for future in futures] == ["A", "B", "C", "D"]
    worker.close()
    assert batches == [["a"], ["b", "c"], ["d"]]


def test_housekeeping_runs_without_items() -> None:
    calls, twice, closed = [], threading.Event(), threading.Event()

    def housekeeping() -> float:
        calls.append(1)
        if len(calls) == 2:
            twice.set()
        return 0.01

    worker = BatchWorker[str, str](
        "test", list, max_queued_rows=1, max_batch_rows=1, interval_s=0.0, housekeeping=housekeeping,
        on_close=closed.set,
    )  # fmt: skip
    assert twice.wait(10)
    worker.close()
    assert closed.is_set()
