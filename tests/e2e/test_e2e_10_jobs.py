"""Jobs build the first release from events, with the rights of an ML engineer only."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from tests.support.bench_results import Row, write_report
from tests.support.e2e.clusters import Cluster
from tests.support.e2e.installation import Installation
from tests.support.e2e.jobs import Engineer, create_engineer, install_jobs
from tests.support.e2e.release_fixtures import build_release_fixtures
from tests.support.e2e.wait_until import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
RUN = "first"
SUBMIT_TO_RELEASE_S = 180.0


@dataclass
class JobsInstallation:
    """An installation without a service, and its ML engineer."""

    installation: Installation
    engineer: Engineer
    release: str = ""


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobsInstallation]:
    with (
        build_release_fixtures(cluster, 1) as releases,
        cluster.namespace("reelway-e2e-jobs") as kubectl,
        install_jobs(cluster, kubectl, releases) as installation,
    ):
        yield JobsInstallation(installation, create_engineer(cluster, kubectl, tmp_path_factory.mktemp("engineer")))


def test_jobs_build_a_signed_release_from_events(jobs: JobsInstallation) -> None:
    submit = jobs.engineer.submit
    submit("dataset", "--run", RUN, "--", "--viewers", "300", "--videos", "800", "--impressions", "20000")
    began = time.monotonic()
    rows = []
    for kind, options in (("features", ()), ("train", ("--epochs", "1")), ("evaluate", ())):
        started = time.monotonic()
        submit(kind, "--run", RUN, "--", *options)
        rows.append(Row(f"job {kind}", time.monotonic() - started, "s"))
    jobs.release = submit("release", "--run", RUN)
    taken_s = time.monotonic() - began
    assert re.fullmatch(r"[0-9a-f]{64}", jobs.release)
    rows.append(Row("submit -> release", taken_s, "s", f"under {SUBMIT_TO_RELEASE_S:g}", taken_s < SUBMIT_TO_RELEASE_S))
    write_report("jobs", rows)


def test_job_list_shows_the_release_of_a_job(jobs: JobsInstallation) -> None:
    listed = json.loads(jobs.engineer.reelway("jobs", "-n", jobs.engineer.namespace, "-o", "json").out)
    assert [job["kind"] for job in listed] == ["release", "evaluate", "train", "features", "dataset"]
    assert {job["state"] for job in listed} == {"succeeded"}
    assert listed[0]["release"] == jobs.release
    assert listed[0]["run"] == RUN


def test_release_becomes_a_resource(jobs: JobsInstallation) -> None:
    resource = f"release.reelway.dev/{jobs.release[:12]}"
    jobs.installation.kubectl.run("wait", "--for=condition=InStore", resource, "--timeout=60s")
    release = json.loads(jobs.installation.kubectl.run("get", resource, "-o", "json"))
    assert (release["spec"]["id"], release["status"]["name"]) == (jobs.release, RUN)


def test_failed_job_returns_its_exit_code_with_its_log(jobs: JobsInstallation) -> None:
    result = jobs.engineer.reelway("submit", "train", "-n", jobs.engineer.namespace, "--run", "never-made")
    assert result.code == 2, result.err
    assert "step 'features' has not finished in this run" in result.err


def test_missing_image_is_reported_immediately(jobs: JobsInstallation) -> None:
    result = jobs.engineer.reelway(
        "submit", "evaluate", "-n", jobs.engineer.namespace, "--run", "other", "--image", "reelway.local/training:none"
    )
    assert result.code == 13, result.err
    assert "cannot pull image reelway.local/training:none (ErrImageNeverPull)" in result.err


def test_unschedulable_job_names_the_missing_resource(jobs: JobsInstallation) -> None:
    engineer = jobs.engineer
    namespace = ("-n", engineer.namespace)
    name = engineer.reelway("submit", "train", *namespace, "--run", "big", "--gpus", "8", "--detach").out.strip()
    result = engineer.interrupt_when("Insufficient nvidia.com/gpu", "jobs", "follow", name, *namespace)
    assert result.code == 130, result.err
    assert f"job {name} continues; follow it again with `reelway jobs follow {name}" in result.err
    assert engineer.reelway("jobs", "stop", name, *namespace).code == 0
    until("the job is stopped", lambda: engineer.job(name)["state"] == "stopped", 60)
    assert engineer.reelway("jobs", "delete", name, *namespace).code == 0
    until("the job is deleted", lambda: not engineer.job(name), 60)
