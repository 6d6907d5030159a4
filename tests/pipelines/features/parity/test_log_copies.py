"""Copies of the event log are complete, whatever Kafka does during a read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tests.support.eventlog.partitioned_log import PartitionedLog
from tests.support.pipelines.stream_fixtures import START_US, LoggedEvent, record_of

from reelway.pipelines.features.parity.event_copy import PARTS, EventCopy
from reelway.pipelines.features.parity.progress import ReplayProgress
from reelway.pipelines.features.parity.run_files import RunFiles
from reelway.pipelines.features.parity.upload_copy import copy_uploads
from reelway.platform.contracts.events import OutcomeType
from reelway.platform.errors import StorageError
from reelway.platform.eventlog.retained_records import MOST_EMPTY_READS
from reelway.platform.eventlog.topics import Topic


def outcomes(times_us: Sequence[int], first: int = 0) -> list[tuple[int, bytes]]:
    """One like per append time, of the impressions from ``first`` on."""
    return [
        (at_us, record_of([LoggedEvent(first + i, 100, 1, OutcomeType.LIKE, 1.0, START_US, START_US)], i).payload)
        for i, at_us in enumerate(times_us)
    ]


def copied_times_us(copy: EventCopy) -> dict[int, int]:
    """Impression -> append time."""
    return {
        row["impression_id"]: row["append_us"]
        for part in range(PARTS)
        for row in copy.read_part(part, lambda batch: np.ones(batch.num_rows, np.bool_)).to_pylist()
    }


def test_copy_waits_for_a_partition_without_leader(tmp_path: Path) -> None:
    log = PartitionedLog({0: outcomes([START_US]), 1: outcomes([START_US + 5], 1)}, empty_reads=2)
    copy = EventCopy(RunFiles(str(tmp_path)), Topic.OUTCOMES)
    assert list(copy.copy_new(log, {}, {}, 0)) == [({0: 1, 1: 1}, {0: START_US, 1: START_US + 5}, 1)]
    assert copied_times_us(copy) == {0: START_US, 1: START_US + 5}


def test_incomplete_copy_is_an_error(tmp_path: Path) -> None:
    log = PartitionedLog({0: outcomes([START_US])}, empty_reads=MOST_EMPTY_READS)
    files = RunFiles(str(tmp_path))
    with pytest.raises(StorageError, match="check the event log"):
        list(EventCopy(files, Topic.OUTCOMES).copy_new(log, {}, {}, 0))
    log = PartitionedLog({0: [(START_US, b"")]}, empty_reads=MOST_EMPTY_READS)
    with pytest.raises(StorageError, match="check the event log"):
        copy_uploads(files, log, {})


def test_times_of_a_partition_do_not_go_back(tmp_path: Path) -> None:
    """The leader changes after the second record, within a replay, and after the third, between two replays."""
    records = {0: outcomes([START_US + 9, START_US + 20, START_US + 8, START_US + 7]), 1: outcomes([START_US], 9)}
    copy, progress = EventCopy(RunFiles(str(tmp_path)), Topic.OUTCOMES), ReplayProgress()
    for some in ({0: records[0][:3], 1: []}, records):
        offsets, newest_us = progress.offsets.get(Topic.OUTCOMES, {}), progress.newest_us.get(Topic.OUTCOMES, {})
        for step in copy.copy_new(PartitionedLog(some), offsets, newest_us, progress.next_file):
            progress.offsets[Topic.OUTCOMES], progress.newest_us[Topic.OUTCOMES], progress.next_file = step
        progress.write(RunFiles(str(tmp_path)))
        progress = ReplayProgress.read(RunFiles(str(tmp_path)))
    late_us = START_US + 20
    assert copied_times_us(copy) == {0: START_US + 9, 1: late_us, 2: late_us, 3: late_us, 9: START_US}
