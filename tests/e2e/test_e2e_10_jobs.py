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
from tests.support.e2e.jobs import Engineer, engineer_of, workshop
from tests.support.e2e.release_fixtures import made_releases
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
def shop(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobsInstallation]:
    with (
        made_releases(cluster, 1) as releases,
        cluster.namespace("reelway-e2e-jobs") as kubectl,
        workshop(cluster, kubectl, releases) as installation,
    ):
        yield JobsInstallation(installation, engineer_of(cluster, kubectl, tmp_path_factory.mktemp("engineer")))


def test_jobs_make_a_signed_release_from_events(shop: JobsInstallation) -> None:
    submit = shop.engineer.submit
    submit("dataset", "--run", RUN, "--", "--viewers", "300", "--videos", "800", "--impressions", "20000")
    began = time.monotonic()
    rows = []
    for kind, words in (("features", ()), ("train", ("--epochs", "1")), ("evaluate", ())):
        at = time.monotonic()
        submit(kind, "--run", RUN, "--", *words)
        rows.append(Row(f"job {kind}", time.monotonic() - at, "s"))
    shop.release = submit("release", "--run", RUN)
    taken_s = time.monotonic() - began
    assert re.fullmatch(r"[0-9a-f]{64}", shop.release)
    rows.append(Row("submit -> release", taken_s, "s", f"under {SUBMIT_TO_RELEASE_S:g}", taken_s < SUBMIT_TO_RELEASE_S))
    write_report("jobs", rows)


def test_job_list_shows_the_release_of_a_job(shop: JobsInstallation) -> None:
    listed = json.loads(shop.engineer.reelway("jobs", "-n", shop.engineer.namespace, "-o", "json").out)
    assert [job["kind"] for job in listed] == ["release", "evaluate", "train", "features", "dataset"]
    assert {job["state"] for job in listed} == {"succeeded"}
    assert listed[0]["release"] == shop.release
    assert listed[0]["run"] == RUN


def test_release_becomes_a_resource(shop: JobsInstallation) -> None:
    named = f"release.reelway.dev/{shop.release[:12]}"
    shop.installation.kubectl.run("wait", "--for=condition=InStore", named, "--timeout=60s")
    found = json.loads(shop.installation.kubectl.run("get", named, "-o", "json"))
    assert (found["spec"]["id"], found["status"]["name"]) == (shop.release, RUN)


def test_failed_job_returns_its_exit_code_with_its_log(shop: JobsInstallation) -> None:
    said = shop.engineer.reelway("submit", "train", "-n", shop.engineer.namespace, "--run", "never-made")
    assert said.code == 2, said.err
    assert "step 'features' has not finished in this run" in said.err


def test_missing_image_is_reported_immediately(shop: JobsInstallation) -> None:
    said = shop.engineer.reelway(
        "submit", "evaluate", "-n", shop.engineer.namespace, "--run", "other", "--image", "reelway.local/training:none"
    )
    assert said.code == 13, said.err
    assert "cannot pull image reelway.local/training:none (ErrImageNeverPull)" in said.err


def test_unschedulable_job_names_the_missing_resource(shop: JobsInstallation) -> None:
    engineer = shop.engineer
    here = ("-n", engineer.namespace)
    name = engineer.reelway("submit", "train", *here, "--run", "big", "--gpus", "8", "--detach").out.strip()
    said = engineer.interrupted_when("Insufficient nvidia.com/gpu", "jobs", "follow", name, *here)
    assert said.code == 130, said.err
    assert f"job {name} continues; follow it again with `reelway jobs follow {name}" in said.err
    assert engineer.reelway("jobs", "stop", name, *here).code == 0
    until("the job is stopped", lambda: engineer.job(name)["state"] == "stopped", 60)
    assert engineer.reelway("jobs", "delete", name, *here).code == 0
    until("the job is gone", lambda: not engineer.job(name), 60)
