"""A killed collector counts each event of the log once, also if its file is gone."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import pytest
from tests.support.serving.raw_events import (
    RawOutcome,
    ShownImpression,
    assert_same,
    exposure_record,
    outcome_record,
    recomputed,
)

from reelway.platform.contracts.events import Arm, OutcomeType
from reelway.platform.errors import StorageError
from reelway.platform.eventlog.topics import Topic, open_topic
from reelway.serving.outcomes import OutcomeCollector

ROOT = Path(__file__).parents[3]
KILLS = 4


@contextmanager
def collecting(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """One start of the collector's process, killed at the end of the block."""
    command = [sys.executable, "-m", "tests.support.serving.collector_child", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield process
        finally:
            process.kill()


def test_killed_collector_counts_each_event_once(tmp_path: Path) -> None:
    rng = random.Random(4)
    now = time.time()
    shown = [
        ShownImpression(i, i % 40, rng.choice([Arm.STABLE, Arm.CANARY]), 0.5, rng.randrange(8), at=now)
        for i in range(1_200)
    ]
    done = [RawOutcome(one, rng.choice(list(OutcomeType)), 1.0) for one in shown]
    parts = [slice(start, start + 20) for start in range(0, len(shown), 20)]
    events, sums = tmp_path / "events", tmp_path / "sums.db"
    open_log = partial(open_topic, events)
    seen: set[int] = set()
    with closing(open_log(Topic.EXPOSURES)) as exposures, closing(open_log(Topic.OUTCOMES)) as outcomes:
        for kill in range(KILLS):
            with collecting(tmp_path) as process:
                for part in parts[kill::KILLS]:
                    exposures.append([exposure_record(shown[part]), exposure_record(shown[part])])
                    outcomes.append([outcome_record(done[part], now), outcome_record(done[part][:5], now)])
                for _ in range(rng.choice([1, 2, 3])):
                    assert process.stdout is not None
                    assert process.stdout.readline(), "the collector ended"
            seen.add(impressions(sums, open_log))
            if kill == 1:
                for file in tmp_path.glob("sums.db*"):
                    file.unlink()
    assert len(seen) > 1, "no kill met a collector at work"
    with collecting(tmp_path), pytest.raises(StorageError, match="one process at a time"):
        OutcomeCollector(sums, open_log, wait_s=0.1)
    with closing(OutcomeCollector(sums, open_log)) as collector:
        idle = 0
        while idle < 3:
            idle = 0 if collector.advance() else idle + 1
        assert_same(collector.statistics("r-1"), recomputed(shown, done))


def impressions(sums: Path, open_log: partial[object]) -> int:
    """The number of committed impressions."""
    with closing(OutcomeCollector(sums, open_log)) as collector:  # type: ignore[arg-type]
        overall = [metrics for (_, part), metrics in collector.statistics("r-1").items() if part == "overall"]
        return int(sum(metrics["like_rate"].impressions for metrics in overall))
