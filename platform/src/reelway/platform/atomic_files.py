"""Files and folders written atomically: complete or absent, even after a crash or on a full disk.

The content is written beside the target, synced and renamed. What SIGKILL leaves behind is a hidden temporary file or
folder; ``atomic_directory`` removes the folders of earlier writers after ``ABANDONED_S``.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from reelway.platform.errors import StorageError

ABANDONED_S: Final = 3 * 86_400.0
"""Seconds after which a temporary folder belongs to a writer that was killed."""


def fsync_directory(folder: Path) -> None:
    """Makes a rename within ``folder`` survive a power failure."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` that replaces ``path`` when the block ends, and is deleted if it raises.

    Raises:
        StorageError: if the disk is full or not writable; ``path`` is unchanged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    os.close(fd)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
        fsync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path}: {error.strerror or error}; it is unchanged") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside ``path`` that replaces ``path`` at the end, and is deleted if the block raises.

    Raises:
        StorageError: if the disk is full or not writable; ``path`` is unchanged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        temporary.chmod(0o755)
        if path.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            path.replace(retired / "old")
            temporary.replace(path)
            shutil.rmtree(retired, ignore_errors=True)
        else:
            temporary.replace(path)
        fsync_directory(path.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise StorageError(f"cannot write {path}: {error.strerror or error}; it is unchanged") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _remove_abandoned(path: Path) -> None:
    """Removes the temporary folders of ``path`` that no writer can still use."""
    for folder in path.parent.glob(f".{glob.escape(path.name)}.*"):
        with suppress(FileNotFoundError):  # another writer removes it
            if folder.is_dir() and time.time() - folder.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(folder)


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` atomically as indented JSON with sorted keys."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True, default=str) + "\n")


def create_private_file(path: Path, content: bytes) -> None:
    """Creates a file that only its owner can read (mode 0600), atomically, and never replaces an existing one.

    A hard link, unlike a rename, fails if another process has created ``path`` in the meantime.

    Raises:
        FileExistsError: if ``path`` exists.
        StorageError: if the disk is full or not writable; ``path`` does not exist.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        with os.fdopen(fd, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        _link_or_create(path, Path(name), content)
        fsync_directory(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        Path(name).unlink(missing_ok=True)


def _link_or_create(path: Path, written: Path, content: bytes) -> None:
    """Makes the written file appear at ``path``. File systems without hard links get an exclusive creation instead."""
    try:
        path.hardlink_to(written)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())


def ensure_private_token(path: Path) -> None:
    """Writes 64 random hex digits to ``path`` (mode 0600) unless it exists. Safe between processes.

    Raises:
        StorageError: if the folder cannot be searched or the file cannot be written.
    """
    try:
        if path.exists():
            return
    except OSError as error:  # such as a folder without the right to search it
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
    with suppress(FileExistsError):  # another process was faster
        create_private_file(path, secrets.token_hex(32).encode())
