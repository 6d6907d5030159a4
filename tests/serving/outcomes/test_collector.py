"""The outcome collector: sums from the log, however often and by whom it is read; metrics and throughput."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from tests.support.serving.caller_access import CREDENTIAL, INTERNAL
from tests.support.serving.ingest_load import measure_ingest
from tests.support.serving.raw_events import (
    NOW,
    RELEASES,
    RawOutcome,
    ShownImpression,
    assert_same,
    exposure_record,
    outcome_record,
    recomputed,
    reported_columns,
    slate_of,
)

from reelway.platform.contracts.events import OUTCOME_HORIZON_S, STRING_DICTIONARY_TYPE, Arm, OutcomeType
from reelway.platform.errors import StorageError
from reelway.platform.eventlog import EventLog, LogRecord
from reelway.platform.eventlog.arrow_records import encode_rows
from reelway.platform.eventlog.exposure_events import EXPOSURE_EVENT_SCHEMA, decode_exposures
from reelway.platform.eventlog.outcome_events import OUTCOME_EVENT_SCHEMA, decode_outcomes
from reelway.platform.eventlog.sqlite_log import SqliteLog
from reelway.platform.eventlog.topics import Topic, open_topic
from reelway.platform.rollout import metric_names
from reelway.platform.telemetry import ALLOWED_LABELS
from reelway.serving.outcomes import (
    EventLogWriter,
    ExposureWriter,
    OutcomeCollector,
    build_outcomes_api,
    outcome_store,
)

SHOWN = [ShownImpression(i, i % 5, Arm.CANARY if i % 2 else Arm.STABLE, 0.5, i % 8) for i in range(40)]
DONE = [RawOutcome(one, OutcomeType.WATCH, 20_000.0) for one in SHOWN]


class Followed:
    """An event log in a folder, with settable time, and the collectors that follow it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now = NOW

    def open(self, topic: Topic) -> EventLog:
        return SqliteLog(self.folder / f"{topic}.db", clock=lambda: self.now)

    def append(self, topic: Topic, *records: LogRecord) -> None:
        log = self.open(topic)
        log.append(records)
        log.close()

    def expose(self, shown: Sequence[ShownImpression]) -> None:
        self.append(Topic.EXPOSURES, exposure_record(shown))

    def report(self, done: Sequence[RawOutcome]) -> None:
        self.append(Topic.OUTCOMES, outcome_record(done, self.now))

    def collector(self, name: str = "sums.db") -> OutcomeCollector:
        return OutcomeCollector(self.folder / name, self.open, clock=lambda: self.now)


@pytest.fixture
def followed(tmp_path: Path) -> Followed:
    return Followed(tmp_path)


@pytest.fixture
def collector(followed: Followed) -> Iterator[OutcomeCollector]:
    collector = followed.collector()
    yield collector
    collector.close()


def catch_up(collector: OutcomeCollector) -> None:
    """Reads both topics to their ends."""
    idle = 0
    while idle < 3:
        idle = 0 if collector.advance() else idle + 1


def received(collector: OutcomeCollector) -> dict[str, int]:
    """The number of outcomes by status."""
    counts: dict[str, int] = {}
    for family in text_string_to_metric_families(collector.metrics_text().decode()):
        for sample in family.samples:
            if sample.name == metric_names.RECEIVED:
                status = sample.labels["outcome"]
                counts[status] = counts.get(status, 0) + int(sample.value)
    return counts


def test_sums_are_those_of_all_events(followed: Followed, collector: OutcomeCollector) -> None:
    followed.expose(SHOWN)
    followed.report([*DONE, *DONE[:3]])
    catch_up(collector)
    assert_same(collector.statistics("r-1"), recomputed(SHOWN, DONE))
    assert received(collector) == {"counted": 40, "duplicate": 3}
    assert collector.statistics("r-2") == {}


def test_replay_gives_the_same_sums_and_statuses(followed: Followed, collector: OutcomeCollector) -> None:
    """Outcomes are late by the log's time, so a reader that comes two days later counts the same."""
    followed.expose(SHOWN)
    followed.report([*DONE[:10], RawOutcome(replace(SHOWN[0], rollout=""), OutcomeType.SKIP)])
    followed.now += OUTCOME_HORIZON_S + 1
    followed.report(DONE[5:15])
    catch_up(collector)
    followed.now += 2 * OUTCOME_HORIZON_S
    replayed = followed.collector("another.db")
    catch_up(replayed)
    assert received(replayed) == received(collector) == {"counted": 10, "outside": 1, "late": 10}
    assert_same(replayed.statistics("r-1"), collector.statistics("r-1"))
    assert_same(replayed.statistics("r-1"), recomputed(SHOWN, DONE[:10]))
    replayed.close()


class Crash(BaseException):
    """The end of the process at some instruction."""


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("expose"), st.integers(0, 39), st.integers(1, 20)),
        st.tuples(st.just("report"), st.integers(0, 39), st.integers(1, 20)),
        st.tuples(st.just("read"), st.integers(1, 3), st.just(0)),
        st.tuples(st.just("crash"), st.sampled_from(["write_sums", "write_position", "add_slates"]), st.just(0)),
        st.tuples(st.just("lose the file"), st.just(0), st.just(0)),
    ),
    min_size=4,
    max_size=14,
)


@settings(max_examples=40, deadline=None)
@given(steps=STEPS)
def test_each_event_is_counted_once(steps: list[tuple[str, int | str, int]]) -> None:
    """Records are duplicated in the log; the collector crashes within transactions and loses its file."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        followed = Followed(Path(folder))
        shown: list[ShownImpression] = []
        done: list[RawOutcome] = []
        collector = followed.collector()
        for action, what, size in steps:
            if action == "expose":
                part = SHOWN[int(what) : int(what) + size]
                shown += [one for one in part if one not in shown]
                followed.expose(part)
            elif action == "report":
                part_done = DONE[int(what) : int(what) + size]
                done += part_done
                followed.report(part_done)
            elif action == "read":
                for _ in range(int(what)):
                    collector.advance()
            elif action == "crash":
                with patch.context() as crashing:
                    crashing.setattr(collector._store, str(what), _crash)
                    try:
                        for _ in range(3):
                            collector.advance()
                    except Crash:
                        pass
                collector.close()
                collector = followed.collector()
            else:
                collector.close()
                for file in Path(folder).glob("sums.db*"):
                    file.unlink()
                collector = followed.collector()
        catch_up(collector)
        assert_same(collector.statistics("r-1"), recomputed(shown, done))
        collector.close()


def _crash(*_: object) -> None:
    raise Crash


def test_counts_catch_up_with_two_routers_after_a_restart(tmp_path: Path) -> None:
    """Ingestion does not need the collector: both routers append while none runs."""
    events = tmp_path / "events"
    open_log = partial(open_topic, str(events))
    shown = [replace(one, at=time.time()) for one in SHOWN]
    done = [RawOutcome(one, OutcomeType.WATCH, 20_000.0) for one in shown]
    first = OutcomeCollector(tmp_path / "outcomes.db", open_log)
    first.start()
    first.close()
    lost: list[object] = []
    routers = [
        (
            ExposureWriter(partial(open_log, Topic.EXPOSURES), lost.append),
            EventLogWriter(partial(open_log, Topic.OUTCOMES)),
        )
        for _ in range(2)
    ]
    for number, one in enumerate(shown):
        routers[number % 2][0].record(slate_of(one))
    for number, (_, outcomes) in enumerate(routers):
        for outcome in done[number::2]:
            outcomes.append(reported_columns([outcome])).result(10)
        outcomes.append(reported_columns(done[:10])).result(10)  # reported to both
    for exposures, outcomes in routers:
        exposures.close()
        outcomes.close()
    second = OutcomeCollector(tmp_path / "elsewhere" / "outcomes.db", open_log)
    second.start()
    deadline = time.monotonic() + 20
    while (
        received(second).get("counted", 0) < len(done) or received(second).get("duplicate", 0) < 10
    ):  # a router knows its own
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert_same(second.statistics("r-1"), recomputed(shown, done))
    second.close()
    assert not lost


def test_unreachable_log_is_opened_again(followed: Followed, tmp_path: Path) -> None:
    failures = [StorageError("no broker")]

    def open_topic(topic: Topic) -> EventLog:
        if failures:
            raise failures.pop()
        return followed.open(topic)

    followed.expose(SHOWN)
    collector = OutcomeCollector(tmp_path / "reopened.db", open_topic)
    with pytest.raises(StorageError, match="no broker"):
        collector.advance()
    catch_up(collector)
    assert_same(collector.statistics("r-1"), recomputed(SHOWN, []))
    collector.close()


def test_replaced_log_is_read_from_its_beginning(followed: Followed) -> None:
    for one in SHOWN[:5]:
        followed.expose([one])
    collector = followed.collector()
    catch_up(collector)
    collector.close()
    for file in followed.folder.glob("exposures.db*"):
        file.unlink()
    followed.expose(SHOWN)
    collector = followed.collector()
    catch_up(collector)
    assert_same(collector.statistics("r-1"), recomputed(SHOWN, []))
    collector.close()


def test_unreadable_record_is_skipped(followed: Followed, collector: OutcomeCollector) -> None:
    followed.append(Topic.OUTCOMES, outcome_record(DONE)._replace(payload=b"no batch", id="bad"))
    followed.report(DONE)
    catch_up(collector)
    assert received(collector) == {"counted": len(DONE)}
    assert f'{metric_names.UNREADABLE}{{source="outcomes"}} 1.0' in collector.metrics_text().decode()


def null_name(table: pa.Table, column: str) -> pa.Table:
    """The column as a dictionary whose names include a null, which is not a null of the column."""
    indices = pa.array(np.zeros(table.num_rows, np.int32)).cast(STRING_DICTIONARY_TYPE.index_type)
    names = pa.array([None], pa.string())
    return with_column(table, column, pa.DictionaryArray.from_arrays(indices, names))


def with_column(table: pa.Table, column: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(column), table.schema.field(column), values)


@pytest.mark.parametrize(
    ("topic", "column", "value"),
    [
        ("exposures", "viewer_id", -1), ("exposures", "viewer_id", 1 << 60), ("exposures", "weight", np.nan),
        ("exposures", "weight", 1.5), ("exposures", "rollout", None), ("exposures", "release", None),
        ("outcomes", "viewer_id", -1), ("outcomes", "viewer_id", 1 << 60), ("outcomes", "weight", np.nan),
        ("outcomes", "weight", -0.5), ("outcomes", "value", np.nan), ("outcomes", "value", np.inf),
        ("outcomes", "release", None), ("outcomes", "type", None),
    ],
)  # fmt: skip
def test_record_with_a_wrong_value_is_skipped(
    followed: Followed, collector: OutcomeCollector, topic: str, column: str, value: float | None
) -> None:
    """Such a record of another writer must neither stop the sums nor spoil them."""
    strangers = [ShownImpression(100 + i, 50, Arm.CANARY, 0.5, 1) for i in range(2)]
    of_exposures = topic == "exposures"
    record = (
        exposure_record(strangers) if of_exposures else outcome_record([RawOutcome(strangers[0], OutcomeType.LIKE)])
    )
    table = (decode_exposures if of_exposures else decode_outcomes)(record.payload)
    if value is None:
        wrong = null_name(table, column)
    else:
        values = table[column].to_numpy().copy()
        values[-1] = value
        wrong = with_column(table, column, pa.array(values, table.schema.field(column).type))
    payload = encode_rows(wrong.combine_chunks().to_batches()[0])
    followed.append(Topic(topic), record._replace(payload=payload, id="wrong"))
    followed.expose(SHOWN)
    followed.report(DONE)
    catch_up(collector)
    assert_same(collector.statistics("r-1"), recomputed(SHOWN, DONE))
    assert f'{metric_names.UNREADABLE}{{source="{topic}"}} 1.0' in collector.metrics_text().decode()


def test_age_of_the_reading_is_exported(followed: Followed, collector: OutcomeCollector) -> None:
    catch_up(collector)
    followed.now += 30
    text = collector.metrics_text().decode()
    for topic in ("exposures", "outcomes"):
        assert f'{metric_names.LOG_AGE}{{source="{topic}"}} 30.0' in text
    catch_up(collector)
    assert f'{metric_names.LOG_AGE}{{source="outcomes"}} 0.0' in collector.metrics_text().decode()


def test_collector_that_never_read_exports_its_age(tmp_path: Path) -> None:
    def open_topic(_: Topic) -> EventLog:
        raise StorageError("no broker")

    now = NOW
    collector = OutcomeCollector(tmp_path / "sums.db", open_topic, clock=lambda: now)
    for _ in range(3):
        with pytest.raises(StorageError, match="no broker"):
            collector.advance()
    now += 121
    text = collector.metrics_text().decode()
    for topic in ("exposures", "outcomes"):
        assert f'{metric_names.LOG_AGE}{{source="{topic}"}} 121.0' in text
    assert f"{metric_names.COLLECTOR_FAULTS} 3.0" in text
    collector.close()


def test_metrics_have_the_names_and_labels_of_the_rollout(followed: Followed, collector: OutcomeCollector) -> None:
    followed.expose(SHOWN)
    followed.report([*DONE, *DONE[:3]])
    followed.report([RawOutcome(ShownImpression(99, 1, Arm.STABLE, 0, 0, rollout=""), OutcomeType.SKIP)])
    catch_up(collector)
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(collector.metrics_text().decode())
        for sample in family.samples
    }
    assert {name for name, _ in samples} == {
        metric_names.EXPOSURE, metric_names.STATISTIC, metric_names.RECEIVED, metric_names.LOG_AGE,
        metric_names.UNREADABLE, metric_names.LATE_SLATES, metric_names.DROPPED_ARMS, metric_names.COLLECTOR_FAULTS,
        metric_names.AUDIENCE, metric_names.AUDIENCE_WEIGHT, metric_names.BOUNDED_WATCHES,
        metric_names.UNAUTHENTICATED_SLATES,
    }  # fmt: skip
    assert {label for _, labels in samples for label, _ in labels} <= ALLOWED_LABELS
    expected = recomputed(SHOWN, DONE)
    for (arm, part), metrics in expected.items():
        labels = {"rollout": "r-1", "release": RELEASES[arm][: metric_names.SHORT_RELEASE], "arm": arm, "slice": part}
        for metric, sums in metrics.items():
            for statistic in metric_names.EXPOSURE_STATISTICS:
                key = tuple(sorted({**labels, "statistic": statistic}.items()))
                assert samples[metric_names.EXPOSURE, key] == pytest.approx(getattr(sums, statistic))
            for statistic in ("sum_y", "sum_yy", "sum_xy"):
                key = tuple(sorted({**labels, "metric": metric, "statistic": statistic}.items()))
                assert samples[metric_names.STATISTIC, key] == pytest.approx(getattr(sums, statistic))
    counts = {
        (labels["arm"], labels["kind"], labels["outcome"]): value
        for (name, pairs), value in samples.items()
        if name == metric_names.RECEIVED and (labels := dict(pairs))
    }
    assert counts == {
        ("stable", "watch", "counted"): 20, ("canary", "watch", "counted"): 20, ("stable", "watch", "duplicate"): 2,
        ("canary", "watch", "duplicate"): 1, ("stable", "skip", "outside"): 1,
    }  # fmt: skip


def test_counters_survive_a_restart(followed: Followed) -> None:
    followed.expose(SHOWN)
    followed.report(DONE)
    collector = followed.collector()
    catch_up(collector)
    before = collector.metrics_text()
    collector.close()
    collector = followed.collector()
    counters = [line for line in before.splitlines() if b"log_age" not in line]
    assert [line for line in collector.metrics_text().splitlines() if b"log_age" not in line] == counters
    assert b'slice="overall",statistic="impressions"} 20.0' in before
    collector.close()


def test_file_of_another_schema_version_is_rejected(followed: Followed, collector: OutcomeCollector) -> None:
    collector._store._db.execute("PRAGMA user_version = 1")
    collector.close()
    with pytest.raises(StorageError, match=r"schema version 1, expected 3.*counted again from the event log"):
        followed.collector()


def test_schema_is_that_of_its_version() -> None:
    """A file with other tables is rejected only if its version differs: with a new schema, raise the version."""
    statements = "\n".join(" ".join(statement.split()) for statement in outcome_store._FORMAT.schema)
    digest = hashlib.sha256(statements.encode()).hexdigest()[:16]
    assert (outcome_store._FORMAT.version, digest) == (3, "b3d6142c685ee49a")


def test_one_core_counts_20000_impressions_per_second(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ingest = measure_ingest(tmp_path, requests=4_000, viewers=10_000)
    with capsys.disabled():
        print(f"\n{ingest}")
    assert ingest.outcomes == 40_000
    assert ingest.core_share < 1.0


def test_records_without_rows_are_read_like_others(tmp_path: Path) -> None:
    """The feature stream on Kafka appends such records, so that time goes on in quiet partitions."""
    collector = OutcomeCollector(tmp_path / "sums.db", lambda topic: open_topic(tmp_path / "events", topic))
    for topic, schema in ((Topic.EXPOSURES, EXPOSURE_EVENT_SCHEMA), (Topic.OUTCOMES, OUTCOME_EVENT_SCHEMA)):
        events = open_topic(tmp_path / "events", topic)
        events.append([LogRecord("quiet", 0, encode_rows(pa.RecordBatch.from_pylist([], schema=schema)))])
        events.close()
    assert collector.advance() + collector.advance() == 2
    assert b'unreadable_records_total{source="exposures"} 0.0' in collector.metrics_text()
    collector.close()


@pytest.mark.parametrize("path", ["/v1/outcomes/metrics", "/v1/outcomes/metrics/", "/metrics", "/"])
def test_metrics_are_answered_without_a_redirect(tmp_path: Path, path: str) -> None:
    """Ray Serve passes the whole path as the application's root path."""
    collector = OutcomeCollector(tmp_path / "sums.db", lambda topic: open_topic(tmp_path / "events", topic))
    with TestClient(build_outcomes_api(collector, CREDENTIAL), root_path=path.rstrip("/")) as client:
        answer = client.get(path, headers=INTERNAL, follow_redirects=False)
        from_outside = client.get(path, headers={"Reelway-Internal": "0" * 64}, follow_redirects=False)
    assert answer.status_code == 200
    assert (from_outside.status_code, from_outside.json()) == (404, {"error": "Not Found", "fields": []})
    assert metric_names.EXPOSURE in answer.text


def test_other_methods_get_the_documented_error(tmp_path: Path) -> None:
    collector = OutcomeCollector(tmp_path / "sums.db", lambda topic: open_topic(tmp_path / "events", topic))
    with TestClient(build_outcomes_api(collector, CREDENTIAL)) as client:
        answer = client.post("/v1/outcomes/metrics", content=b"\xff" * 100, headers=INTERNAL)
    assert (answer.status_code, answer.json()) == (405, {"error": "Method Not Allowed", "fields": []})
