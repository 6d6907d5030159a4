"""Submits, lists, follows and stops RayJobs with the rights of the chart's ``submitters`` Role.

Logs are read from the submitter's pod. This needs no connection to Ray and no Ray token, and the log outlives the Ray
cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final
from urllib.parse import urlencode

from reelway.platform.cluster.kube_api import KubeApi, NotFoundError
from reelway.platform.cluster.ray_job_status import (
    JobState,
    RayJobStatus,
    StartupProblem,
    find_startup_problems,
    parse_ray_job,
    release_id_in,
)
from reelway.platform.cluster.ray_job_template import JobKind, JobRequest, build_ray_job, find_template
from reelway.platform.errors import ConfigError, KubernetesError

Document = dict[str, Any]
PATH: Final = "ray.io/v1/rayjobs"
_JOB_SELECTOR: Final = "app.kubernetes.io/part-of=reelway,reelway.dev/component=jobs"
_KUBERAY_MISSING: Final = (
    "the cluster does not know the kind RayJob; install KubeRay's operator and its CRDs (v1.6 or newer)"
)


@dataclass(frozen=True)
class LogCursor:
    """How far a log was read: the pod and the timestamp of the last line."""

    pod: str = ""
    after: str = ""


class RayJobs:
    """Reelway's jobs in a namespace.

    Raises:
        KubernetesError: from every method, if the API server cannot be reached or rejects the request.
    """

    def __init__(self, api: KubeApi) -> None:
        self._api = api
        self.namespace = api.namespace

    def submit(self, request: JobRequest, installation: str | None = None) -> RayJobStatus:
        """Creates a job.

        Raises:
            ConfigError: if an option is invalid, Reelway or KubeRay is not installed in the namespace, or a job of the
                same kind and run has not ended.
        """
        templates = self._api.list(f"v1/configmaps?{urlencode({'labelSelector': _JOB_SELECTOR})}")
        document = build_ray_job(find_template(templates, request.kind, installation), request)
        submitted = parse_ray_job(
            {**document, "metadata": {**document["metadata"], "name": "", "creationTimestamp": _EPOCH}}
        )
        for other in self.all():
            if (other.kind, other.run) == (submitted.kind, submitted.run) and not other.state.ended:
                raise ConfigError(
                    f"cannot submit {submitted.kind} of run {submitted.run}: job {other.name} is {other.state} and "
                    f"writes the same files; wait for it with `reelway jobs follow {other.name}`, or stop it with "
                    f"`reelway jobs stop {other.name}`"
                )
        return parse_ray_job(self._api.create(PATH, document))

    def all(self) -> Sequence[RayJobStatus]:
        """Returns all jobs, newest first.

        Raises:
            ConfigError: if KubeRay is not installed.
        """
        try:
            found = self._api.list(f"{PATH}?{urlencode({'labelSelector': _JOB_SELECTOR})}")
        except NotFoundError as error:
            raise ConfigError(_KUBERAY_MISSING) from error
        return sorted((parse_ray_job(one) for one in found), key=lambda job: job.created_at, reverse=True)

    def get(self, name: str) -> RayJobStatus:
        """Returns one job. Raises ConfigError if it does not exist."""
        document = self._api.get(f"{PATH}/{name}")
        if document is None:
            raise ConfigError(
                f"job {name!r} does not exist in namespace {self.namespace}; `reelway jobs` lists all jobs"
            )
        return parse_ray_job(document)

    def stop(self, name: str) -> None:
        """Stops a job's pods and keeps the job. A job of a Kueue queue is deleted, because Kueue would restart it."""
        job = self.get(name)
        if job.queue:
            self.delete(name)
        elif not job.state.ended:
            self._api.patch(f"{PATH}/{name}", {"spec": {"suspend": True}})

    def delete(self, name: str) -> None:
        """Deletes a job with its pods and log. The files of its run stay."""
        self._api.delete(f"{PATH}/{name}")

    def startup_problems(self, job: RayJobStatus) -> Sequence[StartupProblem]:
        """Returns why a job does not start."""
        pods = self._pods(f"batch.kubernetes.io/job-name={job.name}")
        if job.cluster:
            pods += self._pods(f"ray.io/cluster={job.cluster}")
        events = [event for name in (job.name, job.cluster) if name and not pods for event in self._warnings(name)]
        return find_startup_problems(pods, events)

    def read_log_since(self, job: RayJobStatus, cursor: LogCursor) -> tuple[Sequence[str], LogCursor]:
        """Returns the log lines after the cursor, and the new cursor."""
        pods = sorted(self._pods(f"batch.kubernetes.io/job-name={job.name}"), key=_created)
        if not pods:
            return (), cursor
        newest = str(pods[-1]["metadata"]["name"])
        if newest != cursor.pod:
            cursor = LogCursor(newest)
        parameters = {"container": "submitter", "timestamps": "true"}
        if cursor.after:
            parameters["sinceTime"] = cursor.after
        lines = []
        for stamped in self._log(newest, parameters):
            at, _, line = stamped.partition(" ")
            if at > cursor.after:  # sinceTime has a resolution of one second
                lines.append(line)
        last = stamped.partition(" ")[0] if lines else cursor.after
        return lines, LogCursor(newest, last)

    def log_complete(self, job: RayJobStatus) -> bool:
        """Returns whether the log is complete."""
        pods = self._pods(f"batch.kubernetes.io/job-name={job.name}")
        return all(pod["status"].get("phase") in ("Succeeded", "Failed") for pod in pods)

    def with_release(self, job: RayJobStatus) -> RayJobStatus:
        """Returns the job with the id of the release that it built, which is the last line of its log."""
        if job.kind != JobKind.RELEASE or job.state is not JobState.SUCCEEDED:
            return job
        pods = sorted(self._pods(f"batch.kubernetes.io/job-name={job.name}"), key=_created)
        if not pods:
            return job
        lines = self._log(str(pods[-1]["metadata"]["name"]), {"container": "submitter", "tailLines": "50"})
        return replace(job, release=release_id_in(lines))

    def _log(self, pod: str, parameters: dict[str, str]) -> Sequence[str]:
        try:
            text = self._api.read_text(f"v1/pods/{pod}/log?{urlencode(parameters)}")
        except NotFoundError:
            return ()
        except KubernetesError as error:
            if "is waiting to start" in str(error) or "not found" in str(error):
                return ()
            raise
        return text.splitlines()

    def _pods(self, selector: str) -> list[Document]:
        return self._api.list(f"v1/pods?{urlencode({'labelSelector': selector})}")

    def _warnings(self, name: str) -> Sequence[Document]:
        selector = f"involvedObject.name={name},type=Warning"
        return self._api.list(f"v1/events?{urlencode({'fieldSelector': selector})}")


_EPOCH: Final = "1970-01-01T00:00:00Z"


def _created(pod: Document) -> str:
    return str(pod["metadata"]["creationTimestamp"])
