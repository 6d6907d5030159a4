"""Reading a log up to its end: through reads that return nothing, and past records that retention has deleted."""

from __future__ import annotations

import pytest
from tests.support.eventlog.partitioned_log import PartitionedLog

from reelway.platform.errors import StorageError
from reelway.platform.eventlog.retained_records import MOST_EMPTY_READS, batches_until, records_of_partition

RECORDS = {0: [(1, b"a"), (4, b"b")], 1: [(2, b"c"), (3, b"d")]}


def payloads(log: PartitionedLog) -> list[bytes]:
    return sorted(
        record.payload for batch in batches_until(log, {}, log.end_offsets(), limit=1) for record in batch.records
    )


def test_partition_without_leader_is_read_again() -> None:
    assert payloads(PartitionedLog(RECORDS, empty_reads=3)) == [b"a", b"b", b"c", b"d"]


def test_unreadable_partition_is_an_error() -> None:
    with pytest.raises(StorageError, match="partition 0 ends at offset 2"):
        payloads(PartitionedLog(RECORDS, empty_reads=MOST_EMPTY_READS))


def test_deleted_records_are_passed() -> None:
    log = PartitionedLog(RECORDS, first_offsets={0: 2, 1: 1})
    assert payloads(log) == [b"d"]


def test_one_partition_is_read_from_an_offset_to_its_end() -> None:
    log = PartitionedLog(RECORDS)
    assert [one.payload for one in records_of_partition(log, 0, None, {0: 1, 1: 1})] == [b"a"]
    assert [one.payload for one in records_of_partition(log, 0, 1, log.end_offsets())] == [b"b"]
    assert list(records_of_partition(log, 0, 2, log.end_offsets())) == []
