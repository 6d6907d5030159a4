"""Members of a cluster's stream as processes, their load, and the rows that they and one process write."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from confluent_kafka import Consumer
from confluent_kafka.admin import NewTopic
from tests.support.dimensions import DIMENSIONS
from tests.support.eventlog.kafka_broker import Broker
from tests.support.pipelines.event_tables import random_dataset
from tests.support.pipelines.stream_fixtures import LoggedEvent, record_of
from tests.support.pipelines.view_files import write_views

from reelway.pipelines.features.stream.local_stream import LocalStream
from reelway.pipelines.features.stream.quix_service import stream_clock
from reelway.pipelines.features.stream.row_records import Progress, Row, decode, encode_rows
from reelway.pipelines.features.stream.rules import VIDEO_VIEWS
from reelway.pipelines.features.stream.run_inputs import load_dataset, video_facts, view_settings, view_ttl_us
from reelway.pipelines.features.stream.service import TOPICS
from reelway.pipelines.features.stream.sqlite_store import SqliteStore
from reelway.pipelines.features.views import ViewSettings
from reelway.platform.atomic_files import write_json
from reelway.platform.contracts.events import OutcomeType
from reelway.platform.eventlog.arrow_records import viewer_partitions
from reelway.platform.eventlog.topics import Topic, open_topic
from reelway.platform.run_directory import RunDirectory

FINE_VIEWS = ViewSettings(
    DIMENSIONS, activity_grid_s=2, affinity_grid_s=2, engagement_grid_s=2, creator_grid_s=4, heartbeat_s=86_400
)
"""Grids on which rows of all views are due within a test."""
RowKey = tuple[str, int, int]


def write_stream_inputs(run: RunDirectory, views: ViewSettings) -> int:
    """Writes the data set and features that a stream begins with. Returns the end of the data set."""
    _, until_us = write_views(run, random_dataset(), views)
    write_json(run.record_path("features"), {"config": {"views": asdict(views)}})
    return until_us


def create_log(broker: Broker, partitions: int) -> str:
    """Creates the topics of exposures and outcomes and returns the address of the event log."""
    prefix = f"t{uuid4().hex[:8]}-"
    broker.create_topics([NewTopic(prefix + topic, partitions, 1) for topic in TOPICS])
    return f"kafka://{broker.servers}/{prefix}"


def prefix_of(events: str) -> str:
    """Returns the part of an event log's address that the names of its topics begin with."""
    return events.rsplit("/", 1)[1]


class Members:
    """Processes of ``reelway stream``."""

    def __init__(self, run: RunDirectory, events: str, folder: Path) -> None:
        self._run, self._events, self._folder = run, events, folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        """Starts a member with a state folder of its own."""
        self._folder.mkdir(exist_ok=True)
        with (self._folder / f"{name}.log").open("ab") as output:
            self._processes[name] = subprocess.Popen(
                [
                    sys.executable, "-X", "faulthandler", "-m", "reelway.platform.cli", "stream",
                    "--run", str(self._run.path), "--events", self._events, "--state", str(self._folder / name),
                ],
                stdout=output, stderr=output,
            )  # fmt: skip

    def kill(self, name: str, *, lose_state: bool = False) -> None:
        """Sends SIGKILL, and removes the member's state if ``lose_state``."""
        deadline = time.monotonic() + 60
        while lose_state and not (self._folder / name).exists():  # a member that has just started has no state to lose
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.1)
        self._processes[name].kill()
        self._processes[name].wait()
        if lose_state:
            shutil.rmtree(self._folder / name)

    def stop(self, name: str) -> int:
        """Sends SIGTERM and returns the exit status."""
        self._processes[name].send_signal(signal.SIGTERM)
        try:
            return self._processes[name].wait(30)
        except subprocess.TimeoutExpired:
            self._processes[name].send_signal(signal.SIGABRT)  # prints the stack of each thread
            return self._processes[name].wait(30)

    def output(self) -> str:
        """Returns the end of each member's output."""
        return "\n".join(path.read_text()[-3_000:] for path in self._folder.glob("*.log"))

    def close(self) -> None:
        """Kills the processes that still run."""
        for process in self._processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()


@contextmanager
def load(events: str, rng: random.Random) -> Iterator[list[int]]:
    """Appends exposures and outcomes until the block ends. Yields a list of the appended events' number."""
    stop, appended = threading.Event(), [0]

    def append() -> None:
        with ExitStack() as stack:
            logs = {topic: stack.enter_context(closing(open_topic(events, topic))) for topic in TOPICS}
            impression = 10**9
            while not stop.wait(0.05):
                for _ in range(rng.randint(1, 4)):
                    impression += 1
                    append_impression(logs, impression, rng)
                    appended[0] += 1

    thread = threading.Thread(target=append)
    thread.start()
    try:
        yield appended
    finally:
        stop.set()
        thread.join()


def append_impression(logs: dict[Topic, Any], impression: int, rng: random.Random) -> None:
    """Appends an exposure and some outcomes, in any order."""
    viewer, video, now_us = rng.randint(500, 520), 1000 + rng.randint(0, 59), time.time_ns() // 1000
    kinds = rng.sample([None, OutcomeType.WATCH, OutcomeType.LIKE, OutcomeType.FOLLOW], rng.randint(1, 3))
    partition = int(viewer_partitions(np.array([viewer]), logs[Topic.OUTCOMES].partitions)[0])
    for place, kind in enumerate(kinds):
        event = LoggedEvent(impression, viewer, video, kind, 9_000.0, now_us - 1_000_000, now_us)
        record = record_of([event], 4 * impression + place, stamped=False)
        topic = Topic.EXPOSURES if kind is None else Topic.OUTCOMES
        logs[topic].append([record._replace(partition=partition)])


def read_rows(
    broker: Broker, prefix: str, partitions: int, until_us: int, describe: Callable[[], str]
) -> tuple[Counter[RowKey], dict[RowKey, Any]]:
    """Reads the rows in both topics until all partitions have passed a time. Returns their numbers and fields."""
    rows: Counter[RowKey] = Counter()
    values: dict[RowKey, Any] = {}
    progress: dict[tuple[str, int], int] = {}
    consumer = Consumer(
        {
            "bootstrap.servers": broker.servers, "group.id": uuid4().hex, "auto.offset.reset": "earliest",
            "isolation.level": "read_committed",
            "topic.metadata.refresh.interval.ms": 1_000,  # a member that has just started creates the topics
        }
    )  # fmt: skip
    consumer.subscribe([prefix + "rows-viewer", prefix + "rows-video"])
    deadline, quiet = time.monotonic() + 120, 0
    while len(progress) < partitions * len(VIDEO_VIEWS) or min(progress.values()) < until_us or quiet < 3:
        assert time.monotonic() < deadline, f"{progress} until {until_us}\n{describe()}"
        messages = [m for m in consumer.consume(1_000, timeout=0.5) if m.error() is None]
        quiet = quiet + 1 if not any(m.topic().endswith("rows-viewer") for m in messages) else 0
        for message in messages:
            found = decode(message.key(), message.value() or b"")
            if isinstance(found, Progress):
                progress[found.view, found.partition] = found.as_of_us
            elif isinstance(found, Row):
                rows[found.view, found.entity, found.at_us] += 1
                values[found.view, found.entity, found.at_us] = found.fields
    consumer.close()
    return rows, values


def expected_rows(run: RunDirectory, events: str, folder: Path, until_us: int) -> dict[RowKey, Any]:
    """Returns the rows of one process over the same log, whose rows equal the batch job's."""
    with ExitStack() as stack:
        logs = {topic: stack.enter_context(closing(open_topic(events, topic))) for topic in TOPICS}
        store = stack.enter_context(closing(SqliteStore(folder / "replay.db")))
        stream = LocalStream(logs, store, None, view_settings(run), view_ttl_us(run), video_facts(run))
        stream.start(lambda: load_dataset(run), stream_clock(run, logs).behind_us)
        emitted = []
        while stream.settled_us < until_us:
            emitted += stream.run_micro_batch(wait_s=0.5).emitted
    rows = [decode(key, value) for key, value in encode_rows(emitted)]
    return {(row.view, row.entity, row.at_us): row.fields for row in rows if isinstance(row, Row)}
