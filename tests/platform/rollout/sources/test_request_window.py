"""Request guardrails from the router's counters."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.rollout.series_fixtures import CANARY, POLICY, SeriesFixture, requests, state_of

from reelway.platform.contracts.events import Arm
from reelway.platform.rollout import metric_names as names
from reelway.platform.rollout.counters import histogram_quantile
from reelway.platform.rollout.evidence import EvidenceState, GuardrailReading
from reelway.platform.rollout.policy import LatencyLimit
from reelway.platform.rollout.sources.series_reader import SeriesKey
from reelway.platform.rollout.state import Phase

OK, INSUFFICIENT, DOWN = EvidenceState.OK, EvidenceState.INSUFFICIENT, EvidenceState.TELEMETRY_DOWN


def reading(series: SeriesFixture, name: str, now: float = 10) -> GuardrailReading:
    return series.snapshot(now).guardrails[name]  # type: ignore[index]


def canary(**outcomes: float) -> dict[SeriesKey, float]:
    return requests(Arm.CANARY, **outcomes)  # type: ignore[arg-type]


def test_error_ratio_counts_the_canarys_requests_in_the_window() -> None:
    series = SeriesFixture()
    for at, n in ((-100.0, 0.0), (1.0, 100.0), (9.0, 200.0)):
        series.scrape(
            names.ROUTER_JOB, at,
            canary(ok=n, context_only=n / 10, degraded=n / 20, failed=n / 100),
            requests(Arm.SHADOW, ok=n / 2, failed=n / 50),
            requests(Arm.STABLE, ok=9 * n, failed=9 * n),
            requests(Arm.HOLDOUT, ok=n, failed=n),
        )  # fmt: skip
    guardrail = reading(series, "error_ratio")
    assert guardrail.state is OK
    assert guardrail.events == pytest.approx(5 + 1 + 2)
    assert guardrail.trials == pytest.approx(100 + 10 + 5 + 1 + 50 + 2)


def test_requests_of_another_release_are_ignored() -> None:
    series, other = SeriesFixture(), {"release": "f" * 12, "arm": "canary", "outcome": "failed"}
    for at in (1.0, 9.0):
        series.scrape(names.ROUTER_JOB, at, canary(ok=10 * at), {SeriesKey.of(names.REQUESTS, other): 10 * at})
    assert reading(series, "error_ratio").events == 0
    assert reading(series, "error_ratio").trials == 80


def test_errors_of_an_earlier_rollout_are_ignored() -> None:
    series = SeriesFixture()  # this rollout began at 0
    series.routers((-20, []), (-15, [canary(ok=4)]), (-5, [canary(ok=39, failed=36)]), (1, [canary(ok=39, failed=36)]),
                 (9, [canary(ok=89, failed=36)]))  # fmt: skip
    assert reading(series, "error_ratio").events == 0
    assert reading(series, "error_ratio").trials == 50


def test_new_error_series_counts_in_full() -> None:
    series = SeriesFixture()
    series.routers((1, [canary(ok=50)]), (5, [canary(ok=60, failed=7)]), (9, [canary(ok=70, failed=9)]))
    assert reading(series, "error_ratio").events == 9
    assert reading(series, "error_ratio").trials == 29


def test_router_restart_loses_no_scraped_counts() -> None:
    series = SeriesFixture()
    series.routers((1, [canary(ok=50)]), (4, [canary(ok=80)]), (7, []), (9, [canary(ok=5, failed=1)]))
    assert reading(series, "error_ratio").trials == 30 + 5 + 1


def test_restarted_router_without_canary_requests_is_ok() -> None:
    series = SeriesFixture()
    series.routers((1, [canary(ok=50)]), (4, [canary(ok=80)]), (9, []))
    assert reading(series, "error_ratio").trials == 30


def test_canary_without_requests_is_insufficient() -> None:
    series = SeriesFixture()
    series.routers((1, [requests(Arm.STABLE, ok=1)]), (9, [requests(Arm.STABLE, ok=50)]))
    for name in ("error_ratio", "empty_slate_ratio", "p99_ms"):
        assert reading(series, name).state is INSUFFICIENT
        assert "no request of the canary in the last 60 s" in reading(series, name).detail


def test_single_scrape_is_insufficient() -> None:
    series = SeriesFixture()
    series.routers((9, [canary(ok=50, failed=50)]))
    assert reading(series, "error_ratio").state is INSUFFICIENT


def test_silent_router_is_telemetry_down() -> None:
    series = SeriesFixture()
    for instance in ("a", "b"):
        series.routers((1, [canary(ok=10)]), (5, [canary(ok=20)]), instance=instance)
    for at in (10.0, 20.0, 28.0):
        series.routers((at, [canary(ok=20 + at)]), instance="a")
        series.failed(names.ROUTER_JOB, at, instance="b")
    assert reading(series, "error_ratio", 24).state is OK
    silent = reading(series, "error_ratio", 28)
    assert silent.state is DOWN
    assert "reelway-router at b has not answered for 23 s, allowed 20 s" in silent.detail


def test_counts_of_a_removed_router_are_used() -> None:
    series = SeriesFixture()
    for instance in ("a", "b"):
        series.routers((1, [canary(ok=10)]), (5, [canary(ok=20)]), instance=instance)
    series.routers((28, [canary(ok=50)]), instance="a")
    series.gone(names.ROUTER_JOB, 28, instance="b")
    guardrail = reading(series, "error_ratio", 28)
    assert (guardrail.state, guardrail.trials) == (OK, 40 + 10)


def test_service_without_routers_is_telemetry_down() -> None:
    series = SeriesFixture()
    series.routers((1, [canary(ok=10)]), (5, [canary(ok=20)]))
    series.gone(names.ROUTER_JOB, 8)
    assert reading(series, "error_ratio").state is DOWN


def test_new_router_does_not_hide_the_others() -> None:
    series = SeriesFixture()
    series.routers((1, [canary(ok=10)]), (9, [canary(ok=20, failed=5)]), instance="a")
    series.routers((9, [canary(ok=1)]), instance="new")
    assert (reading(series, "error_ratio").events, reading(series, "error_ratio").trials) == (5, 15)


@pytest.mark.parametrize(("value", "message"), [(math.nan, "went stale"), (-5.0, "a counter of -5")])
def test_impossible_counter_is_telemetry_down(value: float, message: str) -> None:
    series = SeriesFixture()
    series.routers((1, [canary(ok=10)]), (5, [canary(ok=20)]), (9, [canary(ok=value)]))
    assert reading(series, "error_ratio").state is DOWN
    assert message in reading(series, "error_ratio").detail


def test_detail_includes_the_readers_problem() -> None:
    for name in ("error_ratio", "empty_slate_ratio", "p99_ms"):
        guardrail = SeriesFixture().snapshot(10, problem="GET http://x/metrics: timed out").guardrails[name]  # type: ignore[index]
        assert guardrail.state is DOWN
        assert "GET http://x/metrics: timed out" in guardrail.detail


def test_empty_slate_ratio_is_at_most_1_for_a_torn_scrape() -> None:
    series = SeriesFixture()
    series.routers((1, [canary(ok=10, empty=2)]), (9, [canary(ok=30, empty=7)]))
    assert (reading(series, "empty_slate_ratio").events, reading(series, "empty_slate_ratio").trials) == (5, 20)
    torn = SeriesFixture()
    torn.routers((1, [canary(ok=10, empty=9)]), (9, [canary(ok=30, empty=30)]))
    assert (reading(torn, "empty_slate_ratio").events, reading(torn, "empty_slate_ratio").trials) == (20, 20)


# p99


def latency(arm: Arm, n: float, slow: float) -> dict[SeriesKey, float]:
    return requests(arm, ok=n, latency={"0.1": n - slow, "0.25": n - slow, "0.5": n, "+Inf": n})


def test_p99_uses_the_increases_of_both_arms() -> None:
    series = SeriesFixture()
    series.routers(
        (1, [latency(Arm.CANARY, 1000, 900), latency(Arm.STABLE, 1000, 0)]),
        (9, [latency(Arm.CANARY, 1200, 904), latency(Arm.STABLE, 3000, 0)]),
    )
    guardrail = reading(series, "p99_ms")
    assert (guardrail.state, guardrail.trials) == (OK, 200)
    assert guardrail.value == pytest.approx(1000 * (0.25 + 0.25 * (198 - 196) / 4))
    assert guardrail.stable_value == pytest.approx(1000 * 0.1 * 0.99)


def test_comparison_without_stable_requests_is_insufficient() -> None:
    series = SeriesFixture()
    series.routers((1, [latency(Arm.CANARY, 100, 0)]), (9, [latency(Arm.CANARY, 400, 0)]))
    limits = POLICY.guardrails.model_copy(update={"p99_ms": LatencyLimit(maximum_ratio_to_stable=1.5)})
    policy = POLICY.model_copy(update={"guardrails": limits})
    assert series.snapshot(10).guardrails["p99_ms"].state is OK
    compared = series.snapshot(10, policy=policy).guardrails["p99_ms"]
    assert (compared.state, compared.detail) == (INSUFFICIENT, "no request of stable in the last 60 s")


def test_histogram_without_an_infinite_bucket_is_telemetry_down() -> None:
    series = SeriesFixture()
    for at in (1.0, 9.0):
        series.scrape(names.ROUTER_JOB, at, requests(Arm.CANARY, ok=at, latency={"0.1": at, "0.25": at}))
    assert reading(series, "p99_ms").state is DOWN


@settings(deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=12), st.floats(0.01, 0.999))
def test_quantile_lies_in_its_bucket(counts: list[int], q: float) -> None:
    bounds = [*(0.001 * 2**i for i in range(len(counts) - 1)), math.inf]
    total = sum(counts)
    rises = {bound: float(sum(counts[: i + 1])) for i, bound in enumerate(bounds)}
    value = histogram_quantile(rises, q)
    if total == 0 or len(bounds) < 2:
        assert math.isnan(value)
        return
    at_most = next(b for b in bounds if rises[b] >= q * total)
    lower = max((b for b in bounds if b < at_most), default=0.0)
    assert value == lower if math.isinf(at_most) else lower <= value <= at_most + 1e-12


def test_quantile_is_linear_within_its_bucket() -> None:
    assert histogram_quantile({0.1: 50.0, 0.2: 100.0, math.inf: 100.0}, 0.75) == pytest.approx(0.15)
    assert histogram_quantile({0.1: 100.0, math.inf: 100.0}, 0.5) == pytest.approx(0.05)
    assert histogram_quantile({0.1: 1.0, 0.2: 1.0, math.inf: 100.0}, 0.99) == 0.2
    assert histogram_quantile({0.1: 51.0, 0.2: 50.0, math.inf: 100.0}, 0.5) <= 0.1  # a torn scrape, not monotone


# Mirrored requests


def mirrored(compared: float, failed: float, dropped: float) -> dict[SeriesKey, float]:
    counts = {"compared": compared, "failed": failed, "dropped": dropped}
    release = CANARY[: names.SHORT_RELEASE]
    return {SeriesKey.of(names.SHADOW_REQUESTS, {"release": release, "outcome": k}): v for k, v in counts.items()}


def test_mirrored_requests_count_since_the_shadow_phase_began() -> None:
    series = SeriesFixture()
    for at, n in ((-400.0, 90.0), (-300.0, 100.0), (-100.0, 300.0), (9.0, 500.0)):
        series.routers((at, [mirrored(n, n / 10, n)]))
    shadow = state_of(phase=Phase.SHADOW, changed_at=-310.0, shadow_bp=500)
    assert series.snapshot(10, state=shadow).shadow_requests == 400 + 40
    assert series.snapshot(10, state=shadow.model_copy(update={"changed_at": -110.0})).shadow_requests == 200 + 20
    assert series.snapshot(10).shadow_requests == 0
