"""Erases viewers from the parity log: their lines become spaces of the same length.

So the offsets of all other lines, which a replay stores, stay valid. Readers skip lines of spaces.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from reelway.platform.atomic_files import atomic_file
from reelway.platform.errors import ConfigError, StorageError
from reelway.platform.features.vector_log import PREVIOUS_SUFFIX, log_lock
from reelway.platform.features.vector_reader import SUFFIX


def erase_vectors(location: str, viewer_ids: Collection[int], *, dry_run: bool = False) -> int:
    """Erases the viewers' vectors from a file, or from all files below a folder or URL. Returns the number found.

    Raises:
        ConfigError: if the URL cannot be opened.
        StorageError: if a file cannot be read or written.
    """
    try:
        files, root = fsspec.core.url_to_fs(location)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"vector log {location!r}: cannot open the URL: {error}") from error
    found = 0
    try:
        for name in _names(files, root):
            try:
                found += _erase_from(files, name, viewer_ids, dry_run)
            except FileNotFoundError:  # its writer has deleted it
                continue
    except OSError as error:
        raise StorageError(f"vector log {root}: cannot erase from it: {error}") from error
    return found


def _names(files: Any, root: str) -> list[str]:
    files.invalidate_cache()
    found = files.find(root) if files.isdir(root) else [root, root + PREVIOUS_SUFFIX]
    return sorted(name for name in found if name.removesuffix(PREVIOUS_SUFFIX).endswith(SUFFIX) and files.exists(name))


def _erase_from(files: Any, name: str, viewer_ids: Collection[int], dry_run: bool) -> int:
    if not isinstance(files, LocalFileSystem):
        lines, found = _blanked(files.cat_file(name).splitlines(keepends=True), viewer_ids)
        if found and not dry_run:
            files.pipe_file(name, b"".join(lines))
        return found
    path = Path(name)
    with log_lock(path.with_name(path.name.removesuffix(PREVIOUS_SUFFIX))):
        with path.open("rb") as handle:
            found = sum(_is_of(line, viewer_ids) for line in handle)
        if found and not dry_run:
            with atomic_file(path) as temporary, path.open("rb") as before, temporary.open("wb") as after:
                for line in before:
                    after.write(_blank(line) if _is_of(line, viewer_ids) else line)
    return found


def _blanked(lines: Iterable[bytes], viewer_ids: Collection[int]) -> tuple[list[bytes], int]:
    marked = [(line, _is_of(line, viewer_ids)) for line in lines]
    return [_blank(line) if is_of else line for line, is_of in marked], sum(is_of for _, is_of in marked)


def _blank(line: bytes) -> bytes:
    return b" " * (len(line) - 1) + b"\n"


def _is_of(line: bytes, viewer_ids: Collection[int]) -> bool:
    """Returns whether a line is a vector of one of the viewers. A line that was cut off is none."""
    if not any(b'"viewer_id":%d' % viewer in line for viewer in viewer_ids):
        return False
    try:
        vector = json.loads(line)
    except ValueError:
        return False
    return isinstance(vector, dict) and vector.get("viewer_id") in viewer_ids
