"""The list task on a real event log: intervals, restarts, unreadable records, the file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from tests.support.pipelines.list_events import ListEvent, exposure_rows, outcome_rows

from reelway.pipelines.features.stream import list_writer
from reelway.pipelines.features.stream.list_writer import SAVE_INTERVAL_S, WRITE_INTERVAL_S, ListWriter
from reelway.pipelines.features.stream.lists import BUCKET_US
from reelway.pipelines.features.stream.overlay_writer import RETRY_DELAY_S, ListPoller, OverlayWriterMetrics
from reelway.platform.errors import DataError, StorageError
from reelway.platform.eventlog import LogRecord
from reelway.platform.eventlog.arrow_records import encode_rows
from reelway.platform.eventlog.live_lists_file import MAX_AGE_S, LiveListsFile
from reelway.platform.eventlog.topics import Topic, open_topic

DAY_S = 86_400.0


class Task:
    """A list task over its own log, overlay folder and clock."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now_s, self.appended = folder, time.time(), 0
        self.file, self.state = LiveListsFile(folder / "overlay"), folder / "state" / "lists.npz"
        self.start()

    def start(self) -> None:
        self.registry = CollectorRegistry()
        self.writer = ListWriter(
            self.folder / "events", self.folder / "overlay", self.state, self.registry, clock=lambda: self.now_s,
        )  # fmt: skip

    def append(self, topic: Topic, payload: bytes) -> None:
        events = open_topic(self.folder / "events", topic)
        events.append([LogRecord(str(self.appended), 0, payload)])
        events.close()
        self.appended += 1

    def likes(self, video: int, count: int, first: int = 0) -> None:
        done = [ListEvent("like", first + i, i, video, int(self.now_s * 1e6)) for i in range(count)]
        shown = [ListEvent("exposure", first + i, i, video, int(self.now_s * 1e6), region="eu") for i in range(count)]
        self.append(Topic.EXPOSURES, encode_rows(exposure_rows(shown).combine_chunks().to_batches()[0]))
        self.append(Topic.OUTCOMES, encode_rows(outcome_rows(done).combine_chunks().to_batches()[0]))

    def popular(self) -> list[int]:
        snapshot = self.file.read()
        assert snapshot is not None
        return snapshot.lists["popular"].video_ids.tolist()

    def metric(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)


@pytest.fixture
def task(tmp_path: Path) -> Iterator[Task]:
    task = Task(tmp_path)
    yield task
    task.writer.close()


def test_lists_follow_the_log_at_most_every_interval(task: Task) -> None:
    task.likes(7, 60)
    assert task.writer.poll() == 120
    assert task.popular() == [7]
    assert task.file.read().lists["popular:region=eu"].video_ids.tolist() == [7]  # type: ignore[union-attr]
    task.likes(8, 61, first=1000)
    version = task.file.version()
    task.now_s += WRITE_INTERVAL_S / 2
    task.writer.poll()
    assert task.file.version() == version
    task.now_s += WRITE_INTERVAL_S / 2
    task.writer.poll()
    assert task.popular() == [8, 7]
    assert task.file.version() != version
    assert task.metric("reelway_lists_events_total", kind="outcomes", result="counted") == 121


def test_restart_reads_only_what_is_new(task: Task) -> None:
    task.likes(7, 60)
    task.writer.poll()
    task.writer.close()
    task.likes(8, 61, first=1000)
    task.start()
    assert task.writer.poll() == 122
    assert task.popular() == [8, 7]


def test_killed_task_counts_again_what_it_had_not_stored(task: Task) -> None:
    task.likes(7, 60)
    task.writer.poll()
    task.now_s += 10
    task.likes(8, 61, first=1000)
    task.writer.poll()  # the state of the first poll is stored, this one is not
    task.start()
    task.now_s += 10
    assert task.writer.poll() == 122
    assert task.popular() == [8, 7]


def test_unreadable_record_is_counted_and_skipped(task: Task) -> None:
    task.append(Topic.OUTCOMES, b"no batch")
    task.likes(7, 60)
    assert task.writer.poll() == 120
    assert task.popular() == [7]
    assert task.metric("reelway_lists_unreadable_records_total", kind="outcomes") == 1


def test_age_is_the_distance_from_the_log(task: Task) -> None:
    task.writer.poll()
    fresh_s = task.metric("reelway_lists_age_seconds")
    task.now_s += 3600
    task.writer.poll()
    late_s = task.metric("reelway_lists_age_seconds")
    assert fresh_s is not None
    assert late_s is not None
    assert fresh_s < 5
    assert 3590 < late_s <= 3600


def test_failed_write_lets_the_age_grow_and_keeps_the_state(task: Task) -> None:
    task.likes(7, 60)
    task.writer.poll()
    task.now_s += SAVE_INTERVAL_S
    (task.folder / "overlay").rename(task.folder / "away")
    (task.folder / "overlay").write_bytes(b"no folder")
    saved = task.state.stat().st_mtime_ns
    with pytest.raises(StorageError):
        task.writer.poll()
    assert task.metric("reelway_lists_age_seconds") == pytest.approx(SAVE_INTERVAL_S, abs=5)
    assert task.state.stat().st_mtime_ns > saved
    assert task.writer.poll() == 0  # not due before the next interval
    (task.folder / "overlay").unlink()
    task.now_s += WRITE_INTERVAL_S
    task.writer.poll()
    assert task.popular() == [7]


def test_poller_waits_after_an_error(task: Task) -> None:
    registry, now_s = CollectorRegistry(), [0.0]
    poller = ListPoller(task.writer, OverlayWriterMetrics(registry), lambda: now_s[0])
    (task.folder / "overlay").write_bytes(b"no folder")
    for _ in range(20):
        assert poller.poll() == 0
        task.now_s += WRITE_INTERVAL_S
        now_s[0] += RETRY_DELAY_S / 10
    assert registry.get_sample_value("reelway_uploads_faults_total") == 2
    (task.folder / "overlay").unlink()
    task.likes(7, 60)
    now_s[0] += RETRY_DELAY_S
    assert poller.poll() == 120
    assert task.popular() == [7]


def test_records_older_than_the_windows_are_not_read(task: Task) -> None:
    task.writer.close()
    task.likes(7, 60)
    time.sleep(0.01)
    task.now_s = time.time() + DAY_S + BUCKET_US / 1e6
    task.start()
    assert task.writer.poll() == 0
    task.writer.close()
    task.state.unlink()
    task.now_s -= 2.0 * BUCKET_US / 1e6
    task.start()
    assert task.writer.poll() == 120


def test_stale_lists_are_not_written(task: Task) -> None:
    task.likes(7, 60)
    task.now_s += MAX_AGE_S + 5
    task.writer.poll()
    assert task.file.read() is None
    assert task.metric("reelway_lists_age_seconds") == pytest.approx(MAX_AGE_S, abs=10)


def test_poll_reads_a_bounded_part_of_the_log(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(list_writer, "READ_LIMIT", 3)
    for number in range(8):
        task.likes(number, 1, first=number)
    assert [task.writer.poll() for _ in range(3)] == [12, 4, 0]


def test_other_file_is_no_list(tmp_path: Path) -> None:
    (tmp_path / "lists.arrow").write_bytes(b"something else")
    with pytest.raises(DataError, match="lists"):
        LiveListsFile(tmp_path).read()
    assert LiveListsFile(tmp_path / "none").read() is None
    assert LiveListsFile(tmp_path / "none").version() is None
