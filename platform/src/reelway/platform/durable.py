"""Writes that are whole or absent: aside, synced, renamed. A crash or a full disk leaves no half-written file."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reelway.platform.errors import StorageError


def sync_folder(folder: Path) -> None:
    """Make a rename within ``folder`` survive power loss."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def whole_transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All of the block's writes are in the file when it is left, or none of them; nobody else writes meanwhile.

    The connection must begin no transactions by itself (``isolation_level=None``).

    Raises:
        sqlite3.Error: SQLite's own; nothing was written. The caller knows what the file is.
    """
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success sync and rename it, on any failure remove it.

    Raises:
        StorageError: the disk is full or not writable; ``path`` is as it was before.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    os.close(fd)
    aside = Path(name)
    try:
        yield aside
        with aside.open("rb") as handle:
            os.fsync(handle.fileno())
        aside.chmod(0o644)
        aside.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path}: {error.strerror or error}; nothing was changed there") from error
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; on success sync its files and rename it into place.

    An existing ``path`` is replaced only at the end.

    Raises:
        StorageError: the disk is full or not writable; ``path`` is as it was before.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        aside.chmod(0o755)
        if path.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            path.replace(retired / "old")
            aside.replace(path)
            shutil.rmtree(retired, ignore_errors=True)
        else:
            aside.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise StorageError(f"cannot write {path}: {error.strerror or error}; nothing was changed there") from error
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    with whole_file(path) as aside:
        aside.write_text(json.dumps(value, indent=2, sort_keys=True, default=str) + "\n")
