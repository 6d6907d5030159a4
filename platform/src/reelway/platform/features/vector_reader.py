"""Reads the vectors that a vector log has received since the last read, on disk or on an object store.

The position names each file by a digest of its first line, with the offset of the next line. So a file that was renamed
when the log was full is continued, and a new file of the same name is read from its beginning.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Final

import fsspec

from reelway.platform.errors import ConfigError, MalformedFileError, StorageError
from reelway.platform.features.vector_log import PREVIOUS_SUFFIX, ServedVector
from reelway.platform.features.vector_retention import delete_expired

SUFFIX: Final = ".jsonl"

VectorPosition = dict[str, dict[str, Any]]
"""File -> ``id`` (digest of its first line) and ``offset`` of the next line in bytes."""


class VectorReader:
    """Reads a file, or all files below a folder or URL.

    Args:
        position: where the last reader ended; empty at first.

    Raises:
        ConfigError: if the URL cannot be opened.
    """

    def __init__(self, location: str | Path, position: Mapping[str, Mapping[str, Any]]) -> None:
        try:
            self._files, self._root = fsspec.core.url_to_fs(str(location))
        except (ValueError, ImportError) as error:
            raise ConfigError(f"vector log {str(location)!r}: cannot open the URL: {error}") from error
        self._before = {name: dict(where) for name, where in position.items()}
        self.position: VectorPosition = dict(self._before)
        """Position after the vectors that were yielded."""

    def vectors(self) -> Iterator[ServedVector]:
        """Yields the new vectors, oldest first for each file. A line that is not complete is left for the next read.

        Raises:
            MalformedFileError: if a complete line is not a served vector.
            StorageError: if the log cannot be read.
        """
        try:
            names = self._names()
            self.position = {name: where for name, where in self._before.items() if name in names}
            for name in names:
                yield from self._new_in(name)
        except OSError as error:
            raise StorageError(f"vector log {self._root}: cannot read it: {error}") from error

    def delete_old_segments(self, now_s: float | None = None) -> int:
        """Deletes logs of all pods that are too old or too large together. Returns the number of files.

        Raises:
            StorageError: if a file cannot be deleted.
        """
        try:
            deleted = delete_expired(self._files, self._root, time.time() if now_s is None else now_s)
        except OSError as error:
            raise StorageError(f"vector log {self._root}: cannot delete old files: {error}") from error
        for name in deleted:
            self.position.pop(name, None)
        return len(deleted)

    def _names(self) -> list[str]:
        """Returns the files without the suffix of older halves."""
        self._files.invalidate_cache()
        if self._files.isdir(self._root):
            found = (str(path).removesuffix(PREVIOUS_SUFFIX) for path in self._files.find(self._root))
            return sorted({name for name in found if name.endswith(SUFFIX)})
        exists = any(self._files.exists(self._root + suffix) for suffix in ("", PREVIOUS_SUFFIX))
        return [self._root] if exists else []

    def _new_in(self, name: str) -> Iterator[ServedVector]:
        known = self._before.get(name, {})
        with ExitStack() as stack:
            halves: list[tuple[str, str, BinaryIO]] = []  # newest first: a rename in between yields one file twice
            for path in (name, name + PREVIOUS_SUFFIX):
                try:
                    handle = stack.enter_context(self._files.open(path, "rb"))
                except FileNotFoundError:
                    continue
                digest = _digest_of_first_line(handle)
                if digest and digest not in [half[1] for half in halves]:
                    halves.append((path, digest, handle))
            if known.get("id") in [half[1] for half in halves]:
                halves = halves[: [half[1] for half in halves].index(known["id"]) + 1]
            for path, digest, handle in reversed(halves):
                offset = int(known["offset"]) if digest == known.get("id") else 0
                yield from self._lines_of(name, path, digest, handle, offset)

    def _lines_of(self, name: str, path: str, digest: str, handle: BinaryIO, offset: int) -> Iterator[ServedVector]:
        handle.seek(offset)
        for line in handle:
            if not line.endswith(b"\n"):
                break
            if not line.strip():  # a vector of an erased viewer, see erasure.vector_logs
                offset += len(line)
                self.position[name] = {"id": digest, "offset": offset}
                continue
            try:
                vector = ServedVector(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise MalformedFileError(
                    Path(path), f"a served vector as JSON at byte {offset}", seen=line[:80]
                ) from error
            offset += len(line)
            self.position[name] = {"id": digest, "offset": offset}
            yield vector


def _digest_of_first_line(handle: BinaryIO) -> str:
    line = handle.readline()
    return hashlib.sha256(line).hexdigest()[:32] if line.endswith(b"\n") else ""
