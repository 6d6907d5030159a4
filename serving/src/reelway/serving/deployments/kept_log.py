"""An event log that another application keeps: routers append to it through a Ray Serve handle.

It serves a cluster without Kafka, whose routers share no file. Nothing is logged while that application is down.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

from reelway.platform.errors import StorageError
from reelway.platform.eventlog import LogRecord
from reelway.platform.eventlog.sqlite_log import MAX_RECORD_BYTES
from reelway.platform.eventlog.topics import Topic

APPEND_TIMEOUT_S: Final = 10.0

Append = Callable[[Topic, Sequence[LogRecord]], Coroutine[Any, Any, list[int]]]


class KeptLog:
    """The appending part of one topic's log. Threads call ``append``; the call runs on an event loop.

    Args:
        append: appends to the topic and returns the offsets.
        loop: a running event loop, of another thread than the callers.
    """

    partitions = 1
    max_record_bytes = MAX_RECORD_BYTES

    def __init__(self, topic: Topic, append: Append, loop: asyncio.AbstractEventLoop) -> None:
        self._topic = topic
        self._append = append
        self._loop = loop

    def append(self, records: Sequence[LogRecord]) -> list[int]:
        """See ``EventLog.append``."""
        appended = asyncio.run_coroutine_threadsafe(self._append(self._topic, records), self._loop)
        try:
            return appended.result(APPEND_TIMEOUT_S)
        except Exception as error:  # the transport may raise anything; the records are appended again
            appended.cancel()
            detail = str(error) or type(error).__name__
            raise StorageError(f"event log {self._topic}: the application that keeps it failed: {detail}") from error

    def close(self) -> None:
        """Does nothing: the other application closes the log."""
