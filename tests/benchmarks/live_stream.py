"""The stream on Quix Streams: outcomes per second of one and two processes, and members that are killed under load."""

from __future__ import annotations

import random
import time
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
from confluent_kafka import ConsumerGroupTopicPartitions, KafkaException, TopicPartition
from tests.benchmarks import bench_stream
from tests.support.bench_results import Row
from tests.support.dimensions import DIMENSIONS
from tests.support.eventlog.kafka_broker import Broker, kafka_broker
from tests.support.pipelines.stream_members import (
    FINE_VIEWS,
    Members,
    create_log,
    expected_rows,
    load,
    prefix_of,
    read_rows,
    write_stream_inputs,
)

from reelway.pipelines.features.materialisation import materialise
from reelway.pipelines.features.registry import register_features
from reelway.pipelines.features.stream.quix_service import stream_clock
from reelway.pipelines.features.stream.service import TOPICS
from reelway.pipelines.features.views import ViewSettings
from reelway.platform.cli.terminal import print_status
from reelway.platform.eventlog import Offsets
from reelway.platform.eventlog.outcome_events import encode_outcomes
from reelway.platform.eventlog.topics import Topic, open_topic
from reelway.platform.run_directory import RunDirectory

PARTITIONS: Final = 4
BACK_S: Final = 30.0
STARTED_S: Final = 180.0


def measure_stream(path: Path, outcomes: int, kills: int) -> list[Row]:
    """Measures throughput, then kills members; each part is left out if its number is 0."""
    rows: list[Row] = []
    (path / "kafka").mkdir(parents=True)
    with kafka_broker(path / "kafka") as broker:
        if outcomes:
            rows += _throughput_rows(path, broker, outcomes)
        if kills:
            rows += _kill_rows(path / "kills", broker, kills)
    return rows


def _make_run(path: Path, views: ViewSettings) -> RunDirectory:
    run = RunDirectory(path)
    until_us = write_stream_inputs(run, views)
    register_features(run.features, DIMENSIONS, "sqlite")
    materialise(run.features, until_us / 1e6)
    return run


def _throughput_rows(path: Path, broker: Broker, outcomes: int) -> list[Row]:
    rng = np.random.default_rng(0)
    known = bench_stream.dataset(rng)
    batches = [bench_stream.batch(rng, known, second) for second in range(outcomes // bench_stream.RATE)]
    per_s = {}
    for count in (1, 2):
        run, events = _make_run(path / f"of-{count}", ViewSettings(DIMENSIONS)), create_log(broker, PARTITIONS)
        members = Members(run, events, path / f"members-{count}")
        try:
            for name in "ab"[:count]:
                members.start(name)
            per_s[count] = _outcomes_per_s(broker, events, count, batches, members)
        finally:
            members.close()
    ratio = per_s[2] / per_s[1]
    return [
        Row("stream, outcomes of one process", per_s[1], "1/s"),
        Row("stream, outcomes of two processes", per_s[2], "1/s"),
        Row("stream, two processes over one, the broker on the same cores", ratio, "x", ">= 1.7", ratio >= 1.7),
    ]


def _outcomes_per_s(broker: Broker, events: str, count: int, batches: list[Any], members: Members) -> float:
    """Returns the rate at which a backlog is committed, from the end of its append on."""
    group = f"{prefix_of(events)}features"
    with closing(open_topic(events, Topic.OUTCOMES)) as log:
        _wait_for_members(broker, group, count, members)
        encoded = [record for batch in batches for record in encode_outcomes(batch, PARTITIONS, log.max_record_bytes)]
        before = log.end_offsets()
        for start in range(0, len(encoded), 500):
            log.append(encoded[start : start + 500])
        end, appended_at = log.end_offsets(), time.monotonic()
        total = sum(end.values()) - sum(before.values())
        left = [total - _progress(broker, group, before, end)]
        while left[-1]:
            if time.monotonic() > appended_at + 300:
                raise SystemExit(f"{left[-1]} of {total} records are left after 300 s\n{members.output()}")
            time.sleep(0.1)
            left.append(total - _progress(broker, group, before, end))
    share = left[0] / total
    print_status(f"stream of {count}: {share:.0%} of the outcomes were left when all were appended")
    return share * len(batches) * bench_stream.RATE / (time.monotonic() - appended_at)


def _progress(broker: Broker, group: str, before: Offsets, end: Offsets) -> int:
    committed = committed_offsets(broker, group, group.removesuffix("features") + Topic.OUTCOMES)
    return sum(min(max(committed.get(p, 0), before[p]), end[p]) - before[p] for p in end)


def _wait_for_members(broker: Broker, group: str, count: int, members: Members) -> None:
    """Returns when so many members share the partitions and have committed something of each."""
    deadline = time.monotonic() + STARTED_S
    topic = group.removesuffix("features") + Topic.OUTCOMES
    assigned = 0
    while time.monotonic() < deadline:
        with suppress(KafkaException, TimeoutError):  # until the first member joins, no broker coordinates the group
            (future,) = broker.admin.describe_consumer_groups([group], request_timeout=5).values()
            found = future.result(10).members
            assigned = sum(bool(m.assignment and m.assignment.topic_partitions) for m in found)
            if assigned == count and len(committed_offsets(broker, group, topic)) == PARTITIONS:
                return
        time.sleep(0.5)
    raise SystemExit(f"{assigned} of {count} members take part after {STARTED_S:g} s\n{members.output()}")


def committed_offsets(broker: Broker, group: str, topic: str) -> dict[int, int]:
    """Returns the group's position in each partition that it has committed."""
    wanted = ConsumerGroupTopicPartitions(group, [TopicPartition(topic, p) for p in range(PARTITIONS)])
    (future,) = broker.admin.list_consumer_group_offsets([wanted]).values()
    return {p.partition: p.offset for p in future.result(60).topic_partitions if p.offset >= 0}


def _kill_rows(path: Path, broker: Broker, kills: int) -> list[Row]:
    """Kills random members under load, one with its state removed, and compares the rows with those of one process."""
    rng, back_s = random.Random(7), []
    run, events = _make_run(path / "run", FINE_VIEWS), create_log(broker, PARTITIONS)
    members = Members(run, events, path / "members")
    with ExitStack() as stack:
        stack.callback(members.close)
        logs = {topic: stack.enter_context(closing(open_topic(events, topic))) for topic in TOPICS}
        for name in "ab":
            members.start(name)
        with load(events, rng) as appended:
            _wait_for_members(broker, f"{prefix_of(events)}features", 2, members)
            for number in range(kills):
                name, killed_at = rng.choice("ab"), time.monotonic()
                members.kill(name, lose_state=number == kills // 2)
                behind = {topic: log.end_offsets() for topic, log in logs.items()}
                time.sleep(rng.uniform(0, 3))
                members.start(name)
                _wait_until_passed(broker, events, behind, members)
                back_s.append(time.monotonic() - killed_at)
                time.sleep(rng.uniform(2, 6))
        clock = stream_clock(run, logs)
        until_us = time.time_ns() // 1000 - clock.behind_us + 2_000_000
        counts, values = read_rows(broker, prefix_of(events), PARTITIONS, until_us, members.output)
        expected = expected_rows(run, events, path, until_us)
        statuses = [members.stop(name) for name in "ab"]
    if statuses != [0, 0]:
        raise SystemExit(f"members ended with {statuses}\n{members.output()}")
    written = {key: count for key, count in counts.items() if clock.began_us < key[2] <= until_us}
    wanted = {key for key in expected if clock.began_us < key[2] <= until_us}
    doubled = sum(count - 1 for count in written.values())
    lost, unexpected = len(wanted - set(written)), len(set(written) - wanted)
    unequal = sum(values[key] != expected[key] for key in wanted & set(written))
    name, slowest = f"{kills} members killed, one without its state", max(back_s)
    return [
        Row(f"{name}: events appended", appended[0], ""),
        Row(f"{name}: rows of one process", len(wanted), ""),
        Row(f"{name}: rows lost", lost, "", "0", lost == 0),
        Row(f"{name}: rows doubled", doubled, "", "0", doubled == 0),
        Row(f"{name}: rows that are unequal or unexpected", unequal + unexpected, "", "0", unequal + unexpected == 0),
        Row(f"{name}: all partitions past the kill, median", float(np.median(back_s)), "s"),
        Row(f"{name}: all partitions past the kill, slowest", slowest, "s", f"<= {BACK_S:g}", slowest <= BACK_S),
    ]


def _wait_until_passed(broker: Broker, events: str, behind: dict[Topic, Offsets], members: Members) -> None:
    """Returns when the group has committed everything that the log had; it reads on until the next heartbeat."""
    prefix, deadline = prefix_of(events), time.monotonic() + 180
    while True:
        committed = {topic: committed_offsets(broker, f"{prefix}features", prefix + topic) for topic in behind}
        if all(committed[t].get(p, 0) >= end for t, of_topic in behind.items() for p, end in of_topic.items()):
            return
        if time.monotonic() > deadline:
            raise SystemExit(f"not back 180 s after a kill: {committed}, expected {behind}\n{members.output()}")
        time.sleep(0.2)
