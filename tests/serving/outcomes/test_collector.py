"""The outcome collector: shared transactions, futures, shutdown, metrics and throughput."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.support.serving.ingest_load import measure_ingest
from tests.support.serving.raw_events import (
    NOW,
    RELEASES,
    RawOutcome,
    ShownImpression,
    assert_same,
    columns_of,
    exposures_of,
    recomputed,
)

from reelway.platform.contracts.events import Arm, OutcomeType
from reelway.platform.errors import ServingError, StorageError
from reelway.platform.rollout import metric_names
from reelway.platform.rollout.policy import Slice
from reelway.platform.telemetry import ALLOWED_LABELS
from reelway.serving.outcomes import OutcomeCollector

SHOWN = [ShownImpression(i, i % 5, Arm.CANARY if i % 2 else Arm.STABLE, 0.5, i % 8) for i in range(40)]
DONE = [RawOutcome(one, OutcomeType.WATCH, 20_000.0) for one in SHOWN]


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[OutcomeCollector]:
    collector = OutcomeCollector(tmp_path / "outcomes.db", clock=lambda: NOW)
    yield collector
    collector.close()


def test_concurrent_requests_are_counted_once_each(collector: OutcomeCollector) -> None:
    answers: list[dict[str, int]] = []

    def report(outcome: RawOutcome) -> None:
        answers.append(collector.record_outcomes(columns_of([outcome, outcome])).result(10))

    collector.record_exposures(exposures_of(SHOWN, 1)).result(10)
    threads = [threading.Thread(target=report, args=(one,)) for one in DONE]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [{"counted": 1, "duplicate": 1, "late": 0, "retired": 0, "outside": 0}] * len(DONE)
    assert_same(collector.statistics("r-1"), recomputed(SHOWN, DONE))


def test_requests_during_a_commit_share_the_next_transaction(
    collector: OutcomeCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    applied: list[int] = []
    apply = collector._ledger.apply

    def counting_apply(batches: Any, outcomes: Any, retire: str) -> Any:
        applied.append(len(outcomes))
        return apply(batches, outcomes, retire)

    monkeypatch.setattr(collector._ledger, "apply", counting_apply)
    for future in [collector.record_outcomes(columns_of([one])) for one in DONE]:
        future.result(10)
    assert sum(applied) == len(DONE)
    assert len(applied) < len(DONE) / 4


def test_commit_interval_collects_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collector = OutcomeCollector(tmp_path / "paced.db", clock=lambda: NOW, commit_every_s=1.0)
    groups: list[int] = []
    apply = collector._ledger.apply

    def counting_apply(batches: Any, outcomes: Any, retire: str) -> Any:
        groups.append(len(outcomes))
        return apply(batches, outcomes, retire)

    monkeypatch.setattr(collector._ledger, "apply", counting_apply)
    collector.record_outcomes(columns_of(DONE[:1])).result(10)
    futures = []
    for one in DONE[1:5]:
        time.sleep(0.02)  # so far apart that only the commit interval can combine them
        futures.append(collector.record_outcomes(columns_of([one])))
    for future in futures:
        future.result(10)
    collector.close()
    assert groups == [1, 4]


def test_close_counts_accepted_requests(collector: OutcomeCollector) -> None:
    futures = [collector.record_outcomes(columns_of([one])) for one in DONE]
    collector.close()
    assert sum(future.result(0)["counted"] for future in futures) == len(DONE)
    with pytest.raises(ServingError, match="closed"):
        collector.record_outcomes(columns_of(DONE))
    collector.close()


def test_failed_transaction_fails_all_of_its_futures(
    collector: OutcomeCollector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(collector._store, "write_sums", _no_space)
        futures = [collector.record_outcomes(columns_of([one])) for one in DONE[:3]]
        for future in futures:
            with pytest.raises(StorageError, match="no space"):
                future.result(10)
    assert collector.record_outcomes(columns_of(DONE)).result(10)["counted"] == len(DONE)
    assert "outcome collector: a batch of" in caplog.text


def _no_space(*_: object) -> None:
    raise StorageError("no space left on device")


def test_future_of_a_request_cannot_be_cancelled(collector: OutcomeCollector) -> None:
    abandoned = collector.record_outcomes(columns_of(DONE[:1]))
    assert not abandoned.cancel()
    assert collector.record_outcomes(columns_of(DONE[1:2])).result(10)["counted"] == 1


def test_full_queue_rejects_requests_until_it_drains(
    collector: OutcomeCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector._worker, "_max_queued_rows", 30)
    futures = [collector.record_outcomes(columns_of(DONE))]  # an empty queue accepts any size
    refusals = []
    for _ in range(20):
        try:
            futures.append(collector.record_outcomes(columns_of(DONE)))
        except ServingError as error:
            refusals.append(str(error))
    assert "outcome collector: 40 rows are queued, at most 30 may be; send the request again" in refusals
    for future in futures:
        future.result(10)
    assert collector.record_outcomes(columns_of(DONE)).result(10)["duplicate"] == len(DONE)


def test_metrics_have_the_names_and_labels_of_the_rollout(collector: OutcomeCollector) -> None:
    collector.record_exposures(exposures_of(SHOWN, 1)).result(10)
    collector.record_outcomes(columns_of([*DONE, *DONE[:3]])).result(10)
    collector.record_outcomes(
        columns_of([RawOutcome(ShownImpression(99, 1, Arm.STABLE, 0, 0, rollout=""), OutcomeType.SKIP)])
    ).result(10)
    collector.count_refused(2)
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(collector.metrics_text().decode())
        for sample in family.samples
    }
    assert {name for name, _ in samples} == {
        metric_names.EXPOSURE,
        metric_names.STATISTIC,
        metric_names.RECEIVED,
        metric_names.REFUSED,
    }
    assert {label for _, labels in samples for label, _ in labels} <= ALLOWED_LABELS
    expected = recomputed(SHOWN, DONE)
    for (arm, part), metrics in expected.items():
        labels = {"rollout": "r-1", "release": RELEASES[arm][: metric_names.SHORT_RELEASE], "arm": arm, "slice": part}
        for metric, sums in metrics.items():
            for statistic in ("viewers", "impressions", "sum_x", "sum_xx"):
                key = tuple(sorted({**labels, "statistic": statistic}.items()))
                assert samples[metric_names.EXPOSURE, key] == pytest.approx(getattr(sums, statistic))
            for statistic in ("sum_y", "sum_yy", "sum_xy"):
                key = tuple(sorted({**labels, "metric": metric, "statistic": statistic}.items()))
                assert samples[metric_names.STATISTIC, key] == pytest.approx(getattr(sums, statistic))
    received = {
        (labels["arm"], labels["kind"], labels["outcome"]): value
        for (name, pairs), value in samples.items()
        if name == metric_names.RECEIVED and (labels := dict(pairs))
    }
    assert received == {
        ("stable", "watch", "counted"): 20, ("canary", "watch", "counted"): 20, ("stable", "watch", "duplicate"): 2,
        ("canary", "watch", "duplicate"): 1, ("stable", "skip", "outside"): 1,
    }  # fmt: skip
    assert samples[metric_names.REFUSED, ()] == 2


def test_counters_survive_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.db"
    texts = []
    collector = OutcomeCollector(path, clock=lambda: NOW)
    collector.record_exposures(exposures_of(SHOWN, 1))
    collector.record_outcomes(columns_of(DONE))
    for _ in range(2):
        collector.close()
        texts.append(collector.metrics_text())
        collector = OutcomeCollector(path, clock=lambda: NOW)
    collector.close()
    assert texts[0] == texts[1]
    assert b'slice="overall",statistic="impressions"} 20.0' in texts[1]


def test_statistics_of_a_retired_rollout_remain_readable(collector: OutcomeCollector) -> None:
    collector.record_exposures(exposures_of(SHOWN, 1))
    collector.retire("r-1").result(10)
    assert collector.record_outcomes(columns_of(DONE)).result(10)["retired"] == len(DONE)
    assert collector.statistics("r-1")[Arm.CANARY, Slice.OVERALL]["like_rate"].viewers > 0
    assert collector.statistics("r-2") == {}


def test_retirement_keeps_its_order_among_requests(collector: OutcomeCollector) -> None:
    before = collector.record_outcomes(columns_of(DONE[:10]))
    collector.retire("r-1")
    after = collector.record_outcomes(columns_of(DONE[10:]))
    assert before.result(10)["counted"] == 10
    assert after.result(10)["retired"] == len(DONE) - 10


def test_file_of_another_schema_version_is_rejected(tmp_path: Path, collector: OutcomeCollector) -> None:
    collector.record_exposures(exposures_of(SHOWN, 1)).result(10)
    collector._store._db.execute("PRAGMA user_version = 9")
    collector.close()
    with pytest.raises(StorageError, match="schema version 9, expected 1"):
        OutcomeCollector(tmp_path / "outcomes.db")


def test_one_core_counts_20000_impressions_per_second(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ingest = measure_ingest(tmp_path, requests=4_000, viewers=10_000)
    with capsys.disabled():
        print(f"\n{ingest}")
    assert ingest.outcomes == 40_000
    assert ingest.core_share < 1.0
