"""Evidence from a real Prometheus, and from invalid answers of a fake one."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tests.support.rollout.exporter import Exporter
from tests.support.rollout.observed_rollout import QUICK, Monitoring, ObservedRollout
from tests.support.rollout.series_fixtures import CANARY, POLICY, state_of
from tests.support.rollout.servers import SCRAPE_S, free_address, prometheus

from reelway.platform.contracts.events import Arm
from reelway.platform.rollout import metric_names as names
from reelway.platform.rollout.evidence import EvidenceSnapshot, EvidenceState
from reelway.platform.rollout.policy import Slice
from reelway.platform.rollout.sources import evidence_source
from reelway.platform.rollout.sources.direct_scrape import INTERVAL_S
from reelway.platform.rollout.sources.prometheus_reader import TIMEOUT_S, PrometheusReader
from reelway.platform.rollout.sources.series_reader import Scope
from reelway.platform.run_directory import RunDirectory

OK, INSUFFICIENT, DOWN = EvidenceState.OK, EvidenceState.INSUFFICIENT, EvidenceState.TELEMETRY_DOWN
METRIC = ("long_watch_rate", Slice.OVERALL)


def errors(snapshot: EvidenceSnapshot) -> tuple[EvidenceState, float, float]:
    reading = snapshot.guardrails["error_ratio"]
    return reading.state, reading.events, reading.trials


def test_prometheus_gives_the_same_evidence_as_a_direct_scrape(watched: ObservedRollout) -> None:
    exporter = watched.exporter
    with closing(evidence_source(watched.run)) as direct:
        exporter.mirror("compared", 4)
        direct.fetch(QUICK, watched.state, time.time())
        assert watched.after_a_scrape().metrics[METRIC].state is INSUFFICIENT  # answers without impressions
        exporter.count(Arm.CANARY, times=40)
        exporter.count(Arm.CANARY, "failed", 2, latency_s=0.3)
        exporter.count(Arm.SHADOW, "degraded", 5, latency_s=0.07, empty=3)
        exporter.count(Arm.STABLE, times=60, latency_s=0.04)
        exporter.count(Arm.HOLDOUT, "failed", 60)
        exporter.mirror("compared", 30)
        exporter.mirror("dropped", 7)
        exporter.mirror("failed", 2)
        watched.add_sums(100, 400)
        time.sleep(INTERVAL_S)  # the reader scrapes no more often
        scraped = direct.fetch(QUICK, watched.state, time.time())
    through = watched.after_a_scrape()
    assert errors(through) == (OK, 7, 47)
    assert through.guardrails == scraped.guardrails
    assert through.metrics == scraped.metrics
    assert through.metrics[METRIC].state is OK
    assert through.guardrails["p99_ms"].stable_value == pytest.approx(25 + 25 * 0.99)
    assert through.shadow_requests == scraped.shadow_requests == 30  # an increase starts at the series' first sample


def test_increase_is_correct_across_a_restart(watched: ObservedRollout) -> None:
    watched.exporter.count(Arm.CANARY, times=50)
    watched.add_sums(100, 400)
    assert errors(watched.after_a_scrape()) == (OK, 0, 50)
    watched.exporter.restart()
    watched.exporter.count(Arm.CANARY, times=4)
    watched.exporter.count(Arm.CANARY, "failed", 1)
    back = watched.after_a_scrape()
    assert errors(back) == (OK, 1, 55)
    assert back.metrics[METRIC].state is OK
    watched.exporter.stop()
    try:
        down = watched.seen_when(lambda s: errors(s)[0] is DOWN and s.metrics[METRIC].state is DOWN)
        assert {e.state for e in down.metrics.values()} == {DOWN}
        assert f"{watched.exporter.address} has not answered for" in down.guardrails["error_ratio"].detail
    finally:
        watched.exporter.start_again()
    assert errors(watched.after_a_scrape()) == (OK, 1, 55)


def test_collector_data_loss_is_detected_by_the_maximum(watched: ObservedRollout) -> None:
    watched.add_sums(100, 400)
    watched.seen_when(lambda s: s.metrics[METRIC].state is OK)
    watched.add_sums(60, 200)
    lost = watched.seen_when(lambda s: s.metrics[METRIC].state is DOWN)
    assert "collector data lost" in lost.metrics[METRIC].detail
    time_of_the_fall = lost.time
    watched.seen_when(lambda s: s.time > time_of_the_fall + 1.5)  # outside of the window of one second
    with closing(PrometheusReader(watched.monitoring.prometheus.url)) as reader:
        heard = reader.read(Scope.of(watched.state, window_s=1.0), time.time())
    viewers = [
        rows for key, rows in heard.series.items() if key.name == names.AUDIENCE and key.get("statistic") == "viewers"
    ]
    assert {rows[0].value for rows in viewers} == {100, 400}
    assert {rows[-1].value for rows in viewers} == {60, 200}


def test_read_takes_less_than_100_ms(watched: ObservedRollout) -> None:
    watched.add_sums(100, 400)
    watched.after_a_scrape()
    took = []
    for _ in range(20):
        began = time.perf_counter()
        watched.evidence()
        took.append(time.perf_counter() - began)
    assert min(took) < 0.1


def test_hanging_prometheus_is_telemetry_down_until_it_answers(watched: ObservedRollout) -> None:
    with watched.monitoring.prometheus.hung():
        began = time.perf_counter()
        down = watched.evidence()
        assert time.perf_counter() - began < 5 * TIMEOUT_S
    assert {e.state for e in down.metrics.values()} == {DOWN}
    assert {reading.state for reading in down.guardrails.values()} == {DOWN}
    assert "no answer from Prometheus at" in down.guardrails["p99_ms"].detail
    watched.after_a_scrape()


def test_prometheus_without_targets_is_telemetry_down(tmp_path: Path) -> None:
    details = []
    with (
        prometheus(tmp_path, alertmanager=free_address()) as server,
        closing(evidence_source(RunDirectory(tmp_path), server.url)) as source,
    ):
        for _ in range(2):
            snapshot = source.fetch(POLICY, state_of(), time.time())
            assert {e.state for e in snapshot.metrics.values()} == {DOWN}
            assert {reading.state for reading in snapshot.guardrails.values()} == {DOWN}
            details.append(snapshot.guardrails["p99_ms"].detail)
            server.stop()
    assert details[0] == "no reelway-router answered in the last 20 s"
    assert f"no answer from Prometheus at {server.url}" in details[1]


def test_counts_of_a_removed_replica_are_used(watched: ObservedRollout) -> None:
    watched.other.count(Arm.CANARY, times=5)
    watched.exporter.count(Arm.CANARY, times=7)
    watched.seen_when(lambda s: errors(s) == (OK, 0, 12))
    watched.other.stop()
    try:
        silent = watched.seen_when(lambda s: errors(s)[0] is DOWN)  # it does not answer, and is still a target
        assert f"{watched.other.address} has not answered" in silent.guardrails["error_ratio"].detail
        watched.monitoring.prometheus.scrape(watched.exporter.address)
        assert errors(watched.seen_when(lambda s: errors(s)[0] is OK)) == (OK, 0, 12)
    finally:
        watched.other.start_again()
        watched.monitoring.prometheus.scrape(watched.exporter.address, watched.other.address)


# Answers that a healthy Prometheus does not give


PAGE = "/api/v1/query"


@pytest.fixture
def page() -> Iterator[Exporter]:
    exporter = Exporter("", "")
    yield exporter
    exporter.stop()


def success(result: object, kind: str = "matrix", **more: object) -> bytes:
    return json.dumps({"status": "success", "data": {"resultType": kind, "result": result}, **more}).encode()


NOW = 200, success([1_000.0, "1000.0"], kind="scalar")


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (503, b'{"status":"error","errorType":"timeout","error":"query timed out"}', "503: timeout: query timed out"),
        (200, b'{"status":"error","errorType":"execution","error":"too many samples"}', "too many samples"),
        (200, success([], warnings=["store 3 did not answer"]), "gave a partial answer: store 3 did not answer"),
        (502, b"<html>bad gateway</html>", "expected an answer of API v1 (502, '<html>bad gateway"),
        (200, b'{"status":"succ', "expected an answer of API v1"),
        (200, b"[]", "answered 200: []"),
        (200, success([], kind="scalar"), "answered scalar, expected matrix"),
        (200, success([{"metric": {}, "values": [[1, "many"]]}]), "could not convert string to float"),
        (200, success([{"metric": {}}]), "KeyError('values')"),
        (200, b'{"status":"success"}', "KeyError('data')"),
    ],
)
def test_invalid_or_partial_answer_is_telemetry_down(
    page: Exporter, tmp_path: Path, status: int, body: bytes, message: str
) -> None:
    page.answer = {PAGE: (status, body), f"{PAGE}?query=time%28%29&timeout=1s": NOW}
    with closing(evidence_source(RunDirectory(tmp_path), f"http://{page.address}/")) as source:
        snapshot = source.fetch(POLICY, state_of(), 1_000.0)
    assert {e.state for e in snapshot.metrics.values()} == {DOWN}
    assert {reading.state for reading in snapshot.guardrails.values()} == {DOWN}
    assert message in snapshot.guardrails["error_ratio"].detail


def test_slow_prometheus_is_telemetry_down_after_the_timeout(page: Exporter) -> None:
    page.delay_s = 3.0
    began = time.perf_counter()
    with closing(PrometheusReader(f"http://{page.address}", timeout_s=0.1)) as reader:
        heard = reader.read(Scope.of(state_of()), 1_000.0)
    assert time.perf_counter() - began < 2.5
    assert "timed out" in heard.problem


def test_regular_expression_in_a_label_is_escaped(monitoring: Monitoring) -> None:
    scope = Scope('r"1\\.*', ("c|.*", "5(?"), 0.0, 0.0)
    with closing(PrometheusReader(monitoring.prometheus.url)) as reader:
        heard = reader.read(scope, time.time())
    assert (heard.problem, {key.name for key in heard.series} - {"up"}) == ("", set())


def test_nan_sample_stays_nan(page: Exporter) -> None:
    series = {"__name__": names.REQUESTS, "job": names.ROUTER_JOB, "release": CANARY[:12]}
    page.answer = {PAGE: (200, success([{"metric": series, "values": [[1.5, "NaN"], [2.5, "+Inf"]]}]))}
    with closing(PrometheusReader(f"http://{page.address}")) as reader:
        rows = reader._query("x", 3.0, "matrix")
    [[first, second]] = rows.values()
    assert (first.time, str(first.value), second.value) == (1.5, "nan", float("inf"))


@pytest.mark.parametrize("body", [b"<html>", success([1.0, "later"], "scalar"), success([], "vector"), b"{}"])
def test_prometheus_that_tells_no_time_is_telemetry_down(page: Exporter, body: bytes) -> None:
    page.answer = {PAGE: (200, body)}
    with closing(PrometheusReader(f"http://{page.address}")) as reader:
        heard = reader.read(Scope.of(state_of()), 1_000.0)
    assert (dict(heard.series), f"Prometheus at http://{page.address}" in heard.problem) == ({}, True)


@pytest.mark.parametrize("ahead_s", [-45.0, 45.0, 900.0])
def test_skewed_clock_of_prometheus_changes_no_evidence(watched: ObservedRollout, ahead_s: float) -> None:
    """The controller's clock is ahead of Prometheus' by this much, and the rollout began by the controller's clock."""
    watched.exporter.count(Arm.CANARY, times=40)
    watched.exporter.count(Arm.CANARY, "failed", 2)
    watched.add_sums(100, 400)
    right = watched.after_a_scrape()
    assert errors(right) == (OK, 2, 42)
    started_at = watched.began_at + ahead_s
    state = watched.state.model_copy(update={"started_at": started_at, "changed_at": started_at})
    with closing(evidence_source(watched.run, watched.monitoring.prometheus.url)) as skewed:
        before = skewed.fetch(QUICK, state, time.time() + ahead_s)
        after = skewed.fetch(QUICK, state, time.time() + ahead_s)
    assert (errors(after), after.metrics) == (errors(right), right.metrics)
    assert abs(after.time - right.time - ahead_s) < 4 * SCRAPE_S
    assert after.time >= before.time, "a sample does not appear older when it is read again"
