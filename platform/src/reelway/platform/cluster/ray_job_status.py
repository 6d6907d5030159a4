"""Translates the status of a RayJob and its pods into one state and a list of startup problems.

Reads API objects; no I/O.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

from reelway.platform.cluster.ray_job_template import KIND_LABEL, QUEUE_LABEL, RUN_LABEL

RELEASE_ID: Final = re.compile(r"[0-9a-f]{64}")
_EXIT_CODE: Final = re.compile(r"exit code (-?\d+)")
_NEVER_STARTED_REASONS: Final = frozenset({"PreRunningDeadlineExceeded", "ValidationFailed", "SubmissionFailed"})
_PERMANENT_REASONS: Final = frozenset({"ErrImageNeverPull", "InvalidImageName"})
_IMAGE_REASONS: Final = frozenset({"ErrImagePull", "ImagePullBackOff", "RegistryUnavailable"}) | _PERMANENT_REASONS
_CONTAINER_REASONS: Final = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError"})


class JobState(StrEnum):
    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    RETRYING = "retrying"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def ended(self) -> bool:
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.STOPPED)


@dataclass(frozen=True)
class RayJobStatus:
    """State of a RayJob for display."""

    name: str
    kind: str
    run: str
    state: JobState
    created_at: datetime
    command: str
    started_at: datetime | None = None
    ended_at: datetime | None = None
    retries: int = 0
    """Number of failed attempts."""
    cluster: str = ""
    """Name of the RayCluster of the current attempt; empty before it exists."""
    queue: str = ""
    reason: str = ""
    message: str = ""
    exit_code: int | None = None
    """Exit code of the command; None if the command did not end on its own."""
    release: str = ""
    """Id of the release that the job built, read from its log."""

    @property
    def never_started(self) -> bool:
        """Whether the job failed before its command ran."""
        return self.reason in _NEVER_STARTED_REASONS


def parse_ray_job(document: Mapping[str, Any]) -> RayJobStatus:
    """Parses a RayJob from the API server."""
    metadata, spec, status = document["metadata"], document["spec"], document.get("status") or {}
    labels, message = metadata.get("labels") or {}, str(status.get("message") or "")
    state = _state(spec, status, labels)
    code = _EXIT_CODE.search(message) if state is JobState.FAILED else None
    created_at = _parse_time(metadata["creationTimestamp"])
    assert created_at is not None
    return RayJobStatus(
        name=metadata["name"],
        kind=labels.get(KIND_LABEL, ""),
        run=labels.get(RUN_LABEL, ""),
        state=state,
        created_at=created_at,
        command=str(spec.get("entrypoint", "")),
        started_at=_parse_time(status.get("startTime")),
        ended_at=_parse_time(status.get("endTime")),
        retries=int(status.get("failed") or 0),
        cluster=str(status.get("rayClusterName") or ""),
        queue=labels.get(QUEUE_LABEL, ""),
        reason=str(status.get("reason") or ""),
        message=message,
        exit_code=0 if state is JobState.SUCCEEDED else _shell_exit_code(int(code[1])) if code else None,
    )


@dataclass(frozen=True)
class StartupProblem:
    """A reason why a job does not start."""

    message: str
    permanent: bool
    """Waiting does not help: the installation or the job has to be changed."""


def find_startup_problems(
    pods: Iterable[Mapping[str, Any]], events: Iterable[Mapping[str, Any]] = ()
) -> Sequence[StartupProblem]:
    """Returns why a job's pods do not start, without duplicates.

    Args:
        events: warnings about the RayJob and its RayCluster.
    """
    problems = [problem for pod in pods for problem in _pod_startup_problems(pod)]
    problems += [
        StartupProblem(f"{one.get('reason', '')}: {one.get('message', '')}", permanent=False) for one in events
    ]
    return tuple(dict.fromkeys(problems))


def release_id_in(lines: Iterable[str]) -> str:
    """Returns the last line that is a complete release id, or an empty string."""
    ids = [line.strip() for line in lines if RELEASE_ID.fullmatch(line.strip())]
    return ids[-1] if ids else ""


def _state(spec: Mapping[str, Any], status: Mapping[str, Any], labels: Mapping[str, str]) -> JobState:
    deployment, job = status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")
    if deployment in ("Suspended", "Suspending"):
        return JobState.QUEUED if QUEUE_LABEL in labels else JobState.STOPPED
    if deployment == "Complete":
        return {"SUCCEEDED": JobState.SUCCEEDED, "STOPPED": JobState.STOPPED}.get(job, JobState.FAILED)
    if deployment in ("Failed", "ValidationFailed"):
        return JobState.FAILED
    if deployment == "Retrying":
        return JobState.RETRYING
    if deployment == "Running" and job not in ("", "PENDING"):
        return JobState.RUNNING
    return JobState.QUEUED if spec.get("suspend") else JobState.STARTING


def _pod_startup_problems(pod: Mapping[str, Any]) -> Iterable[StartupProblem]:
    name, status = pod["metadata"]["name"], pod.get("status") or {}
    for condition in status.get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            yield StartupProblem(f"pod {name} cannot be scheduled: {condition.get('message', '')}", permanent=False)
    containers = [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]
    for container in containers:
        waiting = (container.get("state") or {}).get("waiting") or {}
        reason, detail = waiting.get("reason", ""), waiting.get("message", "")
        if reason in _IMAGE_REASONS:
            yield StartupProblem(
                f"pod {name}: cannot pull image {container['image']} ({reason}): {detail}", reason in _PERMANENT_REASONS
            )
        elif reason in _CONTAINER_REASONS:
            yield StartupProblem(f"pod {name}: cannot create its container ({reason}): {detail}", permanent=False)


def _shell_exit_code(code: int) -> int:
    """Returns the shell's exit code: 128 + the signal number for a command that a signal ended."""
    return code if code > 0 else 128 - code


def _parse_time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
