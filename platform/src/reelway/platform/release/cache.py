"""The releases in a node's cache: which of them are in use, and the removal of the others.

A process that serves a release holds it: a shared lock on a file beside the release's folder, which the operating
system releases when the process ends. All applications of routed and warm releases hold theirs. ``prune`` removes
releases that no process holds and that were not fetched for a while, and what an interrupted download left.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from reelway.platform.contracts.ids import ReleaseId, short_id
from reelway.platform.errors import StorageError

log = logging.getLogger(__name__)

UNUSED_RETENTION_S: Final = 3600.0
"""Seconds for which a release stays in the cache after its last use: for rollbacks, and until a fetched one is held."""
_RELEASE: Final = re.compile(r"[0-9a-f]{64}")
_PARTIAL: Final = re.compile(r"\.([0-9a-f]{64})\.(?!lock$|use$).+")


class ReleaseUse:
    """The use of a cached release. It ends with ``close``, with the object, or with the process."""

    def __init__(self, locked: int) -> None:
        self._end = weakref.finalize(self, os.close, locked)

    def close(self) -> None:
        """Ends the use. A second call does nothing."""
        self._end()


class ReleaseCache:
    """The folder in which ``ReleaseStore.fetch`` keeps releases. All processes of the node may use it."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._clock = clock

    def hold(self, release: ReleaseId) -> ReleaseUse:
        """Marks a release as in use, whether or not it is in the cache yet.

        Raises:
            StorageError: if the cache cannot be written.
        """
        path = self._folder / f".{release}.use"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            while True:
                use = ReleaseUse(locked := os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644))
                fcntl.flock(locked, fcntl.LOCK_SH)
                if _is_at(locked, path):  # ``prune`` may have removed the file before it was locked
                    break
                use.close()
            if (target := self._folder / release).exists():
                os.utime(target, (self._clock(), self._clock()))
        except OSError as error:
            raise StorageError(
                f"cannot write to the release cache {self._folder}: {error.strerror or error}"
            ) from error
        return use

    def prune(self) -> list[str]:
        """Removes unused releases and partial downloads. Returns the names of what was removed.

        An error is logged: a cache that cannot be pruned does not keep a release from being served.
        """
        removed = []
        try:
            found = sorted(self._folder.iterdir()) if self._folder.is_dir() else []
            for path in found:
                if partial := _PARTIAL.fullmatch(path.name):
                    gone = self._remove_partial(path, partial[1])
                else:
                    gone = bool(_RELEASE.fullmatch(path.name)) and self._remove_unused(path)
                removed += [path.name] if gone else []
        except OSError as error:
            log.warning("release cache %s: not pruned: %s", self._folder, error)
        for name in removed:
            log.info("release cache %s: removed %s", self._folder, short_id(name.lstrip(".")))
        return removed

    def _remove_partial(self, path: Path, release: str) -> bool:
        with _free_lock(self._folder / f".{release}.lock") as free:
            if free:  # else the download is in progress
                shutil.rmtree(path)
        return free

    def _remove_unused(self, path: Path) -> bool:
        if self._clock() - path.stat().st_mtime < UNUSED_RETENTION_S:
            return False
        use = path.with_name(f".{path.name}.use")
        with _free_lock(path.with_name(f".{path.name}.lock")) as fetched, _free_lock(use) as unused:
            if not (fetched and unused):
                return False
            shutil.rmtree(path)
            use.unlink(missing_ok=True)
        return True


@contextmanager
def _free_lock(path: Path) -> Iterator[bool]:
    """Holds the exclusive lock while the block runs. Yields False if another process holds it."""
    with path.open("ab") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _is_at(opened: int, path: Path) -> bool:
    try:
        return os.fstat(opened).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False
