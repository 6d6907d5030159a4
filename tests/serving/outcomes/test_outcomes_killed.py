"""A killed and restarted collector resumes with exactly what it acknowledged."""

from __future__ import annotations

import pickle
import queue
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.support.serving.raw_events import (
    NOW,
    RawOutcome,
    ShownImpression,
    assert_same,
    columns_of,
    exposures_of,
    recomputed,
)

from reelway.platform.contracts.events import Arm, OutcomeType
from reelway.platform.errors import StorageError
from reelway.serving.outcomes import OutcomeCollector

ROOT = Path(__file__).parents[3]
KILLS = 4


class Child:
    """One start of the collector's process."""

    def __init__(self, path: Path) -> None:
        command = [sys.executable, "-m", "tests.support.serving.collector_child", str(path)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self.lines.get(timeout=60) == "ready"

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line.decode().strip())

    def send(self, number: int, work: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(pickle.dumps((number, work)))
        self.process.stdin.flush()

    def acknowledged(self) -> set[int]:
        """The output so far; all of it once the process has ended."""
        acknowledged_numbers = set()
        while not self.lines.empty():
            acknowledged_numbers.add(int(self.lines.get()))
        return acknowledged_numbers

    def wait_for(self, answers: int) -> None:
        deadline = time.monotonic() + 30
        while self.lines.qsize() < answers:
            assert time.monotonic() < deadline
            time.sleep(0.0002)

    def kill(self) -> set[int]:
        self.process.kill()
        self.process.wait()
        self._reader.join(10)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # unsent input is lost with the process
                pipe.close()
        return self.acknowledged()


def test_killed_collector_resumes_with_what_it_acknowledged(tmp_path: Path) -> None:
    rng = random.Random(4)
    shown = [
        ShownImpression(i, i % 40, rng.choice([Arm.STABLE, Arm.CANARY]), 0.5, rng.randrange(8)) for i in range(1_200)
    ]  # fmt: skip
    done = [RawOutcome(one, rng.choice(list(OutcomeType)), 1.0) for one in shown]
    work: dict[int, Callable[[], Any]] = {}
    for number in range(60):
        part = slice(20 * number, 20 * number + 20)
        work[2 * number] = lambda n=number, p=part: exposures_of(shown[p], n + 1)
        work[2 * number + 1] = lambda p=part: columns_of(done[p])
    waiting, path = sorted(work), tmp_path / "outcomes.db"
    sent, acknowledged = set[int](), set[int]()
    for kill in range(KILLS):
        child = Child(path)
        for number in waiting[: 15 + 5 * kill]:
            child.send(number, work[number]())
        child.wait_for(rng.choice([0, 1, 4, 10]))
        sent |= set(waiting[: 15 + 5 * kill])
        acknowledged |= child.kill()
        exposed, reported = _counted(path)
        for numbers, parity in ((exposed, 0), (reported, 1)):
            assert 20 * sum(number % 2 == parity for number in acknowledged) <= numbers
            assert numbers <= 20 * sum(number % 2 == parity for number in sent)
        waiting = [number for number in waiting if number not in acknowledged]
    assert 0 < len(acknowledged) < len(sent), "no kill met a collector at work"
    child = Child(path)
    for number in waiting:
        child.send(number, work[number]())
    child.wait_for(len(waiting))
    with pytest.raises(StorageError, match="one process at a time"):
        OutcomeCollector(path, wait_s=0.1)
    child.kill()
    collector = OutcomeCollector(path, clock=lambda: NOW)
    assert_same(collector.statistics("r-1"), recomputed(shown, done))
    collector.close()


def _counted(path: Path) -> tuple[float, int]:
    """Numbers of committed impressions and outcomes."""
    collector = OutcomeCollector(path, clock=lambda: NOW)
    try:
        overall = [metrics for (_, part), metrics in collector.statistics("r-1").items() if part == "overall"]
        text = collector.metrics_text().decode().splitlines()
        reported = sum(float(line.split()[-1]) for line in text if 'outcome="counted"' in line)
        return sum(metrics["like_rate"].impressions for metrics in overall), int(reported)
    finally:
        collector.close()
