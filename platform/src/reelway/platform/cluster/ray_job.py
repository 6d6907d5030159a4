"""Why: what `reelway submit` and `reelway jobs` ask of a cluster, under the rights of the chart's `submitters` Role.

The log is that of the submitter's pod: it takes no way to Ray, no token of Ray's, and outlives the Ray cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final
from urllib.parse import urlencode

from reelway.platform.cluster.kube_api import AbsentError, KubeApi
from reelway.platform.cluster.ray_job_status import Job, JobState, Trouble, find_troubles, read_job, release_id_in
from reelway.platform.cluster.ray_job_template import JobKind, JobRequest, job_document, template_of
from reelway.platform.errors import ConfigError, KubernetesError

Document = dict[str, Any]
PATH: Final = "ray.io/v1/rayjobs"
_OURS: Final = "app.kubernetes.io/part-of=reelway,reelway.dev/component=jobs"
_NO_KUBERAY: Final = "the cluster knows no RayJob; install KubeRay's operator and its CRDs (v1.6 or newer)"


@dataclass(frozen=True)
class LogPlace:
    """How far a log was read: a pod and the time of its last line."""

    pod: str = ""
    after: str = ""


class RayJobs:
    """Reelway's jobs in a namespace.

    Raises:
        KubernetesError: of every method: the server cannot be reached, or refuses.
    """

    def __init__(self, api: KubeApi) -> None:
        self._api = api
        self.namespace = api.namespace

    def submit(self, request: JobRequest, installation: str | None = None) -> Job:
        """Create a job.

        Raises:
            ConfigError: a flag is wrong, Reelway or KubeRay is not installed here, or the same job is under way.
        """
        templates = self._api.list(f"v1/configmaps?{urlencode({'labelSelector': _OURS})}")
        document = job_document(template_of(templates, request.kind, installation), request)
        asked = read_job({**document, "metadata": {**document["metadata"], "name": "", "creationTimestamp": _NOW}})
        for other in self.all():
            if (other.kind, other.run) == (asked.kind, asked.run) and not other.state.ended:
                raise ConfigError(
                    f"job {other.name} is {other.state}: {asked.kind} of run {asked.run}, whose files a second one "
                    f"would write too; `reelway jobs follow {other.name}`, or stop it first"
                )
        return read_job(self._api.create(PATH, document))

    def all(self) -> Sequence[Job]:
        """All, the newest first.

        Raises:
            ConfigError: KubeRay is not installed.
        """
        try:
            found = self._api.list(f"{PATH}?{urlencode({'labelSelector': _OURS})}")
        except AbsentError as error:
            raise ConfigError(_NO_KUBERAY) from error
        return sorted((read_job(one) for one in found), key=lambda job: job.created_at, reverse=True)

    def get(self, name: str) -> Job:
        """One job. Raises ConfigError: there is none of that name."""
        document = self._api.get(f"{PATH}/{name}")
        if document is None:
            raise ConfigError(f"namespace {self.namespace} has no job {name!r}; `reelway jobs` lists those it has")
        return read_job(document)

    def stop(self, name: str) -> None:
        """End its pods. It stays, and says that it was stopped; one of Kueue's goes, for Kueue would start it again."""
        job = self.get(name)
        if job.queue:
            self.delete(name)
        elif not job.state.ended:
            self._api.patch(f"{PATH}/{name}", {"spec": {"suspend": True}})

    def delete(self, name: str) -> None:
        """Remove it with its pods and its log. What it wrote to its run stays."""
        self._api.delete(f"{PATH}/{name}")

    def troubles(self, job: Job) -> Sequence[Trouble]:
        """What keeps it from starting."""
        pods = self._pods(f"batch.kubernetes.io/job-name={job.name}")
        if job.cluster:
            pods += self._pods(f"ray.io/cluster={job.cluster}")
        events = [event for name in (job.name, job.cluster) if name and not pods for event in self._warnings(name)]
        return find_troubles(pods, events)

    def new_lines(self, job: Job, place: LogPlace) -> tuple[Sequence[str], LogPlace]:
        """What the log has beyond ``place``, and where it ends now."""
        pods = sorted(self._pods(f"batch.kubernetes.io/job-name={job.name}"), key=_created)
        if not pods:
            return (), place
        newest = str(pods[-1]["metadata"]["name"])
        if newest != place.pod:
            place = LogPlace(newest)
        question = {"container": "submitter", "timestamps": "true"}
        if place.after:
            question["sinceTime"] = place.after
        lines = []
        for stamped in self._log(newest, question):
            at, _, line = stamped.partition(" ")
            if at > place.after:  # sinceTime counts whole seconds
                lines.append(line)
        last = stamped.partition(" ")[0] if lines else place.after
        return lines, LogPlace(newest, last)

    def log_is_whole(self, job: Job) -> bool:
        """Whether nothing more will be written to the log."""
        pods = self._pods(f"batch.kubernetes.io/job-name={job.name}")
        return all(pod["status"].get("phase") in ("Succeeded", "Failed") for pod in pods)

    def with_release(self, job: Job) -> Job:
        """The job with the release that it built, which its log ends with."""
        if job.kind != JobKind.RELEASE or job.state is not JobState.SUCCEEDED:
            return job
        pods = sorted(self._pods(f"batch.kubernetes.io/job-name={job.name}"), key=_created)
        if not pods:
            return job
        lines = self._log(str(pods[-1]["metadata"]["name"]), {"container": "submitter", "tailLines": "50"})
        return replace(job, release=release_id_in(lines))

    def _log(self, pod: str, question: dict[str, str]) -> Sequence[str]:
        try:
            text = self._api.read_text(f"v1/pods/{pod}/log?{urlencode(question)}")
        except AbsentError:
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


_NOW: Final = "1970-01-01T00:00:00Z"


def _created(pod: Document) -> str:
    return str(pod["metadata"]["creationTimestamp"])
