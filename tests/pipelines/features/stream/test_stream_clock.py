"""The offset of the stream's time to the data set, from the log's oldest record."""

from __future__ import annotations

from tests.support.eventlog.partitioned_log import PartitionedLog

from reelway.pipelines.features.stream.local_stream import offset_to_dataset_us
from reelway.pipelines.features.views import DAY_US
from reelway.platform.eventlog.topics import Topic

NOW_US = 100 * DAY_US
RECORDS = {0: [(50 * DAY_US, b"oldest")], 1: [(60 * DAY_US, b"")], 2: []}


def offset_us(outcomes: PartitionedLog) -> int:
    logs = {Topic.EXPOSURES: PartitionedLog({0: [], 1: []}), Topic.OUTCOMES: outcomes}
    return offset_to_dataset_us(logs, 10 * DAY_US, lambda: NOW_US / 1e6)


def test_offset_follows_the_oldest_record_of_all_partitions() -> None:
    assert offset_us(PartitionedLog(RECORDS)) == 40 * DAY_US
    assert offset_us(PartitionedLog(RECORDS, empty_reads=1)) == 40 * DAY_US


def test_offset_passes_a_partition_whose_records_are_deleted() -> None:
    assert offset_us(PartitionedLog(RECORDS, first_offsets={0: 1})) == 50 * DAY_US
