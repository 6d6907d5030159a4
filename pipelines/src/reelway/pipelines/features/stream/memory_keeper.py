"""Keeps the viewers' memory complete while a stream runs: rebuilds it from the event log after a loss."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from reelway.pipelines.features.stream.memory_rebuild import rebuild_viewer_memory
from reelway.pipelines.features.stream.metrics import StreamMetrics
from reelway.platform.errors import ReelwayError
from reelway.platform.eventlog.topics import Topic, open_topic
from reelway.platform.features.viewer_memory import ViewerMemory, open_viewer_memory
from reelway.platform.supervised_thread import SupervisedThread

if TYPE_CHECKING:
    from feast import FeatureStore

log = logging.getLogger(__name__)

CHECK_INTERVAL_S: Final = 10.0
"""Interval between two checks of the store's marker."""


@contextmanager
def viewer_memory_kept_complete(store: FeatureStore, events: str | Path, metrics: StreamMetrics) -> Iterator[None]:
    """Checks the viewers' memory of an online store on a thread while the block runs.

    Several processes may check the same store, because a rebuild is idempotent. A failed check is
    logged, counted and repeated. The end of the block stops a rebuild that runs.

    Args:
        events: address of the event log.
    """
    memory, stop = open_viewer_memory(store), threading.Event()
    thread = SupervisedThread(check_until, args=(memory, events, metrics, stop), name="viewer memory", stop=stop)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def check_until(
    memory: ViewerMemory, events: str | Path, metrics: StreamMetrics, stop: threading.Event, *,
    interval_s: float = CHECK_INTERVAL_S,
) -> None:  # fmt: skip
    """Checks the memory, and rebuilds it if it is not complete, until ``stop`` is set. See the block's description."""
    while not stop.is_set():
        try:
            is_complete = memory.is_complete()
            metrics.record_viewer_memory(is_complete)
            if not is_complete:
                with (
                    closing(open_topic(events, Topic.EXPOSURES)) as exposures,
                    closing(open_topic(events, Topic.OUTCOMES)) as outcomes,
                ):
                    rebuild_viewer_memory(memory, exposures, outcomes, time.time(), stop)
                metrics.record_viewer_memory(memory.is_complete())
        except Exception as error:  # the stream goes on, and the next check may succeed
            metrics.record_viewer_memory(False)
            metrics.count_viewer_memory_fault()
            log.error(
                "viewer memory: not checked, trying again in %g s: %s", interval_s, error,
                exc_info=not isinstance(error, ReelwayError),
            )  # fmt: skip
        stop.wait(interval_s)
