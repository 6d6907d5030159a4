"""KubeRay's words and the pods' conditions, in a person's."""

from __future__ import annotations

from typing import Any

import pytest

from reelway.platform.cluster.ray_job_status import JobState, find_troubles, read_job, release_id_in
from reelway.platform.cluster.ray_job_template import QUEUE_LABEL


def ray_job(*, labels: dict[str, str] | None = None, suspend: bool = False, **status: Any) -> dict[str, Any]:
    known = {"reelway.dev/job": "train", "reelway.dev/run": "production", **(labels or {})}
    metadata = {"name": "rw-training-x", "labels": known, "creationTimestamp": "2026-03-01T10:00:00Z"}
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
def test_each_pair_of_kuberays_words_is_one_of_ours(deployment: str, job: str, expected: JobState) -> None:
    read = read_job(ray_job(jobDeploymentStatus=deployment, jobStatus=job))
    assert read.state is expected
    assert (read.kind, read.run) == ("train", "production")


def test_what_kueue_holds_back_is_queued_and_not_stopped() -> None:
    queued = ray_job(labels={QUEUE_LABEL: "night"}, suspend=True, jobDeploymentStatus="Suspended")
    assert read_job(queued).state is JobState.QUEUED
    assert read_job(ray_job(labels={QUEUE_LABEL: "night"}, suspend=True)).state is JobState.QUEUED


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("Job entrypoint command failed with exit code 6, last available logs:\nerror", 6),
        ("Job entrypoint command failed with exit code -9, last available logs:\n", 137),
        ("The RayJob has passed the activeDeadlineSeconds.", None),
    ],
)
def test_the_commands_own_exit_code_is_found(message: str, code: int | None) -> None:
    failed = ray_job(jobDeploymentStatus="Failed", jobStatus="FAILED", reason="AppFailed", message=message)
    assert read_job(failed).exit_code == code


def test_a_job_that_never_began_is_told_from_one_that_was_ended() -> None:
    assert read_job(ray_job(jobDeploymentStatus="Failed", reason="PreRunningDeadlineExceeded")).never_began
    assert not read_job(ray_job(jobDeploymentStatus="Failed", reason="DeadlineExceeded")).never_began


def test_a_pod_without_a_node_says_which_resource_is_missing() -> None:
    condition = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes: 3 Insufficient nvidia.com/gpu."}
    pod = {"metadata": {"name": "head"}, "status": {"conditions": [condition]}}
    (trouble,) = find_troubles([pod, pod])
    assert trouble.what == "pod head finds no node: 0/3 nodes: 3 Insufficient nvidia.com/gpu."
    assert not trouble.hopeless


@pytest.mark.parametrize(("reason", "hopeless"), [("ErrImageNeverPull", True), ("ImagePullBackOff", False)])
def test_an_image_that_is_not_there_is_named(reason: str, hopeless: bool) -> None:
    waiting = {"image": "reelway/training:9", "state": {"waiting": {"reason": reason, "message": "not present"}}}
    (trouble,) = find_troubles([{"metadata": {"name": "head"}, "status": {"containerStatuses": [waiting]}}])
    assert "image reelway/training:9 is not there" in trouble.what
    assert trouble.hopeless is hopeless


def test_a_pod_that_only_starts_is_no_trouble() -> None:
    starting = {"image": "x", "state": {"waiting": {"reason": "PodInitializing"}}}
    fine = {"type": "PodScheduled", "status": "True"}
    pod = {"metadata": {"name": "head"}, "status": {"containerStatuses": [starting], "conditions": [fine]}}
    assert find_troubles([pod]) == ()


def test_a_quota_that_forbids_pods_is_said_in_the_clusters_words() -> None:
    event = {"reason": "FailedToCreateHeadPod", "message": "exceeded quota: team"}
    assert find_troubles([], [event])[0].what == "FailedToCreateHeadPod: exceeded quota: team"


def test_the_release_is_the_last_whole_id_in_the_log() -> None:
    assert release_id_in(["a" * 64, "release bbbb is in store", "b" * 64, ""]) == "b" * 64
    assert release_id_in(["a" * 63, "id " + "b" * 64]) == ""
