"""A SQLite file in WAL mode with a checked schema version: opening, preparing, reading and writing transactions.

``PRAGMA application_id`` holds the kind of the file and ``PRAGMA user_version`` its schema version. A file of another
kind or version is left unchanged. Every commit is synced, so that what a caller acknowledges survives a power failure.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from reelway.platform.errors import MalformedFileError, StorageError


@contextmanager
def immediate_transaction(db: sqlite3.Connection) -> Iterator[None]:
    """A write transaction: committed when the block ends, rolled back if the block raises.

    The connection must not begin transactions of its own (``isolation_level=None``).

    Raises:
        sqlite3.Error: if SQLite cannot write; nothing was written.
    """
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def is_held_elsewhere(error: StorageError) -> bool:
    """Returns whether a ``SqliteFile`` raised the error because another process holds the file."""
    cause = error.__cause__
    return isinstance(cause, sqlite3.OperationalError) and cause.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY


@dataclass(frozen=True, slots=True)
class SqliteFormat:
    """What one kind of file contains.

    Args:
        description: names the kind in error messages, for example "a rollout store".
        application_id: 32 bits that identify the kind in the file's header.
        version: schema version; there is one, and a file of another version is rejected.
        schema: statements that create the tables of a new file.
        pragmas: set on every connection, for example ``cache_size = -32768``.
        exclusive: only one process at a time can open the file.
        remedy: what to do about a file of another version or a damaged file.
    """

    description: str
    application_id: int
    version: int
    schema: Sequence[str]
    pragmas: Sequence[str] = ()
    exclusive: bool = False
    remedy: str = "move the file away"


class SqliteFile:
    """One connection to a file, created when it does not exist.

    Threads may share the object: a lock is held for the duration of each transaction. Processes may share the file
    unless the format is ``exclusive``.

    Args:
        path: missing parent folders are created.
        busy_timeout_s: how long a transaction waits for another process.

    Raises:
        MalformedFileError: if the file is not a SQLite file, or of another kind.
        StorageError: if it has another schema version, is locked by another process, or cannot be opened or written.
            Every method may raise these two.
    """

    def __init__(self, path: Path, format_: SqliteFormat, *, busy_timeout_s: float = 30.0) -> None:
        self.path = path
        self._format = format_
        self._busy_timeout_s = busy_timeout_s
        self._lock = threading.RLock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
        with self.translated_errors():
            self.connection = sqlite3.connect(
                path, timeout=busy_timeout_s, isolation_level=None, check_same_thread=False
            )
        try:
            self._prepare()
        except BaseException:
            self.connection.close()
            raise

    def close(self) -> None:
        with self._lock:
            self.connection.close()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A transaction whose statements all read the same state of the file."""
        with self.translated_errors():
            self.connection.execute("BEGIN")
            try:
                yield self.connection
            finally:
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction: on disk when the block ends, rolled back if the block raises."""
        with self.translated_errors(), immediate_transaction(self.connection):
            yield self.connection

    @contextmanager
    def erasing(self) -> Iterator[sqlite3.Connection]:
        """A writing transaction that overwrites what it deletes with zeros."""
        with self.translated_errors():
            self.connection.execute("PRAGMA secure_delete = ON")
            try:
                with immediate_transaction(self.connection):
                    yield self.connection
            finally:
                self.connection.execute("PRAGMA secure_delete = OFF")

    def truncate_wal(self) -> bool:
        """Moves the write-ahead log into the file and empties it, so that it holds no earlier content.

        Returns:
            False if another connection still reads the write-ahead log; call it again later.
        """
        with self.translated_errors():
            (busy, *_) = self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            return not busy

    @contextmanager
    def translated_errors(self) -> Iterator[None]:
        """Holds the lock and raises SQLite's errors as ``StorageError`` or ``MalformedFileError``."""
        with self._lock:
            try:
                yield
            except (sqlite3.ProgrammingError, sqlite3.IntegrityError) as error:
                if "closed database" in str(error):
                    raise StorageError(f"{self.path}: {self._format.description} is closed") from error
                raise  # an error of the caller, not of the file
            except sqlite3.OperationalError as error:
                shared = "one process at a time may open it" if self._format.exclusive else "see which process uses it"
                raise StorageError(
                    f"{self.path}: {self._format.description} cannot be read or written: {error}; "
                    f"check the disk, and {shared}"
                ) from error
            except sqlite3.DatabaseError as error:
                expected = f"{self._format.description}; {self._format.remedy}"
                raise MalformedFileError(self.path, expected, seen=str(error)) from error

    def _prepare(self) -> None:
        with self.translated_errors():
            if self._format.exclusive:
                self.connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            with self.reading():  # one state of the file, which another process may be creating
                self._is_initialised()  # before the first write, so that a file of another kind is left unchanged
            self._retry_while_locked(lambda: self.connection.execute("PRAGMA journal_mode = WAL"))
            for pragma in ("synchronous = FULL", *self._format.pragmas):
                self.connection.execute(f"PRAGMA {pragma}")
        with self.writing() as db:
            if not self._is_initialised():
                for statement in self._format.schema:
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {self._format.application_id}")
                db.execute(f"PRAGMA user_version = {self._format.version}")

    def _is_initialised(self) -> bool:
        """Returns whether the file has its tables; False for a new file.

        Raises:
            MalformedFileError: if the file is of another kind.
            StorageError: if it has another schema version.
        """
        application = int(self.connection.execute("PRAGMA application_id").fetchone()[0])
        version = int(self.connection.execute("PRAGMA user_version").fetchone()[0])
        tables = int(self.connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0])
        if (application, version, tables) == (0, 0, 0):
            return False
        if application != self._format.application_id:
            description = f"a SQLite file of another application ({tables} tables)"
            raise MalformedFileError(self.path, f"{self._format.description}; give another path", seen=description)
        if version != self._format.version:
            raise StorageError(
                f"{self.path}: {self._format.description} with schema version {version}, "
                f"expected {self._format.version}; it was written by another version of Reelway: {self._format.remedy}"
            )
        return True

    def _retry_while_locked(self, attempt: Callable[[], object]) -> None:
        """Retries an operation that SQLite's busy timeout does not cover, such as a change of the journal mode."""
        deadline = time.monotonic() + self._busy_timeout_s
        while True:
            try:
                attempt()
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
            else:
                return
