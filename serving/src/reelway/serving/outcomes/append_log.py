"""The part of an event log that a writer uses, and a log that is opened when the first record is appended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from reelway.platform.eventlog import LogRecord


class AppendLog(Protocol):
    """The members of ``EventLog`` that append."""

    @property
    def partitions(self) -> int: ...

    @property
    def max_record_bytes(self) -> int: ...

    def append(self, records: Sequence[LogRecord]) -> list[int]: ...

    def close(self) -> None: ...


class LazyLog:
    """Opens a log at its first use. A router therefore starts, and serves, while the log cannot be reached.

    One thread calls all methods.
    """

    def __init__(self, open_log: Callable[[], AppendLog]) -> None:
        self._open_log = open_log
        self._log: AppendLog | None = None

    def get(self) -> AppendLog:
        """Returns the open log.

        Raises:
            StorageError: if it cannot be opened; the next call tries again.
        """
        if self._log is None:
            self._log = self._open_log()
        return self._log

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
