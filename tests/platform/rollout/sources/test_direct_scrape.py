"""Evidence from direct scrapes of a service."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tests.support.rollout.exporter import Exporter
from tests.support.rollout.series_fixtures import CANARY, POLICY, STABLE, state_of, sums

from reelway.platform.contracts.events import Arm
from reelway.platform.errors import ServingError
from reelway.platform.rollout import metric_names as names
from reelway.platform.rollout.evidence import EvidenceSnapshot, EvidenceState
from reelway.platform.rollout.policy import Slice
from reelway.platform.rollout.sources import SeriesEvidenceSource, evidence_source
from reelway.platform.rollout.sources.direct_scrape import DirectScrapeReader, internal_url
from reelway.platform.rollout.sources.parity_findings import read_parity
from reelway.platform.rollout.sources.series_reader import Scope
from reelway.platform.rollout.state import RolloutState
from reelway.platform.run_directory import RunDirectory

OK, INSUFFICIENT, DOWN = EvidenceState.OK, EvidenceState.INSUFFICIENT, EvidenceState.TELEMETRY_DOWN
METRIC = ("long_watch_rate", Slice.OVERALL)


class Scraped:
    """A run whose service is an exporter, and its evidence at chosen times."""

    def __init__(self, folder: Path) -> None:
        self.run = RunDirectory(folder)
        self.exporter = Exporter(CANARY[: names.SHORT_RELEASE], STABLE[: names.SHORT_RELEASE])
        patient = DirectScrapeReader(lambda: internal_url(self.run), timeout_s=20.0)  # for a busy machine
        self.source = SeriesEvidenceSource(patient, lambda: read_parity(self.run))
        self.record()

    def record(self) -> None:
        (self.run.path / "serving.json").write_text(json.dumps({"internal_url": f"http://{self.exporter.address}/"}))

    def at(self, now: float, state: RolloutState | None = None) -> EvidenceSnapshot:
        return self.source.fetch(POLICY, state or state_of(), now)


@pytest.fixture
def scraped(tmp_path: Path) -> Iterator[Scraped]:
    one = Scraped(tmp_path)
    yield one
    one.source.close()
    one.exporter.stop()


def errors(snapshot: EvidenceSnapshot) -> tuple[EvidenceState, float, float]:
    reading = snapshot.guardrails["error_ratio"]
    return reading.state, reading.events, reading.trials


def test_two_scrapes_make_a_window(scraped: Scraped) -> None:
    scraped.exporter.count(Arm.CANARY, times=10)
    assert errors(scraped.at(100))[0] is INSUFFICIENT
    scraped.exporter.count(Arm.CANARY, times=7)
    scraped.exporter.count(Arm.CANARY, "failed", 3)
    scraped.exporter.count(Arm.STABLE, "failed", 30)
    scraped.exporter.sums.values = {**sums(Arm.CANARY, 100), **sums(Arm.STABLE, 300)}
    found = scraped.at(101)
    assert errors(found) == (OK, 3, 10)
    assert (found.metrics[METRIC].state, found.metrics[METRIC].stable.viewers) == (OK, 300)
    assert found.guardrails["p99_ms"].value == pytest.approx(16 + 9 * 0.99)
    assert found.time == 101
    assert errors(scraped.at(162))[0] is INSUFFICIENT  # outside of the window


def test_reader_scrapes_at_most_twice_per_second(scraped: Scraped) -> None:
    scraped.at(100)
    scraped.at(101)
    scraped.exporter.count(Arm.CANARY, times=5)
    assert scraped.at(101.3).time == 101
    assert errors(scraped.at(101.6)) == (OK, 0, 5)


def test_failed_scrapes_become_telemetry_down_only_with_age(scraped: Scraped) -> None:
    scraped.exporter.count(Arm.CANARY, times=1)
    scraped.at(100)
    scraped.exporter.count(Arm.CANARY, times=9)
    scraped.at(101)
    scraped.exporter.answer = dict.fromkeys(scraped.exporter.pages, (500, b""))
    gap = scraped.at(102)
    assert (errors(gap), gap.time) == ((OK, 0, 9), 101)
    down = scraped.at(122)
    assert errors(down)[0] is DOWN
    assert "has not answered for 21 s, allowed 20 s" in down.guardrails["error_ratio"].detail
    assert "500" in down.guardrails["error_ratio"].detail
    assert {e.state for e in down.metrics.values()} == {DOWN}
    scraped.exporter.answer = {}
    scraped.exporter.count(Arm.CANARY, times=2)
    assert errors(scraped.at(123)) == (OK, 0, 11)


def test_failed_endpoint_does_not_affect_the_other(scraped: Scraped) -> None:
    scraped.exporter.count(Arm.CANARY, times=1)
    scraped.exporter.answer = {"/v1/outcomes/metrics": (503, b"")}
    scraped.at(100)
    scraped.exporter.count(Arm.CANARY, times=9)
    found = scraped.at(101)
    assert errors(found) == (OK, 0, 9)
    assert found.metrics[METRIC].state is DOWN


@pytest.mark.parametrize(
    "body", [b"reelway_ingress_requests_total{release=", b'reelway_ingress_requests_total{a="b"} x']
)
def test_answer_in_another_format_is_a_failed_scrape(scraped: Scraped, body: bytes) -> None:
    scraped.exporter.answer = {"/metrics": (200, body)}
    assert errors(scraped.at(100))[0] is DOWN


def test_service_with_a_new_address_loses_no_counts(scraped: Scraped) -> None:
    scraped.exporter.sums.values = {**sums(Arm.CANARY, 100), **sums(Arm.STABLE, 300)}
    scraped.exporter.count(Arm.CANARY, times=5)
    scraped.at(100)
    scraped.exporter.count(Arm.CANARY, times=5)
    scraped.at(101)
    kept = scraped.exporter.sums.values
    (scraped.run.path / "serving.json").unlink()
    scraped.exporter.stop()
    away = scraped.at(102)
    assert errors(away)[0] is DOWN
    assert "is not being served; start `reelway serve" in away.guardrails["error_ratio"].detail
    scraped.exporter = Exporter(CANARY[: names.SHORT_RELEASE], STABLE[: names.SHORT_RELEASE])
    scraped.exporter.sums.values = kept
    scraped.record()
    scraped.at(110)
    scraped.exporter.count(Arm.CANARY, times=4)
    back = scraped.at(111)
    assert errors(back) == (OK, 0, 9)
    assert (back.metrics[METRIC].state, back.metrics[METRIC].canary.viewers) == (OK, 100)


def test_collector_data_loss_is_detected_after_the_window(scraped: Scraped) -> None:
    scraped.exporter.sums.values = {**sums(Arm.CANARY, 100), **sums(Arm.STABLE, 300)}
    scraped.at(100)
    scraped.exporter.sums.values = {**sums(Arm.CANARY, 60), **sums(Arm.STABLE, 200)}
    scraped.at(101)
    late = scraped.at(1_000)
    assert late.metrics[METRIC].state is DOWN
    assert "collector data lost" in late.metrics[METRIC].detail
    other = state_of(id="r-8")
    assert scraped.at(1_001, other).metrics[METRIC].state is INSUFFICIENT


def test_nan_sum_does_not_hide_a_later_decrease(scraped: Scraped) -> None:
    complete = {**sums(Arm.CANARY, 100), **sums(Arm.STABLE, 300)}
    for now, values in enumerate(
        (dict.fromkeys(complete, math.nan), complete, {k: v / 2 for k, v in complete.items()})
    ):
        scraped.exporter.sums.values = values
        found = scraped.at(100.0 + now).metrics[METRIC]
        assert found.state is (OK if now == 1 else DOWN), found
    assert "collector data lost" in found.detail


def test_run_without_prometheus_is_scraped_directly(scraped: Scraped) -> None:
    with closing(evidence_source(scraped.run)) as source:
        assert source.fetch(POLICY, state_of(), 100).time == 100


def test_clock_set_back_starts_a_new_window(scraped: Scraped) -> None:
    scraped.exporter.count(Arm.CANARY, times=5)
    scraped.at(1_000)
    scraped.at(1_001)
    assert errors(scraped.at(500))[0] is INSUFFICIENT
    scraped.exporter.count(Arm.CANARY, times=5)
    assert errors(scraped.at(501)) == (OK, 0, 5)


def test_reader_stores_only_needed_series(scraped: Scraped) -> None:
    reader = DirectScrapeReader(lambda: internal_url(scraped.run))
    scraped.exporter.count(Arm.CANARY, times=5)
    scraped.exporter.sums.values = {**sums(Arm.CANARY, 60), **sums(Arm.CANARY, 60, rollout="r-6")}
    for now in range(100, 180):
        heard = reader.read(Scope.of(state_of()), float(now))
    reader.close()
    assert {key.get("rollout") for key in heard.series} == {"", "r-7"}
    assert max(len(samples) for samples in heard.series.values()) <= 61
    assert not any(key.name.endswith(("_sum", "_created", "_count")) for key in heard.series)


def test_read_takes_less_than_100_ms(scraped: Scraped) -> None:
    for arm in (Arm.CANARY, Arm.STABLE, Arm.SHADOW):
        scraped.exporter.count(arm, times=5)
    scraped.exporter.sums.values = {
        key: value
        for arm in (Arm.CANARY, Arm.STABLE)
        for part in Slice
        for key, value in sums(arm, 60, part=part).items()
    }
    took = []
    for now in range(100, 115):
        began = time.perf_counter()
        scraped.at(float(now))
        took.append(time.perf_counter() - began)
    assert min(took) < 0.1


@pytest.mark.parametrize("text", ["", "{}", "[]"])
def test_error_names_an_invalid_serving_record(tmp_path: Path, text: str) -> None:
    (tmp_path / "serving.json").write_text(text)
    with pytest.raises(ServingError, match=r"serving\.json has no URL of the internal API"):
        internal_url(RunDirectory(tmp_path))
