"""The stream goes on checking the viewers' memory after any failure, and exports whether it is complete."""

from __future__ import annotations

import threading
from pathlib import Path

from prometheus_client import CollectorRegistry

from reelway.pipelines.features.stream.memory_keeper import check_until
from reelway.pipelines.features.stream.metrics import StreamMetrics
from reelway.platform.errors import StorageError
from reelway.platform.features.viewer_memory_sqlite import SqliteViewerMemory


class FailingMemory(SqliteViewerMemory):
    """Raises at its first checks, and stops the caller at its second check with the marker."""

    def __init__(self, path: Path, failures: list[Exception], stop: threading.Event) -> None:
        super().__init__(path)
        self._failures, self._stop = failures, stop
        self.seen: list[float | None] = []
        self.registry = CollectorRegistry()

    def is_complete(self) -> bool:
        self.seen.append(self.registry.get_sample_value("reelway_stream_viewer_memory_complete"))
        if self._failures:
            raise self._failures.pop(0)
        if is_complete := super().is_complete():
            self._stop.set()
        return is_complete


def test_memory_is_rebuilt_after_any_failure(tmp_path: Path) -> None:
    stop = threading.Event()
    memory = FailingMemory(tmp_path / "memory.db", [StorageError("unreachable"), KeyError("field")], stop)
    metrics = StreamMetrics(memory.registry)
    check_until(memory, tmp_path / "events", metrics, stop, interval_s=0.0)
    assert memory.registry.get_sample_value("reelway_stream_viewer_memory_faults_total") == 2
    assert set(memory.seen) == {0.0}
    assert memory.registry.get_sample_value("reelway_stream_viewer_memory_complete") == 1.0
    memory.close()
