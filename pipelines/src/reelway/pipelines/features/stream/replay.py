"""Recomputes the stream's rows from the log: offline rows for the point-in-time join and the parity replay.

The result is a separate features folder. It contains the batch job's rows up to the end of the data set, and then
every row that the log's events produce. The replay writes nothing online and does not change the run.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from reelway.pipelines.features.materialisation import MATERIALISATION_FILE
from reelway.pipelines.features.registry import register_features
from reelway.pipelines.features.stream.local_stream import LocalStream, ViewerLogs
from reelway.pipelines.features.stream.run_inputs import load_dataset, video_facts, view_settings, view_ttl_us
from reelway.pipelines.features.stream.sqlite_store import SqliteStore
from reelway.pipelines.features.stream.time_buckets import STREAMED
from reelway.pipelines.features.training_rows import CATALOGUE_FILE
from reelway.pipelines.features.views import SECOND_US
from reelway.platform.atomic_files import write_json
from reelway.platform.contracts.events import TIMESTAMP_TYPE
from reelway.platform.features.dimensions import read_dimensions
from reelway.platform.run_directory import RunDirectory

STREAM_FILE: Final = "stream.parquet"


def replay_log(run: RunDirectory, logs: ViewerLogs, target: Path, behind_us: int) -> int:
    """Writes a features folder that contains the log's rows. Returns their number.

    Args:
        target: folder, replaced if it exists; its parent is created too.
        behind_us: offset of the replayed stream's time (``LocalStream.behind_us``).
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    store = SqliteStore(target / "state.db")
    try:
        stream = LocalStream(logs, store, None, view_settings(run), view_ttl_us(run), video_facts(run))
        stream.start(lambda: load_dataset(run), behind_us)
        began_us = stream.settled_us
        emitted = []
        while (done := stream.run_micro_batch(wait_s=0)).records or done.steps:
            emitted += done.emitted
    finally:
        store.close()
    _batch_rows(run, target, began_us)
    rows = 0
    for view in STREAMED:
        chunks = [chunk.rows for chunk in emitted if chunk.view == view]
        if chunks:
            table = pa.concat_tables(chunks)
            pq.write_table(table, target / "views" / view / STREAM_FILE)
            rows += table.num_rows
    shutil.copy(run.features / CATALOGUE_FILE, target / CATALOGUE_FILE)
    register_features(target, read_dimensions(run.features), "sqlite")
    write_json(target / MATERIALISATION_FILE, {"at_s": began_us / SECOND_US, "viewers": 0})
    return rows


def _batch_rows(run: RunDirectory, target: Path, until_us: int) -> None:
    """Copies the batch job's rows up to the initial watermark of the stream. Other views are copied unchanged."""
    moment = pa.scalar(until_us, pa.int64()).cast(TIMESTAMP_TYPE)
    for folder in sorted((run.features / "views").iterdir()):
        table = pa.concat_tables(pq.read_table(part) for part in sorted(folder.glob("*.parquet")))
        if folder.name in STREAMED:
            table = table.filter(pc.less_equal(table["event_timestamp"], moment))
        (target / "views" / folder.name).mkdir(parents=True)
        pq.write_table(table, target / "views" / folder.name / "batch.parquet")
