"""Erasure from the outcome collector: by the command, or by a running collector that reads the log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from tests.support.serving.raw_events import NOW, RawOutcome, ShownImpression, exposure_record, outcome_record

from reelway.platform.contracts.events import Arm, OutcomeType
from reelway.platform.erasure.request import ErasedStore, ErasureRequest, ErasureState
from reelway.platform.eventlog.erasures import encode_erasures
from reelway.platform.eventlog.sqlite_log import SqliteLog
from reelway.platform.eventlog.topics import Topic
from reelway.platform.run_directory import RunDirectory
from reelway.serving.outcomes import OutcomeCollector
from reelway.serving.outcomes.erasure import erase_outcome_store
from reelway.serving.outcomes.outcome_store import OutcomeStore

SHOWN = [ShownImpression(i, i % 5, Arm.CANARY if i % 2 else Arm.STABLE, 0.5, 0) for i in range(40)]
ERASED, KEPT = np.array([3]), np.array([4])


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


@pytest.fixture
def collector(run: RunDirectory) -> Iterator[OutcomeCollector]:
    """A collector that has counted the outcomes of five viewers on two arms."""
    append(run, Topic.EXPOSURES, exposure_record(SHOWN))
    append(run, Topic.OUTCOMES, outcome_record([RawOutcome(one, OutcomeType.LIKE, 1.0) for one in SHOWN], NOW))
    collector = open_collector(run)
    yield collector
    collector.close()


def open_collector(run: RunDirectory) -> OutcomeCollector:
    def open_topic(topic: Topic) -> SqliteLog:
        return SqliteLog(run.events / f"{topic}.db", clock=lambda: NOW)

    collector = OutcomeCollector(run.path / "serving" / "outcomes.db", open_topic, clock=lambda: NOW)
    catch_up(collector)
    return collector


def append(run: RunDirectory, topic: Topic, record: object) -> None:
    with closing(SqliteLog(run.events / f"{topic}.db", clock=lambda: NOW)) as log:
        log.append([record])  # type: ignore[list-item]


def catch_up(collector: OutcomeCollector) -> None:
    idle = 0
    while idle < 3:
        idle = 0 if collector.advance() else idle + 1


def erase(run: RunDirectory, *, dry_run: bool = False) -> ErasedStore:
    (done,) = erase_outcome_store(ErasureRequest(run, (int(ERASED[0]),), dry_run))
    return done


def rows_of(run: RunDirectory, viewers: np.ndarray) -> int:
    with closing(OutcomeStore(run.path / "serving" / "outcomes.db")) as store:
        return store.count_viewers(viewers)


def test_totals_of_the_viewer_are_deleted_on_all_arms(run: RunDirectory, collector: OutcomeCollector) -> None:
    collector.close()
    assert rows_of(run, ERASED) == 2
    looked = erase(run, dry_run=True)
    assert (looked.found, looked.removed, looked.state) == (2, 0, ErasureState.FOUND)
    done = erase(run)
    assert (done.found, done.removed, done.state) == (2, 2, ErasureState.ERASED)
    assert (rows_of(run, ERASED), rows_of(run, KEPT)) == (0, 2)
    assert erase(run).found == 0


def test_running_collector_erases_what_the_log_names(run: RunDirectory, collector: OutcomeCollector) -> None:
    sums = collector.metrics_text()
    assert erase(run).state is ErasureState.PENDING
    for record in encode_erasures(ERASED.tolist(), Topic.OUTCOMES, 1):
        append(run, Topic.OUTCOMES, record)
    catch_up(collector)
    assert collector.metrics_text() == sums, "sums over viewers stay"
    collector.close()
    assert (rows_of(run, ERASED), rows_of(run, KEPT)) == (0, 2)


def test_missing_file_is_no_store(run: RunDirectory) -> None:
    assert list(erase_outcome_store(ErasureRequest(run, (3,)))) == []


def test_totals_of_an_old_rollout_expire_and_sums_stay(collector: OutcomeCollector) -> None:
    sums = collector._ledger.snapshot.sums
    assert collector._ledger.clean(NOW + 29 * 86_400, 5_000) > 0, "slates and counted types"
    assert collector._store.count_viewers(ERASED) == 2
    collector._ledger.clean(NOW + 31 * 86_400, 5_000)
    assert collector._store.count_viewers(ERASED) == 0
    assert collector._ledger.snapshot.sums.keys() == sums.keys()
    assert all((collector._ledger.snapshot.sums[arm] == sums[arm]).all() for arm in sums)
