"""The file of parked records: each record once, and never above its bounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from reelway.platform.errors import MalformedFileError
from reelway.platform.eventlog.parked_records import ParkedRecord, ParkedRecords


def record(offset: int, payload: bytes = b"text") -> ParkedRecord:
    return ParkedRecord("outcomes", 1, offset, 5, "unreadable", "no batch of outcomes", payload)


def test_record_that_is_read_again_is_parked_once(tmp_path: Path) -> None:
    parked = ParkedRecords(tmp_path / "parked.db")
    parked.park([record(7), record(9)])
    parked.close()
    parked = ParkedRecords(tmp_path / "parked.db")
    parked.park([record(7), record(8), record(7)._replace(partition=2), record(7)._replace(log="other")])
    assert parked.records() == [
        record(7), record(9), record(8), record(7)._replace(partition=2), record(7)._replace(log="other"),
    ]  # fmt: skip


def test_oldest_records_are_deleted_beyond_the_bounds(tmp_path: Path) -> None:
    parked = ParkedRecords(tmp_path / "parked.db", max_records=4, max_bytes=1_000)
    parked.park([record(offset) for offset in range(10)])
    assert [one.offset for one in parked.records()] == [6, 7, 8, 9]
    parked.park([record(10, b"x" * 600), record(11, b"x" * 390)])
    assert [one.offset for one in parked.records()] == [8, 9, 10, 11]
    parked.park([record(12, b"x" * 10)])
    assert [one.offset for one in parked.records()] == [10, 11, 12]
    parked.park([record(13, b"x" * 1_001)])
    assert parked.records() == []


def test_long_reason_is_cut(tmp_path: Path) -> None:
    parked = ParkedRecords(tmp_path / "parked.db")
    parked.park([record(1)._replace(reason="x" * 5_000)])
    assert parked.records()[0].reason == "x" * 500


def test_file_of_another_kind_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "parked.db").write_bytes(b"not a database" * 100)
    with pytest.raises(MalformedFileError):
        ParkedRecords(tmp_path / "parked.db")
