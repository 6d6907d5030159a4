"""Measures outcomes per second and core of the stream processor, which reads, labels, aggregates and records them.

The log has generated traffic at a steady rate over some hours, in the format of the service. Writing rows to the online
store is not counted, because its speed depends on Feast and the store.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from tests.support.bench_results import Row, write_report
from tests.support.dimensions import DIMENSIONS
from tests.support.pipelines import event_tables

from reelway.pipelines.features.labels import label_impressions
from reelway.pipelines.features.stream.engine import StreamCatalogue
from reelway.pipelines.features.stream.processor import StreamProcessor, StreamSettings
from reelway.pipelines.features.stream.state import StreamState
from reelway.pipelines.features.stream.time_buckets import STREAMED
from reelway.pipelines.features.views import DAY_US, ViewSettings
from reelway.platform.contracts.events import OutcomeType
from reelway.platform.eventlog.outcome_events import (
    OUTCOME_EVENT_SCHEMA,
    OUTCOME_TYPES,
    derive_outcome_ids,
    encode_outcomes,
)
from reelway.platform.eventlog.sqlite_log import SqliteLog

VIEWERS, VIDEOS, CREATORS = 20_000, 20_000, 1_000
RATE = 500
"""Outcomes per second of the log's time."""
SECONDS = 600
START_US = event_tables.START_US
TTL_US = dict.fromkeys(STREAMED, 90 * DAY_US)


def catalogue(rng: np.random.Generator) -> StreamCatalogue:
    ids = np.arange(VIDEOS)
    creators = np.arange(CREATORS)
    return StreamCatalogue.of(
        event_tables.table(
            event_tables.contract.VIDEOS, video_id=ids, creator_id=rng.integers(0, CREATORS, VIDEOS),
            uploaded_at=[START_US - 9 * DAY_US] * VIDEOS, duration_ms=rng.integers(5_000, 60_000, VIDEOS),
            topic=rng.integers(0, 32, VIDEOS),
        ),
        event_tables.table(
            event_tables.contract.CREATORS, creator_id=creators, created_at=[START_US - 99 * DAY_US] * CREATORS,
            followers=[10] * CREATORS,
        ),
    )  # fmt: skip


def batch(rng: np.random.Generator, second: int) -> pa.RecordBatch:
    kind = rng.choice(
        [OUTCOME_TYPES.index(OutcomeType.WATCH), OUTCOME_TYPES.index(OutcomeType.LIKE)], RATE, p=[0.8, 0.2]
    )
    impression = second * RATE + rng.integers(0, RATE, RATE)
    now_us = START_US + second * 1_000_000
    columns = {
        "outcome_id": derive_outcome_ids(impression, kind), "impression_id": impression, "request_id": impression,
        "viewer_id": impression % VIEWERS, "video_id": rng.zipf(1.4, RATE) % VIDEOS, "position": np.zeros(RATE),
        "shown_at": np.full(RATE, now_us - 9_000_000), "release": ["r"] * RATE, "arm": ["stable"] * RATE,
        "source": ["ann"] * RATE, "propensity": np.ones(RATE), "type": [str(OUTCOME_TYPES[k]) for k in kind],
        "value": np.where(kind == 0, rng.integers(0, 60_000, RATE), 1), "event_time": np.full(RATE, now_us),
        "done_at": [None] * RATE,
    }  # fmt: skip
    arrays = [
        pa.array(columns[f.name]).cast(pa.int64()).cast(f.type)
        if pa.types.is_timestamp(f.type)
        else pa.array(columns[f.name]).cast(f.type)
        for f in OUTCOME_EVENT_SCHEMA
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=OUTCOME_EVENT_SCHEMA)


def main() -> None:
    rng = np.random.default_rng(0)
    known = catalogue(rng)
    shown = event_tables.impressions([(2**50, 1, 1, START_US - 2_000_000)])
    labels = label_impressions(shown, event_tables.outcomes([]), known.videos)
    with tempfile.TemporaryDirectory() as folder:
        log = SqliteLog(Path(folder) / "log.db", clock=lambda: START_US / 1e6 + SECONDS + 60)
        for second in range(SECONDS):
            time_us = START_US + second * 1_000_000
            log.append(list(encode_outcomes(batch(rng, second), 1, time_us, log.max_record_bytes)))
        state = StreamState(Path(folder) / "state.db")
        processor = StreamProcessor(log, state, None, ViewSettings(DIMENSIONS), TTL_US, StreamSettings(max_records=20))
        processor.start(known, labels, behind_us=0)
        cpu, wall, outcomes, rows = time.process_time(), time.perf_counter(), 0, 0
        while (done := processor.run_micro_batch(wait_s=0)).outcomes or done.steps:
            outcomes += done.outcomes
            rows += sum(view.rows.num_rows for view in done.emitted)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        state.close()
        log.close()
    assert outcomes == RATE * SECONDS
    print(f"{outcomes:,} outcomes, {rows:,} rows in {cpu:.1f} s of one core, {wall:.1f} s in all")
    write_report("stream", [Row("outcomes per second and core", outcomes / cpu, "1/s")])


if __name__ == "__main__":
    main()
