"""Threads and tasks whose failure is counted and logged; a thread is restarted, or its owner acts.

A target of ``threading.Thread`` that raises ends its thread, and the process goes on without the work. All threads of
Reelway are therefore ``SupervisedThread``s; a test of the source code holds that.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

from prometheus_client import CollectorRegistry

from reelway.platform.telemetry import counter

log = logging.getLogger(__name__)

FAILURES: Final = counter(
    "reelway_thread_failures_total",
    "Threads and tasks that ended with an unexpected exception, by name.",
    ["thread"],
    None,
)
"""In no registry: a process with a registry of its own calls ``export_failures``; metric files need no registry."""
FIRST_RESTART_S: Final = 0.5
LAST_RESTART_S: Final = 30.0
RECOVERED_S: Final = 60.0
"""A thread that ran for so long is restarted after ``FIRST_RESTART_S`` again."""


def export_failures(registry: CollectorRegistry) -> None:
    """Adds the counter of this process's failed threads to a registry."""
    registry.register(FAILURES)


def supervise_task(task: asyncio.Task[Any], kind: str) -> None:
    """Counts and logs the exception of a task that nothing awaits."""
    failures = FAILURES.labels(kind)

    def report(done: asyncio.Task[Any]) -> None:
        if not done.cancelled() and (error := done.exception()) is not None:
            failures.inc()
            log.error("task %s failed with an unexpected error", kind, exc_info=error)

    task.add_done_callback(report)


class SupervisedThread(threading.Thread):
    """A thread that calls its target again after an exception, at first after half a second, later after 30 s.

    Args:
        target: returns when the work is done; then the thread ends.
        name: name of the thread.
        kind: value of the metric's label; ``name`` by default. It never contains an id.
        stop: set when the work ends; the target is not called again then.
        on_failure: called once instead of a restart. It ends the process or what belongs to the thread.
    """

    def __init__(
        self,
        target: Callable[..., object],
        *,
        name: str,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        daemon: bool | None = None,
        kind: str | None = None,
        stop: threading.Event | None = None,
        on_failure: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(name=name, daemon=daemon)
        self._call: Callable[[], object] = partial(target, *args, **(kwargs or {}))
        self._failures = FAILURES.labels(kind or name)
        self._stop_event = stop
        self._on_failure = on_failure

    def run(self) -> None:
        delay_s = FIRST_RESTART_S
        while True:
            began_s = time.monotonic()
            try:
                self._call()
                return
            except (Exception, SystemExit):  # a thread that exits does not end the process
                self._failures.inc()
                if self._on_failure is not None:
                    log.exception("thread %s failed with an unexpected error", self.name)
                    self._on_failure()
                    return
                if time.monotonic() - began_s > RECOVERED_S:
                    delay_s = FIRST_RESTART_S
                log.exception("thread %s failed with an unexpected error; restarting in %.1f s", self.name, delay_s)
            if self._wait(delay_s):
                return
            delay_s = min(2 * delay_s, LAST_RESTART_S)

    def _wait(self, delay_s: float) -> bool:
        """Waits before a restart. Returns whether the work was ended meanwhile."""
        if self._stop_event is not None:
            return self._stop_event.wait(delay_s)
        time.sleep(delay_s)
        return False
