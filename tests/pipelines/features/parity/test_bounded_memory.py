"""A replay of a long log needs little memory: events are copied and labelled some at a time."""

from __future__ import annotations

import resource
import sys
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tests.support.pipelines.served_stream import FIRST_VIDEO, SECOND_US, VIDEOS, ServedStream, build_run

from reelway.pipelines.features.parity.replay import ReplayOptions, replay
from reelway.platform.contracts.events import OutcomeType
from reelway.platform.eventlog.outcome_events import OUTCOME_EVENT_SCHEMA, encode_outcomes
from reelway.platform.eventlog.topics import Topic
from reelway.platform.features.feast_store import import_feast
from reelway.platform.run_directory import RunDirectory

OUTCOMES = 1_000_000
OUTCOMES_PER_BATCH = 10_000
LIMIT_BYTES = 200 << 20
"""More data than before the replay; all events at once would take several times as much."""


def outcomes_of_sampled_videos(first: int, now_us: int) -> pa.RecordBatch:
    n = OUTCOMES_PER_BATCH
    impression = np.arange(first, first + n) + 10**10
    columns = {
        "impression_id": impression, "outcome_id": impression, "request_id": impression,
        "viewer_id": impression % 100_003, "video_id": FIRST_VIDEO + impression % VIDEOS,
        "shown_at": np.full(n, now_us - 9 * SECOND_US), "event_time": np.full(n, now_us),
        "type": [str(OutcomeType.LIKE)] * n, "value": np.ones(n),
    }  # fmt: skip
    arrays = []
    for field in OUTCOME_EVENT_SCHEMA:
        empty = None if field.nullable else "" if pa.types.is_dictionary(field.type) else 0
        values = pa.array(columns.get(field.name, [empty] * n))
        given_time = pa.types.is_timestamp(field.type) and field.name in columns
        arrays.append((values.cast(pa.int64()) if given_time else values).cast(field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=OUTCOME_EVENT_SCHEMA)


def replay_within(limit_bytes: int, run: RunDirectory) -> None:
    options = ReplayOptions(str(run.path / "serving" / "vectors.jsonl"), str(run.events))
    pa.set_cpu_count(1)
    import_feast()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    used_bytes = int(status["VmData"].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used_bytes + limit_bytes, used_bytes + limit_bytes))
    report, _ = replay(str(run.path), options, 0.0)
    sys.exit(0 if report.vectors == 3 and report.mismatch_count else 1)


@pytest.mark.slow
def test_replay_of_a_million_outcomes_is_bounded(tmp_path: Path) -> None:
    streamed = ServedStream(build_run(tmp_path / "run"))
    streamed.serve(2)
    for first in range(0, OUTCOMES, OUTCOMES_PER_BATCH):
        batch = outcomes_of_sampled_videos(first, streamed.clock_us)
        outcomes = streamed.logs[Topic.OUTCOMES]
        outcomes.append(list(encode_outcomes(batch, 1, outcomes.max_record_bytes)))
    streamed.clock_us += 3_600 * SECOND_US
    streamed.offer(500, np.arange(8, dtype=np.int32))  # the stream has not run: the replay finds what is missing
    streamed.state.close()
    child = get_context("spawn").Process(target=replay_within, args=(LIMIT_BYTES, streamed.run))
    child.start()
    child.join()
    assert child.exitcode == 0
