"""Bounds the vector logs of all pods together, by age and by size.

A pod bounds its own log (``vector_log``, ``vector_segments``), but pods come and go, and a log that is never replayed
has no reader that deletes it. Writers and the reader call ``delete_expired``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

from fsspec import AbstractFileSystem

from reelway.platform.retention import HOUR_S, retention

log = logging.getLogger(__name__)

MAX_TOTAL_BYTES: Final = 2 << 30
"""Size of all logs below one URL or folder. Beyond it the oldest files are deleted."""
SUFFIXES: Final = (".jsonl", ".jsonl.1")


def delete_expired(
    files: AbstractFileSystem, root: str, now_s: float, *, max_total_bytes: int = MAX_TOTAL_BYTES
) -> list[str]:
    """Deletes what is too old, then the oldest files beyond the size. Returns the paths; a single file is left alone.

    ``Retention.parity_hours`` is the age from which vectors are deleted, whether or not they were replayed.

    Raises:
        OSError: if the folder cannot be listed or a file cannot be deleted. Client libraries may raise other errors.
    """
    if not files.isdir(root):
        return []
    oldest_s = now_s - retention().parity_hours * HOUR_S
    found = sorted(_logs(files, root))
    kept_bytes = sum(size for _, size, _ in found)
    deleted = []
    for written_s, size, path in found:
        if written_s >= oldest_s and kept_bytes <= max_total_bytes:
            break
        with suppress(FileNotFoundError):  # another process deleted it
            files.rm_file(path)
        kept_bytes -= size
        deleted.append(path)
    if deleted:
        log.info("vector logs deleted: folder=%s files=%d", root, len(deleted))
    return deleted


def _logs(files: AbstractFileSystem, root: str) -> Iterator[tuple[float, int, str]]:
    """Yields time of writing in Unix seconds, size and path."""
    files.invalidate_cache(root)
    for path, info in files.find(root, detail=True).items():
        if str(path).endswith(SUFFIXES):
            yield _written_s(str(path), info), int(info["size"]), str(path)


def _written_s(path: str, info: dict[str, Any]) -> float:
    """Returns when the vectors were written: the name of an object states it, a file has a time of change."""
    stem = path.rsplit("/", 1)[-1].removesuffix(".jsonl")
    if stem.isdecimal():
        return int(stem) / 1000
    return float(info.get("mtime", time.time()))
