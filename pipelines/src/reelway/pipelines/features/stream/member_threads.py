"""Threads beside a member's main thread. A failure of one ends the member."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from reelway.pipelines.features.stream.metrics import StreamMetrics
from reelway.platform.supervised_thread import SupervisedThread


@contextmanager
def running_threads(
    targets: Mapping[str, Callable[[], None]], stop: threading.Event, ended: threading.Event, metrics: StreamMetrics
) -> Iterator[None]:
    """Runs each target on a thread of that name while the block runs.

    Args:
        targets: return after ``ended`` is set.
        stop: set when a target raises, so that the block ends.
        ended: set when the block ends; then the threads are joined.

    Raises:
        Exception: the first that a target raised, unless the block raised. Each is logged and counted.
    """
    failures: list[Exception] = []

    def run(target: Callable[[], None]) -> None:
        try:
            target()
        except Exception as error:
            failures.append(error)
            raise

    def end_member() -> None:
        metrics.count_fault()
        stop.set()

    threads = [
        SupervisedThread(run, args=(target,), name=name, on_failure=end_member) for name, target in targets.items()
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
