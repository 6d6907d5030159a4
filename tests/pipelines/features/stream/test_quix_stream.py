"""Members of a cluster's stream over a real Kafka broker: killed at any time, they write the rows of one process."""

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
import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import NewTopic
from tests.support.dimensions import DIMENSIONS
from tests.support.eventlog.kafka_broker import Broker
from tests.support.pipelines.event_tables import random_dataset
from tests.support.pipelines.stream_fixtures import LoggedEvent, record_of
from tests.support.pipelines.view_files import write_views

from reelway.pipelines.features.materialisation import materialise
from reelway.pipelines.features.registry import register_features
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
from reelway.platform.eventlog.feature_changelog import FeatureChangelog
from reelway.platform.eventlog.topics import Topic, open_topic
from reelway.platform.features.feast_store import open_feature_store
from reelway.platform.features.viewer_rows import ViewerRowReader
from reelway.platform.run_directory import RunDirectory

pytestmark = [pytest.mark.long, pytest.mark.kafka, pytest.mark.timeout(400)]

PARTITIONS = 3
VIEWS = ViewSettings(
    DIMENSIONS, activity_grid_s=2, affinity_grid_s=2, engagement_grid_s=2, creator_grid_s=4, heartbeat_s=86_400
)
"""Grids on which rows of all views are due within a test."""
RowKey = tuple[str, int, int]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    _, until_us = write_views(run, random_dataset(), VIEWS)
    register_features(run.features, DIMENSIONS, "sqlite")
    materialise(run.features, until_us / 1e6)
    write_json(run.record_path("features"), {"config": {"views": asdict(VIEWS)}})
    return run


@pytest.fixture
def events(broker: Broker) -> str:
    """An event log: partition 0 of exposures was emptied by retention, 1 and 2 begin with transactions' markers."""
    prefix = f"t{uuid4().hex[:8]}-"
    topics = [NewTopic(prefix + topic, PARTITIONS, 1) for topic in TOPICS]
    for future in broker.admin.create_topics(topics).values():
        future.result(30)
    name = prefix + Topic.EXPOSURES
    producer = Producer({"bootstrap.servers": broker.servers, "transactional.id": name})
    producer.init_transactions(10)
    producer.begin_transaction()
    producer.produce(name, None, partition=1)
    producer.produce(name, None, partition=2)
    producer.commit_transaction(10)
    plain = Producer({"bootstrap.servers": broker.servers})
    plain.produce(name, b"old", partition=0)
    assert plain.flush(10) == 0
    broker.delete_records(name, 0, 1)
    return f"kafka://{broker.servers}/{prefix}"


class Members:
    """Processes of ``reelway stream``."""

    def __init__(self, run: RunDirectory, events: str, folder: Path) -> None:
        self._run, self._events, self._folder = run, events, folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        self._folder.mkdir(exist_ok=True)
        with (self._folder / f"{name}.log").open("ab") as output:
            self._processes[name] = subprocess.Popen(
                [
                    sys.executable, "-X", "faulthandler", "-m", "reelway.platform.cli", "stream",
                    "--run", str(self._run.path), "--event-log", self._events, "--state", str(self._folder / name),
                ],
                stdout=output, stderr=output,
            )  # fmt: skip

    def kill(self, name: str, *, lose_state: bool = False) -> None:
        deadline = time.monotonic() + 60
        while lose_state and not (self._folder / name).exists():  # a member that has just started has no state to lose
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.1)
        self._processes[name].kill()
        self._processes[name].wait()
        if lose_state:
            shutil.rmtree(self._folder / name)

    def stop(self, name: str) -> int:
        self._processes[name].send_signal(signal.SIGTERM)
        try:
            return self._processes[name].wait(30)
        except subprocess.TimeoutExpired:
            self._processes[name].send_signal(signal.SIGABRT)  # prints the stack of each thread
            return self._processes[name].wait(30)

    def output(self) -> str:
        return "\n".join(path.read_text()[-3_000:] for path in self._folder.glob("*.log"))

    def close(self) -> None:
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
    partition = int(viewer_partitions(np.array([viewer]), PARTITIONS)[0])
    for place, kind in enumerate(kinds):
        event = LoggedEvent(impression, viewer, video, kind, 9_000.0, now_us - 1_000_000, now_us)
        record = record_of([event], 4 * impression + place, stamped=False)
        topic = Topic.EXPOSURES if kind is None else Topic.OUTCOMES
        logs[topic].append([record._replace(partition=partition)])


def read_rows(
    broker: Broker, prefix: str, until_us: int, describe: Callable[[], str]
) -> tuple[Counter[RowKey], dict[RowKey, Any]]:
    """Reads the rows in both topics until all partitions have passed a time. Returns their numbers and fields."""
    rows: Counter[RowKey] = Counter()
    values: dict[RowKey, Any] = {}
    progress: dict[tuple[str, int], int] = {}
    consumer = Consumer(
        {
            "bootstrap.servers": broker.servers, "group.id": uuid4().hex, "auto.offset.reset": "earliest",
            "isolation.level": "read_committed",
        }
    )  # fmt: skip
    consumer.subscribe([prefix + "rows-viewer", prefix + "rows-video"])
    deadline, quiet = time.monotonic() + 120, 0
    while len(progress) < PARTITIONS * len(VIDEO_VIEWS) or min(progress.values()) < until_us or quiet < 3:
        assert time.monotonic() < deadline, f"{progress} until {until_us}\n{describe()}"
        messages = [m for m in consumer.consume(1_000, timeout=0.5) if m.error() is None]
        quiet = quiet + 1 if not any(m.topic().endswith("rows-viewer") for m in messages) else 0
        for message in messages:
            found = decode(message.key(), message.value())
            if isinstance(found, Progress):
                progress[found.view, found.partition] = found.as_of_us
            else:
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
        stream.start(lambda: load_dataset(run), stream_clock(run, logs)[1])
        emitted = []
        while stream.settled_us < until_us:
            emitted += stream.run_micro_batch(wait_s=0.5).emitted
    rows = [decode(key, value) for key, value in encode_rows(emitted)]
    return {(row.view, row.entity, row.at_us): row.fields for row in rows if isinstance(row, Row)}


def test_rows_of_killed_members_equal_those_of_one_process(
    run: RunDirectory, events: str, broker: Broker, tmp_path: Path
) -> None:
    """Two members are killed in turn under load; one of them loses its state."""
    rng = random.Random(7)
    members = Members(run, events, tmp_path / "members")
    try:
        for name in "ab":
            members.start(name)
        with load(events, rng) as appended:
            time.sleep(15)
            for number in range(4):
                name = rng.choice("ab")
                members.kill(name, lose_state=number == 2)
                time.sleep(rng.uniform(0, 3))
                members.start(name)
                time.sleep(rng.uniform(4, 10))
        assert appended[0] > 200
        with ExitStack() as stack:
            logs = {topic: stack.enter_context(closing(open_topic(events, topic))) for topic in TOPICS}
            begin_us, behind_us = stream_clock(run, logs)
        until_us = time.time_ns() // 1000 - behind_us + 2_000_000
        prefix = events.rsplit("/", 1)[1]
        rows, values = read_rows(broker, prefix, until_us, members.output)
        expected = expected_rows(run, events, tmp_path, until_us)
        after = {key: count for key, count in rows.items() if begin_us < key[2] <= until_us}
        wanted = {key for key in expected if begin_us < key[2] <= until_us}
        assert {key for key, count in after.items() if count > 1} == set(), "doubled"
        assert wanted - set(after) == set(), "lost"
        assert set(after) - wanted == set()
        assert {view for view, _, _ in wanted} == {
            *VIDEO_VIEWS,
            "viewer_activity",
            "viewer_topic_affinity",
            "viewer_history",
        }
        for key in wanted:
            assert values[key] == expected[key], key
        assert_delivered(run, expected, until_us)
        assert [members.stop(name) for name in "ab"] == [0, 0], members.output()
    finally:
        members.close()


def assert_delivered(run: RunDirectory, expected: dict[RowKey, Any], until_us: int) -> None:
    """The online store and the changelog have each entity's newest row."""
    histories = {entity: at for view, entity, at in sorted(expected) if view == "viewer_history" and at <= until_us}
    rows = ViewerRowReader(open_feature_store(run.features))
    for viewer, at_us in histories.items():
        stored = rows.read(viewer)
        assert list(stored["history_videos"]) == expected["viewer_history", viewer, at_us]["history_videos"]
    changes = FeatureChangelog(run.overlay).changes_after(0)
    assert [change.sequence for change in changes] == sorted({change.sequence for change in changes})
    newest = {
        (row["view"], row["entity_id"]): int(row["event_timestamp"].timestamp() * 1e6)
        for change in changes
        for row in change.rows.to_pylist()
    }
    wanted = {
        (view, entity): at for view, entity, at in sorted(expected, key=lambda key: key[2])
        if view in VIDEO_VIEWS and at <= until_us
    }  # fmt: skip
    assert {key: at for key, at in newest.items() if key in wanted and at <= until_us}.items() <= wanted.items()
    assert set(wanted) <= set(newest)


def test_member_ends_cleanly_at_sigterm(run: RunDirectory, events: str, tmp_path: Path) -> None:
    members = Members(run, events, tmp_path / "members")
    try:
        members.start("a")
        deadline = time.monotonic() + 90
        while "member of a group" not in members.output():
            assert time.monotonic() < deadline, members.output()
            time.sleep(0.1)
        with load(events, random.Random(7)):
            time.sleep(15)
            assert members.stop("a") == 0, members.output()
    finally:
        members.close()
