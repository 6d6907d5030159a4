"""Measures outcomes per second and core of the stream processor, which reads, labels, aggregates and records them.

The log has generated traffic at a steady rate over some hours, in the format of the service. Writing rows to the online
store is not counted, because its speed depends on Feast and the store. With ``--beside CHECKOUT``, the same benchmark
of another commit, checked out and installed there, runs before and after.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from tests.support.bench_results import Row, write_report
from tests.support.dimensions import DIMENSIONS
from tests.support.pipelines import event_tables
from tests.support.pipelines.stream_fixtures import SteppedClock

from reelway.pipelines.features.labels import label_impressions
from reelway.pipelines.features.stream.bootstrap import DatasetState
from reelway.pipelines.features.stream.local_stream import LocalStream
from reelway.pipelines.features.stream.service import TOPICS
from reelway.pipelines.features.stream.sqlite_store import SqliteStore
from reelway.pipelines.features.stream.time_buckets import STREAMED
from reelway.pipelines.features.stream.video_facts import VideoFacts
from reelway.pipelines.features.views import DAY_US, ViewSettings
from reelway.platform.contracts.events import OutcomeType
from reelway.platform.eventlog.outcome_events import (
    OUTCOME_EVENT_SCHEMA,
    OUTCOME_TYPES,
    derive_outcome_ids,
    encode_outcomes,
)
from reelway.platform.eventlog.sqlite_log import SqliteLog
from reelway.platform.eventlog.topics import Topic

VIEWERS, VIDEOS, CREATORS = 20_000, 20_000, 1_000
RATE = 500
"""Outcomes per second of the log's time."""
SECONDS = 600
START_US = event_tables.START_US
TTL_US = dict.fromkeys(STREAMED, 90 * DAY_US)


def dataset(rng: np.random.Generator) -> DatasetState:
    ids = np.arange(VIDEOS)
    creators = np.arange(CREATORS)
    videos = event_tables.table(
        event_tables.contract.VIDEOS, video_id=ids, creator_id=rng.integers(0, CREATORS, VIDEOS),
        uploaded_at=[START_US - 9 * DAY_US] * VIDEOS, duration_ms=rng.integers(5_000, 60_000, VIDEOS),
        topic=rng.integers(0, 32, VIDEOS),
    )  # fmt: skip
    shown = event_tables.impressions([(2**50, 1, 1, START_US - 2_000_000)])
    return DatasetState(
        label_impressions(shown, event_tables.outcomes([]), videos),
        videos,
        event_tables.table(
            event_tables.contract.CREATORS, creator_id=creators, created_at=[START_US - 99 * DAY_US] * CREATORS,
            followers=[10] * CREATORS,
        ),
    )  # fmt: skip


def batch(rng: np.random.Generator, known: DatasetState, second: int) -> pa.RecordBatch:
    kind = rng.choice(
        [OUTCOME_TYPES.index(OutcomeType.WATCH), OUTCOME_TYPES.index(OutcomeType.LIKE)], RATE, p=[0.8, 0.2]
    )
    impression = second * RATE + rng.integers(0, RATE, RATE)
    now_us = START_US + second * 1_000_000
    video = rng.zipf(1.4, RATE) % VIDEOS
    stamps = {name: known.videos[name].to_numpy()[video] for name in ("creator_id", "topic", "duration_ms")}
    columns = {
        "outcome_id": derive_outcome_ids(impression, kind), "impression_id": impression, "request_id": impression,
        "viewer_id": impression % VIEWERS, "video_id": video, "position": np.zeros(RATE),
        "shown_at": np.full(RATE, now_us - 9_000_000), "release": ["r"] * RATE, "arm": ["stable"] * RATE,
        "source": ["ann"] * RATE, "propensity": np.ones(RATE), "type": [str(OUTCOME_TYPES[k]) for k in kind],
        "value": np.where(kind == 0, rng.integers(0, 60_000, RATE), 1), "event_time": np.full(RATE, now_us),
        "done_at": [None] * RATE, "rollout": [None] * RATE, "weight": [None] * RATE, "slices": [None] * RATE,
        "authenticated": [None] * RATE, **stamps,
    }  # fmt: skip
    arrays = [
        pa.array(columns[f.name]).cast(pa.int64()).cast(f.type)
        if pa.types.is_timestamp(f.type)
        else pa.array(columns[f.name]).cast(f.type)
        for f in OUTCOME_EVENT_SCHEMA
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=OUTCOME_EVENT_SCHEMA)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--beside", type=Path, metavar="CHECKOUT", help="installed checkout of the commit to compare with"
    )
    other = parser.parse_args().beside
    before = [_of_checkout(other)] if other else []
    rows = [Row("outcomes per second and core", measured := measure(), "1/s")]
    if other:
        others = float(np.mean([*before, _of_checkout(other)]))
        ratio = measured / others
        rows += [
            Row("outcomes per second and core, the other commit, mean of two runs", others, "1/s"),
            Row("this commit over the other", ratio, "x", ">= 1.2", ratio >= 1.2),
        ]
    write_report("stream", rows)


def _of_checkout(path: Path) -> float:
    subprocess.run([".venv/bin/python", "-m", "tests.benchmarks.bench_stream"], cwd=path, check=True)
    (row,) = json.loads((path / "build/bench/stream.json").read_text())
    return float(row["value"])


def measure() -> float:
    """Returns outcomes per second of CPU time, of a stream in this process."""
    rng = np.random.default_rng(0)
    known = dataset(rng)
    with tempfile.TemporaryDirectory() as folder:
        clock = SteppedClock(START_US)
        logs = {topic: SqliteLog(Path(folder) / f"{topic}.db", clock=clock) for topic in TOPICS}
        for second in range(SECONDS):
            clock.now_us = START_US + second * 1_000_000
            outcomes = logs[Topic.OUTCOMES]
            outcomes.append(list(encode_outcomes(batch(rng, known, second), 1, outcomes.max_record_bytes)))
        clock.now_us = START_US + (SECONDS + 60) * 1_000_000
        store = SqliteStore(Path(folder) / "state.db")
        stream = LocalStream(
            logs, store, None, ViewSettings(DIMENSIONS), TTL_US, VideoFacts(Path(folder) / "absent"),
            max_records=20, clock=clock,
        )  # fmt: skip
        stream.start(lambda: known, behind_us=0)
        cpu, wall, outcomes_read, rows = time.process_time(), time.perf_counter(), 0, 0
        while (done := stream.run_micro_batch(wait_s=0)).records or done.steps:
            outcomes_read += done.events["outcomes"]
            rows += sum(view.rows.num_rows for view in done.emitted)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        store.close()
        for log in logs.values():
            log.close()
    assert outcomes_read == RATE * SECONDS
    print(f"{outcomes_read:,} outcomes, {rows:,} rows in {cpu:.1f} s of one core, {wall:.1f} s in all")
    return outcomes_read / cpu


if __name__ == "__main__":
    main()
