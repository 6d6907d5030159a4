"""Exporters that Prometheus has twice are noticed; exporters that follow each other are not."""

from __future__ import annotations

import math

import pytest
from tests.support.rollout.series_fixtures import CANARY

from reelway.platform.contracts.events import Arm
from reelway.platform.rollout import metric_names as names
from reelway.platform.rollout.counters import Sample
from reelway.platform.rollout.sources.series_reader import (
    UP,
    SeriesKey,
    SeriesReadResult,
    duplicate_series,
    samples_since,
    scrape_job,
)

ROUTER = {"job": names.ROUTER_JOB, "instance": "10.0.0.1:8000"}


def problem(*series: tuple[str, dict[str, str], range], since: float = 0.0) -> str:
    rows = {SeriesKey.of(name, labels): [Sample(at, 1.0) for at in times] for name, labels, times in series}
    assert len(rows) == len(series)
    return duplicate_series(names.ROUTER_JOB, SeriesReadResult(rows), since=since)


@pytest.mark.parametrize("label", ["replica", "prometheus_replica", "prometheus", "cluster", "endpoint", "container"])
@pytest.mark.parametrize("name", [UP, names.REQUESTS])
def test_series_that_differ_in_another_label_are_duplicates(name: str, label: str) -> None:
    own = {} if name == UP else {"release": CANARY[:12], "arm": "canary", "outcome": "ok"}
    both = [(name, {**ROUTER, **own, label: value}, range(5, 60, 5)) for value in ("a", "b")]
    assert f"reelway-router at 10.0.0.1:8000 is in Prometheus twice ({label} 'a' and 'b')" in problem(*both)


def test_series_of_other_outcomes_instances_and_jobs_are_no_duplicates() -> None:
    own = {"release": CANARY[:12], "arm": "canary"}
    assert (
        problem(
            (UP, ROUTER, range(60)),
            (UP, {**ROUTER, "instance": "10.0.0.2:8000"}, range(60)),
            (UP, {**ROUTER, "job": names.OUTCOMES_JOB}, range(60)),
            *((names.REQUESTS, {**ROUTER, **own, "outcome": outcome}, range(60)) for outcome in names.REQUEST_OUTCOMES),
        )
        == ""
    )


def test_exporter_whose_labels_changed_is_no_duplicate() -> None:
    one, other = {**ROUTER, "pod": "a"}, {**ROUTER, "pod": "b"}
    assert problem((UP, one, range(30)), (UP, other, range(30, 60))) == ""
    assert problem((UP, one, range(31)), (UP, other, range(30, 60)))
    assert problem((UP, one, range(31)), (UP, other, range(25, 60)), since=30) == ""


def test_pod_with_two_addresses_is_a_duplicate() -> None:
    pod = {"namespace": "prod", "pod": "ray-head"}
    by_ip, by_name = {**ROUTER, **pod}, {**ROUTER, **pod, "instance": "head:8000"}
    assert "(instance '10.0.0.1:8000' and 'head:8000')" in problem((UP, by_ip, range(60)), (UP, by_name, range(60)))
    elsewhere = {**by_name, "namespace": "staging"}
    assert problem((UP, by_ip, range(60)), (UP, elsewhere, range(60))) == ""


def test_requests_of_another_job_are_not_added() -> None:
    """The same page scraped by the collector's job as well."""
    own = {"release": CANARY[:12], "arm": Arm.CANARY.value, "outcome": "ok"}
    rows = {
        SeriesKey.of(name, {**ROUTER, "job": job, **labels}): [Sample(at, 1.0) for at in range(10)]
        for job in (names.ROUTER_JOB, names.OUTCOMES_JOB)
        for name, labels in ((UP, {}), (names.REQUESTS, own))
    }
    read_result = SeriesReadResult(rows)
    routers = scrape_job(names.ROUTER_JOB, read_result, now=10, max_age_s=5)
    assert routers.problem == ""
    found = [key.get("job") for key, _, _ in samples_since(read_result, routers, names.REQUESTS, since=0)]
    assert found == [names.ROUTER_JOB]


def test_replaced_exporter_at_the_same_address_is_one_target() -> None:
    rows = {
        SeriesKey.of(UP, {**ROUTER, "pod": "old"}): [Sample(1, 1.0), Sample(5, math.nan)],
        SeriesKey.of(UP, {**ROUTER, "pod": "new"}): [Sample(6, 1.0), Sample(9, 1.0)],
    }
    for order in (list(rows), list(rows)[::-1]):
        job = scrape_job(names.ROUTER_JOB, SeriesReadResult({key: rows[key] for key in order}), now=10, max_age_s=5)
        [target] = job.instances.values()
        assert (job.problem, target.first_sample_at, target.last_sample_at, target.removed) == ("", 1, 9, False)
