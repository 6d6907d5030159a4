"""What the stream wrote, made again from the log alone: offline rows for the point-in-time join and the parity replay.

A features folder of its own: the batch job's rows up to the data set's last moment, and from there on every row that
the log's outcomes make. It writes nothing online and leaves the run as it is.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from reelway.pipelines.features.online import STATE_FILE
from reelway.pipelines.features.registry import register_features
from reelway.pipelines.features.stream.cells import STREAMED
from reelway.pipelines.features.stream.processor import SECOND_US, Processor, StreamSettings
from reelway.pipelines.features.stream.service import catalogue_of, view_settings
from reelway.pipelines.features.stream.state import StreamState
from reelway.pipelines.features.training_rows import CATALOGUE_FILE, LABELS_FILE, read_artifact
from reelway.platform.contracts.events import TIME
from reelway.platform.durable import write_json
from reelway.platform.eventlog import EventLog
from reelway.platform.features.dimensions import read_dimensions
from reelway.platform.features.store import open_feature_store
from reelway.platform.runs import RunDirectory

STREAM_FILE: Final = "stream.parquet"


def replay_log(run: RunDirectory, events: EventLog, target: Path, behind_us: int, settings: StreamSettings) -> int:
    """Write a features folder with the log's rows in it; returns how many there are.

    Args:
        target: made anew; its parent too.
        behind_us: of the stream that is replayed (``Processor.behind_us``).
        settings: the lateness of that stream.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    store = open_feature_store(run.features)
    ttl_us = {view: int(store.get_feature_view(view).ttl.total_seconds() * SECOND_US) for view in STREAMED}
    state = StreamState(target / "state.db")
    try:
        processor = Processor(events, state, None, view_settings(run), ttl_us, settings)
        processor.start(catalogue_of(run), read_artifact(run.features / LABELS_FILE), behind_us)
        began_us = processor.settled_us
        emitted = []
        while (done := processor.round(wait_s=0)).outcomes or done.steps:
            emitted += done.emitted
    finally:
        state.close()
    _batch_rows(run, target, began_us)
    rows = 0
    for view in STREAMED:
        made = [one.rows for one in emitted if one.view == view]
        if made:
            table = pa.concat_tables(made)
            pq.write_table(table, target / "views" / view / STREAM_FILE)
            rows += table.num_rows
    shutil.copy(run.features / CATALOGUE_FILE, target / CATALOGUE_FILE)
    register_features(target, read_dimensions(run.features), "sqlite")
    write_json(target / STATE_FILE, {"at_s": began_us / SECOND_US, "viewers": 0})
    return rows


def _batch_rows(run: RunDirectory, target: Path, until_us: int) -> None:
    """The batch job's rows up to the moment that the stream began at; profiles and contents as they are."""
    moment = pa.scalar(until_us, pa.int64()).cast(TIME)
    for folder in sorted((run.features / "views").iterdir()):
        table = pa.concat_tables(pq.read_table(part) for part in sorted(folder.glob("*.parquet")))
        if folder.name in STREAMED:
            table = table.filter(pc.less_equal(table["event_timestamp"], moment))
        (target / "views" / folder.name).mkdir(parents=True)
        pq.write_table(table, target / "views" / folder.name / "batch.parquet")
