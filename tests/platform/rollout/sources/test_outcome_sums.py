"""Outcome metrics from the collector's sums."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.rollout.series_fixtures import CANARY, POLICY, SeriesFixture, audience, sums

from reelway.platform.contracts.events import Arm
from reelway.platform.rollout import metric_names as names
from reelway.platform.rollout.assessment import assess
from reelway.platform.rollout.evidence import EvidenceState, MetricEvidence
from reelway.platform.rollout.policy import Slice, parse_policy
from reelway.platform.rollout.sources.series_reader import SeriesKey

OK, INSUFFICIENT, DOWN = EvidenceState.OK, EvidenceState.INSUFFICIENT, EvidenceState.TELEMETRY_DOWN
PARTS = (Slice.OVERALL, Slice.NEW_VIEWERS)
METRIC = ("long_watch_rate", Slice.OVERALL)


def sums_of_both_arms(canary: int, stable: int, **more: float) -> list[dict[SeriesKey, float]]:
    return [
        sums(arm, viewers, part=part, **more)  # type: ignore[arg-type]
        for arm, viewers in ((Arm.CANARY, canary), (Arm.STABLE, stable))
        for part in PARTS
    ]


def changed(values: list[dict[SeriesKey, float]], value: float | None, **labels: str) -> list[dict[SeriesKey, float]]:
    """The series with another value, or without one, for these labels."""
    wanted_labels = set(labels.items())
    assert any(wanted_labels <= set(key.labels) for part in values for key in part)
    return [
        {key: value if wanted_labels <= set(key.labels) else old for key, old in part.items()}  # type: ignore[misc]
        if value is not None
        else {key: old for key, old in part.items() if not wanted_labels <= set(key.labels)}
        for part in values
    ]


def metrics_of(series: SeriesFixture, now: float = 10) -> dict[tuple[str, Slice], MetricEvidence]:
    return dict(series.snapshot(now).metrics)


def only(*values: dict[SeriesKey, float], now: float = 10) -> dict[tuple[str, Slice], MetricEvidence]:
    series = SeriesFixture()
    series.collector(now, *values)
    return metrics_of(series, now)


def test_statistics_are_the_newest_sums() -> None:
    series = SeriesFixture()
    series.collector(5, *sums_of_both_arms(100, 900))
    series.collector(10, *sums_of_both_arms(120, 1000))
    metrics = metrics_of(series)[METRIC]
    assert metrics.state is OK
    assert (metrics.canary.viewers, metrics.stable.viewers) == (120, 1000)
    assert metrics.canary.impressions == metrics.canary.sum_x == sum(1 + i % 3 for i in range(120))
    assert metrics.canary.sum_xx == sum((1 + i % 3) ** 2 for i in range(120))
    assert set(metrics_of(series)) == {(metric.name, part) for metric, part in POLICY.tests}


def test_mean_metric_counts_every_viewer_once() -> None:
    arm = only(*sums_of_both_arms(120, 1000))["like_rate", Slice.OVERALL].canary
    assert (arm.sum_x, arm.sum_xx, arm.sum_xy) == (120, 120, arm.sum_y)
    assert arm.impressions > 120


def test_scraped_sums_lead_to_the_same_verdict() -> None:
    series = SeriesFixture()
    series.collector(10, *sums_of_both_arms(3_000, 3_000, rate=0.5))
    verdict = assess(POLICY, series.snapshot(10)).outcomes[0]
    assert verdict.canary == pytest.approx(0.5, abs=1e-3)
    assert verdict.canary_viewers == 3_000


def test_arm_without_impressions_is_insufficient() -> None:
    for values in ([], [sums(Arm.STABLE, 1000, part=part) for part in PARTS]):
        metrics = only(*values)
        assert {e.state for e in metrics.values()} == {INSUFFICIENT}


def test_slice_without_viewers_is_insufficient() -> None:
    metrics = only(*(sums(arm, 500) for arm in (Arm.CANARY, Arm.STABLE)))
    assert metrics[METRIC].state is OK
    assert metrics["long_watch_rate", Slice.NEW_VIEWERS].state is INSUFFICIENT


def test_sums_of_another_rollout_are_ignored() -> None:
    assert only(*sums_of_both_arms(500, 500, rollout="r-6"))[METRIC].state is INSUFFICIENT  # type: ignore[arg-type]


def test_sums_of_an_arms_other_release_are_ignored() -> None:
    late = [
        {SeriesKey.of(key.name, {**dict(key.labels), "release": "c" * 12}): v for key, v in part.items()}
        for part in (sums(Arm.STABLE, 300),)
    ]
    assert only(*sums_of_both_arms(500, 500), *late)[METRIC].stable.viewers == 500


def test_silent_collector_is_telemetry_down() -> None:
    series = SeriesFixture()
    series.routers((5, []), (10, []))
    metrics = metrics_of(series)
    assert {e.state for e in metrics.values()} == {DOWN}
    assert "no reelway-outcomes answered" in metrics[METRIC].detail


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "canary's sum_xx of long_watch_rate on overall is absent"),
        (math.nan, "canary's sum_xx of long_watch_rate on overall is nan"),
        (math.inf, "is inf"),
        (-1.0, "is -1, expected a number of 0 or more"),
        (0.0, "impossible for any set of viewers"),
    ],
)
def test_impossible_sums_are_telemetry_down(value: float | None, message: str) -> None:
    labels = {"arm": "canary", "slice": "overall", "statistic": "sum_xx"}
    metrics = only(*changed(sums_of_both_arms(100, 100), value, **labels))
    assert metrics[METRIC].state is DOWN
    assert message in metrics[METRIC].detail
    assert metrics["long_watch_rate", Slice.NEW_VIEWERS].state is OK


def test_uncounted_outcome_is_telemetry_down_alone() -> None:
    metrics = only(*changed(sums_of_both_arms(100, 100), None, metric="like_rate"))
    assert metrics["like_rate", Slice.OVERALL].state is DOWN
    assert "absent although the arm has had viewers" in metrics["like_rate", Slice.OVERALL].detail
    assert metrics[METRIC].state is OK


def test_unknown_metric_detail_lists_known_metrics() -> None:
    wrong = parse_policy("steps: [{weight_percent: 5}]\noutcomes: [{name: dwell, margin: 0.05}]", source="test")
    series = SeriesFixture()
    series.collector(10, *sums_of_both_arms(100, 100))
    [detail] = {e.detail for e in series.snapshot(10, policy=wrong).metrics.values()}
    assert "no series counts dwell; known metrics: long_watch_rate" in detail


@settings(deadline=None)
@given(st.sampled_from(names.AUDIENCE_COUNTS[:3]), st.floats(0, 0.999_999), st.sampled_from([*Arm][:2]))
def test_decreased_counts_are_telemetry_down(statistic: str, kept: float, arm: Arm) -> None:
    complete = sums_of_both_arms(100, 400)
    wanted = (names.AUDIENCE, statistic, arm)
    key = next(k for part in complete for k in part if (k.name, k.get("statistic"), k.get("arm")) == wanted)
    less = [{k: v * kept if k == key else v for k, v in part.items()} for part in complete]
    fell, grew = SeriesFixture(), SeriesFixture()
    fell.collector(-500, *complete)
    fell.collector(10, *less)
    assert {e.state for e in metrics_of(fell).values()} == {DOWN}
    assert "collector data lost" in metrics_of(fell)[METRIC].detail
    grew.collector(-500, *less)
    grew.collector(10, *complete)
    assert metrics_of(grew)[METRIC].state is OK


def test_sums_may_decrease() -> None:
    """A viewer stops being evidence when it does the same on every impression."""
    series = SeriesFixture()
    series.collector(5, *sums_of_both_arms(100, 400))
    fewer = sums_of_both_arms(99, 400)
    counts = audience(Arm.CANARY, 100)
    series.collector(10, *({**part, **{k: v for k, v in counts.items() if k in part}} for part in fewer))
    assert (metrics_of(series)[METRIC].state, metrics_of(series)[METRIC].canary.viewers) == (OK, 99)


def test_audience_is_read_with_the_sums() -> None:
    series = SeriesFixture()
    silent = {**sums(Arm.CANARY, 100), **audience(Arm.CANARY, 120, silent=20, weight=0.75)}
    series.collector(10, silent, sums(Arm.STABLE, 400))
    found = series.snapshot(10).audiences
    assert (found[Arm.CANARY].viewers, found[Arm.STABLE].viewers) == (120, 400)
    assert (found[Arm.CANARY].all, found[Arm.CANARY].silent) == ((90, 67.5), (15, 11.25))


@pytest.mark.parametrize("name", [names.AUDIENCE, names.AUDIENCE_WEIGHT])
def test_absent_audience_is_telemetry_down(name: str) -> None:
    """Forged viewers would go unnoticed without it."""
    parts = [{k: v for k, v in part.items() if k.name != name} for part in sums_of_both_arms(100, 400)]
    metrics = only(*parts)
    assert {e.state for e in metrics.values()} == {DOWN}
    assert "stable's audience has no" in metrics[METRIC].detail


def test_vanished_sums_are_telemetry_down() -> None:
    series = SeriesFixture()
    series.collector(5, *sums_of_both_arms(100, 100))
    series.collector(10)
    assert "fell from" in metrics_of(series)[METRIC].detail


def test_last_sums_are_used_until_they_are_too_old() -> None:
    series = SeriesFixture()
    series.collector(5, *sums_of_both_arms(100, 100))
    series.failed(names.OUTCOMES_JOB, 10)
    assert metrics_of(series, 24)[METRIC].state is OK
    assert metrics_of(series, 26)[METRIC].state is DOWN
    assert "has not answered for 21 s, allowed 20 s" in metrics_of(series, 26)[METRIC].detail


def test_successor_of_a_collector_replaces_its_sums() -> None:
    series = SeriesFixture()
    series.collector(2, *sums_of_both_arms(100, 200), instance="old")
    series.gone(names.OUTCOMES_JOB, 8, instance="old")
    series.collector(9, *sums_of_both_arms(110, 220), instance="new")
    metrics = metrics_of(series)[METRIC]
    assert (metrics.state, metrics.canary.viewers) == (OK, 110)


def test_successor_without_data_is_detected() -> None:
    series = SeriesFixture()
    series.collector(-300, *sums_of_both_arms(100, 200), instance="old")  # outside of the window
    series.collector(9, *sums_of_both_arms(60, 120), instance="new")
    assert "fell from 100 to 60" in metrics_of(series)[METRIC].detail


def test_sums_of_a_collector_at_two_addresses_count_once() -> None:
    series = SeriesFixture()
    series.collector(9, *sums_of_both_arms(60, 90), instance="a")
    series.collector(10, *sums_of_both_arms(63, 95), instance="b")
    metrics = metrics_of(series)[METRIC]
    assert (metrics.state, metrics.canary.viewers, metrics.stable.viewers) == (OK, 63, 95)


def test_snapshot_time_is_that_of_the_oldest_scrape() -> None:
    series = SeriesFixture()
    series.routers((4, []), (9, []))
    series.collector(7, *sums_of_both_arms(100, 100))
    snapshot = series.snapshot(10)
    assert (snapshot.time, snapshot.release) == (7, CANARY)
    assert SeriesFixture().snapshot(10).time == 10
