"""SQLite files: transactions, exclusive access, and files of another kind or version."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from reelway.platform.errors import MalformedFileError, StorageError
from reelway.platform.sqlite_file import SqliteFile, SqliteFormat

FORMAT = SqliteFormat("a test file", application_id=7, version=1, schema=("CREATE TABLE t (x INTEGER UNIQUE)",))


def rows(file: SqliteFile) -> list[int]:
    with file.reading() as db:
        return [x for (x,) in db.execute("SELECT x FROM t ORDER BY x")]


def test_transaction_is_rolled_back_if_the_block_raises(tmp_path: Path) -> None:
    file = SqliteFile(tmp_path / "folder" / "file.db", FORMAT)
    with file.writing() as db:
        db.execute("INSERT INTO t VALUES (1)")
    with pytest.raises(KeyError), file.writing() as db:  # noqa: PT012
        db.execute("INSERT INTO t VALUES (2)")
        raise KeyError
    assert rows(file) == [1]
    file.close()
    assert rows(SqliteFile(tmp_path / "folder" / "file.db", FORMAT)) == [1]


def test_threads_that_create_the_same_file_all_open_it(tmp_path: Path) -> None:
    for attempt in range(15):
        ready = threading.Barrier(8)

        def create(path: Path, ready: threading.Barrier) -> list[int]:
            ready.wait()
            return rows(SqliteFile(path, FORMAT))

        with ThreadPoolExecutor(8) as threads:
            opened = [threads.submit(create, tmp_path / f"{attempt}.db", ready) for _ in range(8)]
        assert [one.result() for one in opened] == [[]] * 8


def test_exclusive_file_is_held_by_one_connection(tmp_path: Path) -> None:
    exclusive = replace(FORMAT, exclusive=True)
    file = SqliteFile(tmp_path / "file.db", exclusive)
    with pytest.raises(StorageError, match="one process at a time may open it"):
        SqliteFile(tmp_path / "file.db", exclusive, busy_timeout_s=0.05)
    file.close()
    SqliteFile(tmp_path / "file.db", exclusive, busy_timeout_s=0.05).close()


def test_file_of_another_kind_is_rejected(tmp_path: Path) -> None:
    SqliteFile(tmp_path / "file.db", FORMAT).close()
    with pytest.raises(MalformedFileError, match=r"expected a log; give another path"):
        SqliteFile(tmp_path / "file.db", replace(FORMAT, description="a log", application_id=8))


def test_file_of_another_version_is_rejected(tmp_path: Path) -> None:
    SqliteFile(tmp_path / "file.db", FORMAT).close()
    with pytest.raises(StorageError, match="schema version 1, expected 2"):
        SqliteFile(tmp_path / "file.db", replace(FORMAT, version=2))


def test_damaged_file_is_rejected_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file.db").write_bytes(b"not a database" * 400)
    with pytest.raises(MalformedFileError, match="expected a test file; move the file away"):
        SqliteFile(tmp_path / "file.db", FORMAT)


def test_reader_sees_no_uncommitted_rows(tmp_path: Path) -> None:
    file, other = (SqliteFile(tmp_path / "file.db", FORMAT) for _ in range(2))
    with file.writing() as db:
        db.execute("INSERT INTO t VALUES (1)")
        assert rows(other) == []
    assert rows(other) == [1]


def test_use_after_close_is_not_reported_as_a_damaged_file(tmp_path: Path) -> None:
    file = SqliteFile(tmp_path / "file.db", FORMAT)
    file.close()
    with pytest.raises(StorageError, match="is closed"):
        rows(file)
