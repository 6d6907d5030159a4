"""A bounded log of sampled feature vectors exactly as they were served, for the parity replay.

Each request is one JSON line. A hash of the request id selects requests, so every replica and every retry selects the
same ones. On disk, lines are appended to a file atomically and synced; when the log is full, its older half is deleted.
An object store cannot append, so lines become numbered objects (``vector_segments``). ``vector_reader`` reads both, and
``pipelines.features.parity`` compares the vectors.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from reelway.platform.errors import ConfigError, StorageError
from reelway.platform.features.hashing import mix64


@dataclass(frozen=True)
class ServedVector:
    """The features that one answer used.

    ``viewer`` has the fields of the viewer views. Each element of ``videos`` has ``video_id`` and the fields used of
    ``VIDEO_DENSE``, ``VIDEO_CATEGORIES``, ``creator_id`` and ``uploaded_at_s``. The two as-of times are the times
    of the rows, if the server has them (the release's snapshot time, the online store's time). If None, the replay
    chooses the time.
    """

    request_id: int
    viewer_id: int
    request_time_s: float
    device: str
    release: str
    viewer: Mapping[str, Any]
    videos: Sequence[Mapping[str, Any]]
    viewer_as_of_s: float | None = None
    videos_as_of_s: float | None = None
    served_at_s: float | None = None
    """Unix seconds of the router's clock; ``request_time_s`` may be a time that the client stated."""


PREVIOUS_SUFFIX: Final = ".1"
"""Suffix of the older half of a log."""
MAX_BYTES: Final = 256 << 20
"""Default size of a log, in bytes."""


def _to_json_value(value: Any) -> Any:
    """Converts to JSON types: numpy values to Python values, NaN to null."""
    if isinstance(value, np.ndarray):
        return [_to_json_value(item) for item in value.tolist()]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): _to_json_value(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json_value(item) for item in value]
    return value


class SampledVectors(ABC):
    """Serialises the vectors of sampled requests; subclasses store the lines.

    Raises:
        ConfigError: if ``ratio`` is outside 0..1.
    """

    def __init__(self, ratio: float) -> None:
        if not 0.0 <= ratio <= 1.0:
            raise ConfigError(f"vector log: sample ratio {ratio:g} is outside 0..1; use a share such as 0.01")
        self._limit = int(ratio * 2**64)
        self.on_lost: Callable[[int], None] = lambda _: None
        """Called by any thread with the number of vectors that ``append`` took and that could not be stored."""

    def is_sampled(self, request_id: int) -> bool:
        """Returns whether the request is in the sample; call it before collecting the rows."""
        return int(mix64(np.array([request_id], dtype=np.uint64))[0]) < self._limit

    def append(self, vector: ServedVector) -> bool:
        """Stores the vector if its request is in the sample. Returns whether it is.

        Raises:
            StorageError: if the disk is full, or the store cannot be written.
        """
        if not self.is_sampled(vector.request_id):
            return False
        line = json.dumps(_to_json_value(asdict(vector)), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        self._store(line)
        return True

    @abstractmethod
    def close(self) -> None:
        """Stores what still waits. A second call does nothing."""

    @abstractmethod
    def _store(self, line: bytes) -> None: ...


class VectorLog(SampledVectors):
    """Appends served vectors to a file. Threads and processes of one machine may share the file."""

    def __init__(self, path: Path, *, ratio: float = 0.01, max_bytes: int = MAX_BYTES) -> None:
        """Stores the settings; the file is opened at the first append.

        Args:
            ratio: share of requests logged, 0..1; 0 turns the log off.
            max_bytes: total size of the current and the previous file.

        Raises:
            ConfigError: if ``ratio`` is outside 0..1.
        """
        super().__init__(ratio)
        self.path = path
        self._half_bytes = max_bytes // 2
        self._lock = threading.Lock()

    def close(self) -> None:
        """Does nothing: every line is on disk when ``append`` returns."""

    def _store(self, line: bytes) -> None:
        try:
            with self._lock:
                self._append(line)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot write the vector log: {error.strerror or error}") from error

    def _append(self, line: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with log_lock(self.path):
            if self.path.exists() and self.path.stat().st_size + len(line) > self._half_bytes:
                self.path.replace(_previous(self.path))
            with self.path.open("ab+") as handle:
                if handle.seek(0, os.SEEK_END) and not _ends_with_newline(handle):
                    handle.truncate(_last_line_end(self.path))  # a crash cut the line off; it was never acknowledged
                handle.write(line)
                handle.flush()
                os.fsync(handle.fileno())


@contextmanager
def log_lock(path: Path) -> Iterator[None]:
    """Holds the lock of a log's file among threads and processes; its older half has the same lock."""
    guard = os.open(path.with_name(path.name + ".lock"), os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(guard, fcntl.LOCK_EX)
        yield
    finally:
        os.close(guard)


def host_log_path(path: Path) -> Path:
    """Returns the file to append to: the path itself, or this host's file in a folder that hosts share."""
    return path if path.suffix == ".jsonl" else path / f"{socket.gethostname()}.jsonl"


def _ends_with_newline(handle: BinaryIO) -> bool:
    handle.seek(-1, os.SEEK_END)
    return handle.read(1) == b"\n"


def _last_line_end(path: Path) -> int:
    return path.read_bytes().rfind(b"\n") + 1


def _previous(path: Path) -> Path:
    return path.with_name(path.name + PREVIOUS_SUFFIX)
