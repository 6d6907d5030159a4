"""States of evidence: counters, outcome metrics and guardrails."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.rollout.canary_events import POLICY, RELEASE, HistoryGenerator

from reelway.platform.rollout.assessment import assess
from reelway.platform.rollout.counters import CounterReading, Sample, counter_increase, sum_counters
from reelway.platform.rollout.evidence import (
    ArmStatistics,
    EvidenceSnapshot,
    EvidenceState,
    FiringAlert,
    GuardrailReading,
    MetricEvidence,
    metric_evidence,
)
from reelway.platform.rollout.policy import RolloutPolicy, Slice, parse_policy

OK, BAD, INSUFFICIENT, DOWN = (
    EvidenceState.OK, EvidenceState.BAD, EvidenceState.INSUFFICIENT, EvidenceState.TELEMETRY_DOWN,
)  # fmt: skip
KINDS = HistoryGenerator(0).kinds


def _policy(more: str = "") -> RolloutPolicy:
    return parse_policy(POLICY + more, source="test")


def _guardrail(name: str, reading: GuardrailReading | None, policy: RolloutPolicy | None = None) -> EvidenceState:
    readings = {**KINDS["good"].guardrails, name: reading}
    given_ = {key: value for key, value in readings.items() if value is not None}
    snapshot = replace(KINDS["good"], guardrails=given_)  # type: ignore[arg-type]
    return {g.name: g.state for g in assess(policy or _policy(), snapshot).guardrails}[name]


# Counters


@given(st.lists(st.lists(st.integers(0, 1_000), min_size=1, max_size=6), min_size=1, max_size=6), st.randoms())
def test_counter_increase_survives_resets_in_any_order(lives: list[list[int]], rng) -> None:  # type: ignore[no-untyped-def]
    """Each process counts from 0; the increase is the sum over all processes if each restart lowers the counter."""
    samples, time, total, previous = [], 0.0, 0.0, 0.0
    for steps in lives:
        value = 0.0
        for step in steps:
            value += step
            samples.append(Sample(time, value))
            time += 10
        first = samples[-len(steps)].value
        total += value if first < previous else value - previous
        previous = value
    shuffled = [*samples, rng.choice(samples)]
    rng.shuffle(shuffled)
    reading = counter_increase(shuffled, now=time, max_age_s=60, origin=True)
    assert reading.state is OK
    assert reading.increase == pytest.approx(total)


@given(st.lists(st.floats(0, 1e9), min_size=2, max_size=20))
def test_counter_increase_is_not_negative_with_nan_samples(values: list[float]) -> None:
    samples = [Sample(10.0 * i, v) for i, v in enumerate(values)]
    holes = [Sample(10.0 * i + 5, math.nan) for i in range(len(values) - 1)]
    now = samples[-1].time
    plain = counter_increase(samples, now=now, max_age_s=60)
    assert plain.increase >= 0
    assert counter_increase(samples + holes, now=now, max_age_s=60) == plain


@pytest.mark.parametrize(
    ("samples", "state", "detail"),
    [
        (None, DOWN, "absent"),
        ([], DOWN, "absent"),
        ([Sample(0, math.nan), Sample(10, math.inf)], DOWN, "all 2 samples are NaN or infinite"),
        ([Sample(-200, 1), Sample(-100, 2)], DOWN, "the last sample is 120 s old, allowed 60 s"),
        ([Sample(0, 1), Sample(10, 2), Sample(20, math.nan)], DOWN, "went stale"),
        ([Sample(0, -1), Sample(10, 2)], DOWN, "a counter of -1"),
        ([Sample(10, 2)], INSUFFICIENT, "one sample"),
        ([Sample(0, 1), Sample(10, 3)], OK, ""),
    ],
)
def test_counter_state_depends_on_its_samples(samples: list[Sample], state: EvidenceState, detail: str) -> None:
    reading = counter_increase(samples, now=20, max_age_s=60)
    assert reading.state is state
    assert detail in reading.detail


def test_sum_with_an_unresponsive_replica_is_unknown() -> None:
    heard, silent = CounterReading(OK, 5.0, 1), CounterReading(DOWN, detail="the series is absent")
    assert sum_counters([heard, heard]) == CounterReading(OK, 10.0, 2)
    assert sum_counters([heard, silent]).state is DOWN
    assert "1 of 2 replicas" in sum_counters([heard, silent]).detail
    assert sum_counters([]).state is DOWN


# Outcome metrics


def test_missing_or_inconsistent_sums_are_telemetry_down() -> None:
    good = KINDS["good"].metrics["long_watch_rate", Slice.OVERALL].canary
    assert metric_evidence(good, good, minimum_viewers=200).state is OK
    assert metric_evidence(good, None, minimum_viewers=200).state is DOWN
    assert metric_evidence(good, replace(good, sum_y=math.nan), minimum_viewers=200).state is DOWN
    assert metric_evidence(good, replace(good, viewers=-1), minimum_viewers=200).state is DOWN
    assert metric_evidence(good, replace(good, sum_xx=1.0), minimum_viewers=200).state is DOWN
    assert metric_evidence(good, replace(good, viewers=10**6), minimum_viewers=10**9).state is INSUFFICIENT
    assert metric_evidence(good, ArmStatistics(), minimum_viewers=200).state is INSUFFICIENT


@pytest.mark.parametrize(
    ("kind", "finding"),
    [
        ("good", "harm_excluded"), ("few", "undecided"), ("tiny", "insufficient"), ("harm", "harm_established"),
        ("nan", "telemetry_down"), ("nothing", "telemetry_down"),
    ],
)  # fmt: skip
def test_outcome_metric_gets_the_expected_finding(kind: str, finding: str) -> None:
    verdict = assess(_policy(), KINDS[kind]).outcomes[0]
    assert verdict.finding == finding
    assert verdict.sentence.startswith("long_watch_rate: ")
    if finding == "harm_established":
        assert verdict.state is BAD
        assert "beyond the margin of 5.0% is established" in verdict.sentence
        assert "-24.8%" in verdict.sentence, "the sentence contains the relative change"


def test_telemetry_down_of_the_source_overrides_its_numbers() -> None:
    key = ("long_watch_rate", Slice.OVERALL)
    metric = KINDS["harm"].metrics[key]
    snapshot = replace(
        KINDS["harm"], metrics={key: MetricEvidence(DOWN, metric.stable, metric.canary, "scrape failed")}
    )
    assert assess(_policy(), snapshot).outcomes[0].finding == "telemetry_down"


def test_lower_is_better_metric_is_harmed_by_an_increase() -> None:
    key, metric = ("skip_rate", Slice.OVERALL), KINDS["harm"].metrics["long_watch_rate", Slice.OVERALL]
    rising = MetricEvidence(OK, stable=metric.canary, canary=metric.stable)
    falling = MetricEvidence(OK, stable=metric.stable, canary=metric.canary)
    findings = [
        assess(_policy(), replace(KINDS["good"], metrics={key: e})).outcomes[1].finding for e in (rising, falling)
    ]
    assert findings == ["harm_established", "harm_excluded"]


# Guardrails: one test per limit


def test_error_ratio_is_assessed_against_its_limit() -> None:
    assert _guardrail("error_ratio", GuardrailReading(OK, 10, 500)) is OK
    assert _guardrail("error_ratio", GuardrailReading(OK, 40, 500)) is BAD
    assert _guardrail("error_ratio", GuardrailReading(OK, 4, 4)) is BAD
    assert _guardrail("error_ratio", GuardrailReading(OK, 1, 4)) is INSUFFICIENT
    assert _guardrail("error_ratio", GuardrailReading(OK, 5, 4)) is DOWN
    assert _guardrail("error_ratio", GuardrailReading(OK, math.nan, 4)) is DOWN
    assert _guardrail("error_ratio", None) is DOWN


def test_empty_slate_ratio_has_its_own_limit() -> None:
    assert _guardrail("empty_slate_ratio", GuardrailReading(OK, 5, 500)) is OK
    assert _guardrail("empty_slate_ratio", GuardrailReading(OK, 40, 500)) is BAD


def test_p99_is_bounded_in_milliseconds_and_by_stable() -> None:
    relative = _policy("guardrails: {p99_ms: {maximum: 250, maximum_ratio_to_stable: 1.5, minimum_requests: 200}}")
    assert _guardrail("p99_ms", GuardrailReading(OK, trials=500, value=250.0)) is OK
    assert _guardrail("p99_ms", GuardrailReading(OK, trials=500, value=250.1)) is BAD
    assert _guardrail("p99_ms", GuardrailReading(OK, trials=199, value=900.0)) is INSUFFICIENT
    assert _guardrail("p99_ms", GuardrailReading(OK, trials=500, value=math.nan)) is DOWN
    assert _guardrail("p99_ms", GuardrailReading(OK, trials=500)) is DOWN
    assert _guardrail("p99_ms", GuardrailReading(OK, trials=500, value=149.0, stable_value=100.0), relative) is OK
    assert _guardrail("p99_ms", GuardrailReading(OK, trials=500, value=151.0, stable_value=100.0), relative) is BAD
    assert _guardrail("p99_ms", GuardrailReading(OK, trials=500, value=151.0), relative) is DOWN


def test_parity_guardrail_breaches_at_one_mismatch() -> None:
    assert _guardrail("parity_mismatches", GuardrailReading(OK, 0, 10)) is OK
    assert _guardrail("parity_mismatches", GuardrailReading(OK, 1, 10, detail="video_like_rate_1h")) is BAD
    assert _guardrail("parity_mismatches", GuardrailReading(OK, 0, 0)) is INSUFFICIENT
    assert _guardrail("parity_mismatches", GuardrailReading(INSUFFICIENT)) is INSUFFICIENT


def test_only_alerts_with_the_release_label_count() -> None:
    own, foreign = (FiringAlert("Burn", release, 0.0) for release in (RELEASE, "f" * 64))
    for alerts, state in (((own,), BAD), ((foreign,), OK), ((), OK)):
        findings = assess(_policy(), replace(KINDS["good"], alerts=alerts)).guardrails[-1]
        assert (findings.name, findings.state) == ("firing_alerts", state)


def test_null_guardrail_is_disabled() -> None:
    off = _policy("guardrails: {error_ratio: null, empty_slate_ratio: null, p99_ms: null, parity_mismatches: null}")
    assert [g.name for g in assess(off, EvidenceSnapshot(0.0, RELEASE)).guardrails] == ["firing_alerts"]
