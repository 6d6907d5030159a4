"""The vector log on an object store: lines are collected in memory and written as one object per interval.

::

    <url>/<host>-<process>/<unix ms>.jsonl

Vectors of the last interval are lost if the process is killed; no request waits for the store. An object that cannot
be written is dropped, with a warning and counted by ``on_lost``. The writer deletes its oldest objects beyond a size,
and what ``vector_retention`` allows no longer, of its own and of other processes.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections import deque
from pathlib import Path
from typing import Final

import fsspec

from reelway.platform.errors import ConfigError
from reelway.platform.features.vector_log import MAX_BYTES, SampledVectors, VectorLog, host_log_path
from reelway.platform.features.vector_retention import delete_expired
from reelway.platform.supervised_thread import SupervisedThread

log = logging.getLogger(__name__)

INTERVAL_S: Final = 10.0
"""Seconds between two objects."""
RETENTION_INTERVAL_S: Final = 3600.0
MAX_PENDING_BYTES: Final = 8 << 20
"""An object is also written when so many bytes wait."""


class VectorSegments(SampledVectors):
    """Writes served vectors below a URL. Threads may share the object; a thread writes what waits every interval.

    Args:
        ratio: share of requests logged, 0..1.
        max_bytes: size of this process's objects.

    Raises:
        ConfigError: if ``ratio`` is outside 0..1, or the URL cannot be opened.
    """

    def __init__(
        self, url: str, *, ratio: float = 0.01, max_bytes: int = MAX_BYTES, interval_s: float = INTERVAL_S
    ) -> None:
        super().__init__(ratio)
        try:
            self._files, root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"vector log {url!r}: cannot open the URL: {error}") from error
        self._root, self._next_retention = root.rstrip("/"), 0.0
        self._folder = f"{self._root}/{socket.gethostname()}-{os.getpid()}"
        self._max_bytes, self._interval_s = max_bytes, interval_s
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._written: deque[tuple[str, int]] = deque()
        self._last_ms = 0
        self._stop = threading.Event()
        self._thread = SupervisedThread(self._write_until_stopped, name="vector-segments", daemon=True, stop=self._stop)
        self._thread.start()

    def _store(self, line: bytes) -> None:
        with self._lock:
            self._pending.append(line)
            self._pending_bytes += len(line)
            full = self._pending_bytes >= MAX_PENDING_BYTES
        if full:
            self.flush()

    def flush(self) -> None:
        """Writes the collected vectors as one object."""
        with self._writing:
            with self._lock:
                lines, self._pending, self._pending_bytes = self._pending, [], 0
            if not lines:
                return
            content = b"".join(lines)
            self._last_ms = max(self._last_ms + 1, int(time.time() * 1000))
            path = f"{self._folder}/{self._last_ms:015d}.jsonl"
            try:
                self._files.makedirs(self._folder, exist_ok=True)
                self._files.pipe_file(path, content)
            except Exception as error:  # every client library has its own errors
                log.warning("parity samples lost: vectors=%d path=%s error=%s", len(lines), path, error)
                self.on_lost(len(lines))
                return
            self._written.append((path, len(content)))
            try:
                self._delete_oldest()
                self._delete_expired()
            except Exception as error:  # see above
                log.warning("old parity samples not deleted: folder=%s error=%s", self._folder, error)

    def close(self) -> None:
        """Writes what is left and stops the thread."""
        self._stop.set()
        self._thread.join()
        self.flush()

    def _delete_oldest(self) -> None:
        while len(self._written) > 1 and sum(size for _, size in self._written) > self._max_bytes:
            path, _ = self._written.popleft()
            if self._files.exists(path):
                self._files.rm_file(path)

    def _delete_expired(self) -> None:
        if time.monotonic() >= self._next_retention:
            self._next_retention = time.monotonic() + RETENTION_INTERVAL_S
            delete_expired(self._files, self._root, time.time())

    def _write_until_stopped(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.flush()


def open_vector_log(location: str, *, ratio: float) -> SampledVectors:
    """Opens the log at a URL of an object store, at a file, or this host's file in a folder that hosts share.

    Raises:
        ConfigError: if ``ratio`` is outside 0..1, or the URL cannot be opened.
    """
    if "://" in location:
        return VectorSegments(location, ratio=ratio)
    path = host_log_path(Path(location))
    if path != Path(location):
        _delete_expired_files(path.parent)
    return VectorLog(path, ratio=ratio)


def _delete_expired_files(folder: Path) -> None:
    """Deletes the old logs of hosts that are gone. Without it the log works, so an error is only logged."""
    try:
        delete_expired(fsspec.filesystem("file"), str(folder), time.time())
    except OSError as error:
        log.warning("old parity samples not deleted: folder=%s error=%s", folder, error)
