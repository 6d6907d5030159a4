"""Why: KubeRay has a dozen words for how a job stands, and pods say why it does not start; people want one word.

Reads documents; no I/O.
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
_NEVER_BEGAN: Final = frozenset({"PreRunningDeadlineExceeded", "ValidationFailed", "SubmissionFailed"})
_HOPELESS: Final = frozenset({"ErrImageNeverPull", "InvalidImageName"})
_IMAGE_TROUBLES: Final = frozenset({"ErrImagePull", "ImagePullBackOff", "RegistryUnavailable"}) | _HOPELESS
_CONTAINER_TROUBLES: Final = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError"})


class JobState(StrEnum):
    """How a job stands."""

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
class Job:
    """A RayJob, as people see it."""

    name: str
    kind: str
    run: str
    state: JobState
    created_at: datetime
    command: str
    started_at: datetime | None = None
    ended_at: datetime | None = None
    tries: int = 0
    """That have failed."""
    cluster: str = ""
    """Name of the RayCluster of this try; empty before there is one."""
    queue: str = ""
    reason: str = ""
    message: str = ""
    exit_code: int | None = None
    """Of the command; None where it did not end by itself."""
    release: str = ""
    """That it built: read from the log by who has it."""

    @property
    def never_began(self) -> bool:
        """Whether it failed before its command ran."""
        return self.reason in _NEVER_BEGAN


def read_job(document: Mapping[str, Any]) -> Job:
    """A RayJob as the API server gave it."""
    metadata, spec, status = document["metadata"], document["spec"], document.get("status") or {}
    labels, message = metadata.get("labels") or {}, str(status.get("message") or "")
    state = _state(spec, status, labels)
    code = _EXIT_CODE.search(message) if state is JobState.FAILED else None
    created_at = _moment(metadata["creationTimestamp"])
    assert created_at is not None
    return Job(
        name=metadata["name"],
        kind=labels.get(KIND_LABEL, ""),
        run=labels.get(RUN_LABEL, ""),
        state=state,
        created_at=created_at,
        command=str(spec.get("entrypoint", "")),
        started_at=_moment(status.get("startTime")),
        ended_at=_moment(status.get("endTime")),
        tries=int(status.get("failed") or 0),
        cluster=str(status.get("rayClusterName") or ""),
        queue=labels.get(QUEUE_LABEL, ""),
        reason=str(status.get("reason") or ""),
        message=message,
        exit_code=0 if state is JobState.SUCCEEDED else _as_shells_do(int(code[1])) if code else None,
    )


@dataclass(frozen=True)
class Trouble:
    """Why a job does not start."""

    what: str
    hopeless: bool
    """Waiting will not help: somebody has to change something."""


def find_troubles(pods: Iterable[Mapping[str, Any]], events: Iterable[Mapping[str, Any]] = ()) -> Sequence[Trouble]:
    """What keeps a job's pods from starting, each once; ``events`` are warnings about its RayJob and RayCluster."""
    found = [trouble for pod in pods for trouble in _pod_troubles(pod)]
    found += [Trouble(f"{one.get('reason', '')}: {one.get('message', '')}", hopeless=False) for one in events]
    return tuple(dict.fromkeys(found))


def release_id_in(lines: Iterable[str]) -> str:
    """The last line that is a release's whole id; empty when there is none."""
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


def _pod_troubles(pod: Mapping[str, Any]) -> Iterable[Trouble]:
    name, status = pod["metadata"]["name"], pod.get("status") or {}
    for condition in status.get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            yield Trouble(f"pod {name} finds no node: {condition.get('message', '')}", hopeless=False)
    containers = [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]
    for container in containers:
        waiting = (container.get("state") or {}).get("waiting") or {}
        reason, said = waiting.get("reason", ""), waiting.get("message", "")
        if reason in _IMAGE_TROUBLES:
            yield Trouble(
                f"pod {name}: image {container['image']} is not there ({reason}): {said}", reason in _HOPELESS
            )
        elif reason in _CONTAINER_TROUBLES:
            yield Trouble(f"pod {name} cannot be made ({reason}): {said}", hopeless=False)


def _as_shells_do(code: int) -> int:
    """128 + the signal for a command that a signal ended."""
    return code if code > 0 else 128 - code


def _moment(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
