"""Job states and startup problems read from the status of RayJobs and pods."""

from __future__ import annotations

from typing import Any

import pytest

from reelway.platform.cluster.ray_job_status import JobState, find_startup_problems, parse_ray_job, release_id_in
from reelway.platform.cluster.ray_job_template import QUEUE_LABEL


def ray_job(*, labels: dict[str, str] | None = None, suspend: bool = False, **status: Any) -> dict[str, Any]:
    known = {"reelway.dev/job": "train", "reelway.dev/run": "production", **(labels or {})}
    metadata = {"name": "rw-train-x", "labels": known, "creationTimestamp": "2026-03-01T10:00:00Z"}
    return {"metadata": metadata, "spec": {"entrypoint": "reelway train", "suspend": suspend}, "status": status}


@pytest.mark.parametrize(
    ("deployment", "job", "expected"),
    [
        ("", "", JobState.STARTING),
        ("Initializing", "", JobState.STARTING),
        ("Running", "", JobState.STARTING),
        ("Running", "PENDING", JobState.STARTING),
        ("Running", "RUNNING", JobState.RUNNING),
        ("Running", "SUCCEEDED", JobState.RUNNING),
        ("Retrying", "", JobState.RETRYING),
        ("Complete", "SUCCEEDED", JobState.SUCCEEDED),
        ("Complete", "STOPPED", JobState.STOPPED),
        ("Failed", "FAILED", JobState.FAILED),
        ("Failed", "", JobState.FAILED),
        ("ValidationFailed", "", JobState.FAILED),
        ("Suspending", "RUNNING", JobState.STOPPED),
        ("Suspended", "", JobState.STOPPED),
    ],
)
def test_kuberay_statuses_map_to_one_job_state(deployment: str, job: str, expected: JobState) -> None:
    read = parse_ray_job(ray_job(jobDeploymentStatus=deployment, jobStatus=job))
    assert read.state is expected
    assert (read.kind, read.run) == ("train", "production")


def test_job_suspended_by_kueue_is_queued() -> None:
    queued = ray_job(labels={QUEUE_LABEL: "night"}, suspend=True, jobDeploymentStatus="Suspended")
    assert parse_ray_job(queued).state is JobState.QUEUED
    assert parse_ray_job(ray_job(labels={QUEUE_LABEL: "night"}, suspend=True)).state is JobState.QUEUED


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("Job entrypoint command failed with exit code 6, last available logs:\nerror", 6),
        ("Job entrypoint command failed with exit code -9, last available logs:\n", 137),
        ("The RayJob has passed the activeDeadlineSeconds.", None),
    ],
)
def test_exit_code_of_the_command_is_read_from_the_message(message: str, code: int | None) -> None:
    failed = ray_job(jobDeploymentStatus="Failed", jobStatus="FAILED", reason="AppFailed", message=message)
    assert parse_ray_job(failed).exit_code == code


def test_job_that_never_started_differs_from_an_ended_one() -> None:
    assert parse_ray_job(ray_job(jobDeploymentStatus="Failed", reason="PreRunningDeadlineExceeded")).never_started
    assert not parse_ray_job(ray_job(jobDeploymentStatus="Failed", reason="DeadlineExceeded")).never_started


def test_unschedulable_pod_names_the_missing_resource() -> None:
    condition = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes: 3 Insufficient nvidia.com/gpu."}
    pod = {"metadata": {"name": "head"}, "status": {"conditions": [condition]}}
    (trouble,) = find_startup_problems([pod, pod])
    assert trouble.message == "pod head cannot be scheduled: 0/3 nodes: 3 Insufficient nvidia.com/gpu."
    assert not trouble.permanent


@pytest.mark.parametrize(("reason", "hopeless"), [("ErrImageNeverPull", True), ("ImagePullBackOff", False)])
def test_missing_image_is_named(reason: str, hopeless: bool) -> None:
    waiting = {"image": "reelway/training:9", "state": {"waiting": {"reason": reason, "message": "not present"}}}
    (trouble,) = find_startup_problems([{"metadata": {"name": "head"}, "status": {"containerStatuses": [waiting]}}])
    assert "cannot pull image reelway/training:9" in trouble.message
    assert trouble.permanent is hopeless


def test_starting_pod_is_no_startup_problem() -> None:
    starting = {"image": "x", "state": {"waiting": {"reason": "PodInitializing"}}}
    fine = {"type": "PodScheduled", "status": "True"}
    pod = {"metadata": {"name": "head"}, "status": {"containerStatuses": [starting], "conditions": [fine]}}
    assert find_startup_problems([pod]) == ()


def test_exceeded_quota_is_reported_verbatim() -> None:
    event = {"reason": "FailedToCreateHeadPod", "message": "exceeded quota: team"}
    assert find_startup_problems([], [event])[0].message == "FailedToCreateHeadPod: exceeded quota: team"


def test_release_is_the_last_complete_id_in_the_log() -> None:
    assert release_id_in(["a" * 64, "release bbbb is in store", "b" * 64, ""]) == "b" * 64
    assert release_id_in(["a" * 63, "id " + "b" * 64]) == ""
