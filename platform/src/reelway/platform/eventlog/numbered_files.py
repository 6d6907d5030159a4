"""The files of a changelog: numbered changes, and snapshots that replace the changes up to their number.

::

    <folder>/snapshot-{sequence:020d}.arrow    everything as of that change
    <folder>/{sequence:020d}.arrow             one change after it

Files are written atomically and never changed. There is one writer and any number of readers, which may start at any
time and miss nothing. The folder is a path or an fsspec URL.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import fsspec
import pyarrow as pa

from reelway.platform.atomic_files import atomic_file
from reelway.platform.errors import DataError, StorageError

_CHANGE: Final = re.compile(r"(\d{20})\.arrow").fullmatch
_SNAPSHOT: Final = re.compile(r"snapshot-(\d{20})\.arrow").fullmatch
T = TypeVar("T")
Decode = Callable[[pa.Table, str, int, bool], T]
"""Decodes the table of a file from: the table, the file's path, the sequence, and whether it is a snapshot."""


class NumberedFiles:
    """The files at a path or fsspec URL. All methods block, and raise ``StorageError`` if the files are unreachable."""

    def __init__(self, location: str | Path) -> None:
        self._location = str(location)
        try:
            self._files, self._root = fsspec.core.url_to_fs(self._location)
        except (ValueError, ImportError) as error:
            raise StorageError(f"changelog {self._location!r}: {error}; expected a path or an fsspec URL") from error
        self._local = self._files.protocol in ("file", ("file", "local"))

    def write_change(self, sequence: int, table: pa.Table) -> None:
        """Writes a change. Writing the same change again has no effect."""
        self._write(f"{sequence:020d}.arrow", table)

    def write_snapshot(self, sequence: int, table: pa.Table) -> None:
        """Writes a snapshot and removes all files that were there before."""
        before = self._names()
        self._write(f"snapshot-{sequence:020d}.arrow", table)
        for name in before.values():  # a reader that is reading them lists the files again
            self._remove(name)

    def count_changes(self) -> int:
        """Returns the number of changes since the newest snapshot."""
        return len(_newest(self._names())[1])

    def read_after(self, sequence: int, decode: Decode[T]) -> list[T]:
        """Returns the changes after ``sequence`` (0: all), oldest first.

        If the next change has been deleted, the list starts with the snapshot that replaced it.

        Raises:
            DataError: if a file is not an Arrow file, or ``decode`` raises it.
        """
        for _ in range(10):
            names = self._names()
            base, changes = _newest(names)
            later = [change for change in changes if change > sequence]
            try:
                snapshot = [self._read(names[base], base, decode)] if -base > sequence else []
                return snapshot + [self._read(names[change], change, decode) for change in later]
            except FileNotFoundError:
                continue  # a snapshot replaced them in the meantime
        raise StorageError(f"changelog {self._location}: files are deleted faster than they can be read; read again")

    def _names(self) -> dict[int, str]:
        """Returns the files by sequence. The sequence of a snapshot is negative."""
        try:
            found = self._files.ls(self._root, detail=False, refresh=True) if self._exists() else []
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise StorageError(f"changelog {self._location}: cannot list it: {error}") from error
        names: dict[int, str] = {}
        for path in sorted(found):
            name = path.rsplit("/", 1)[-1]
            if match := _CHANGE(name):
                names.setdefault(int(match[1]), path)
            elif match := _SNAPSHOT(name):
                names[-int(match[1])] = path
        return names

    def _exists(self) -> bool:
        return bool(self._files.exists(self._root))

    def _read(self, path: str, sequence: int, decode: Decode[T]) -> T:
        try:
            content = self._files.cat_file(path)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageError(f"changelog {path}: cannot read it: {error}") from error
        try:
            table = pa.ipc.open_file(pa.py_buffer(content)).read_all()
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"changelog {path}: not an Arrow file: {error}") from error
        return decode(table, path, abs(sequence), sequence < 0)

    def _write(self, name: str, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        content: Any = sink.getvalue()
        path = f"{self._root}/{name}"
        if self._local:
            with atomic_file(Path(path)) as temporary:
                temporary.write_bytes(content)
            return
        try:
            self._files.pipe_file(path, content.to_pybytes())
        except OSError as error:
            raise StorageError(f"changelog {path}: cannot write it: {error}") from error

    def _remove(self, path: str) -> None:
        try:
            self._files.rm_file(path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageError(f"changelog {path}: cannot remove it: {error}") from error


def _newest(names: dict[int, str]) -> tuple[int, list[int]]:
    """Returns the newest snapshot as a key of ``names`` (0 if there is none), and the changes after it."""
    base = min((key for key in names if key < 0), default=0)
    return base, sorted(key for key in names if key > -base)
