"""Why: the chart says once what a job's pods are; here a person's flags are laid over that, and nothing is made up.

A template is a RayJob in the ConfigMap of an installation, the same that its CronJobs create. No I/O. Refuses what
would only fail minutes later in a pod: a run's name that is no label, a toleration that is none.
"""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Any, Final

import yaml

from reelway.platform.errors import ConfigError

Document = dict[str, Any]
KIND_LABEL: Final = "reelway.dev/job"
RUN_LABEL: Final = "reelway.dev/run"
QUEUE_LABEL: Final = "kueue.x-k8s.io/queue-name"
INSTALLATION_LABEL: Final = "app.kubernetes.io/instance"
_LABEL_VALUE: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_TOLERATION: Final = re.compile(
    r"(?P<key>[A-Za-z0-9./_-]+)(=(?P<value>[A-Za-z0-9._-]*))?(:(?P<effect>NoSchedule|PreferNoSchedule|NoExecute))?"
)


class JobKind(StrEnum):
    """A kind of job: its name in `reelway submit`, among the chart's ``jobs`` and in labels."""

    DATASET = "dataset"
    FEATURES = "features"
    TRAIN = "train"
    EVALUATE = "evaluate"
    RELEASE = "release"


@dataclass(frozen=True)
class JobRequest:
    """What a person asks for. None is what the installation says."""

    kind: JobKind
    run: str | None = None
    """Name of a run beside the installation's."""
    workers: int | None = None
    """Pods beside the head; 0 does all on the head."""
    gpus: int | None = None
    """Of each worker, or of the head where there is none."""
    gpu_resource: str = "nvidia.com/gpu"
    cpus: str | None = None
    """Quantity, of each pod that computes; so is ``memory``."""
    memory: str | None = None
    queue: str | None = None
    tolerations: tuple[str, ...] = ()
    """``KEY[=VALUE][:EFFECT]``."""
    ttl_s: int | None = None
    backoff: int | None = None
    image: str | None = None
    arguments: tuple[str, ...] = ()
    """Appended to the command line."""


def template_of(config_maps: Iterable[Mapping[str, Any]], kind: JobKind, installation: str | None) -> Document:
    """The RayJob that the chart wrote for this kind.

    Args:
        config_maps: of the namespace, those of Reelway's jobs.
        installation: name of the Helm release; None where there is only one.

    Raises:
        ConfigError: there is none, or more than one.
    """
    found = {str(one["metadata"]["labels"].get(INSTALLATION_LABEL)): one for one in config_maps}
    if installation is not None:
        found = {name: one for name, one in found.items() if name == installation}
    if len(found) != 1:
        raise ConfigError(
            f"Reelway's job templates: found installations {sorted(found)}, expected one; "
            + ("name it with --installation" if found else _NOT_INSTALLED)
        )
    text = next(iter(found.values()))["data"].get(f"{kind}.yaml")
    if text is None:
        raise ConfigError(f"the installation has no template {kind}.yaml; upgrade its chart")
    loaded: Document = yaml.safe_load(text)
    return loaded


_NOT_INSTALLED: Final = (
    "is Reelway installed in this namespace (-n)? A store that is no volume needs jobs.runsClaim, "
    "where jobs keep their files"
)


def job_document(template: Mapping[str, Any], request: JobRequest) -> Document:
    """The RayJob to create.

    Raises:
        ConfigError: a flag is not what it should be.
    """
    job = copy.deepcopy(dict(template))
    spec, labels = job["spec"], job["metadata"]["labels"]
    if request.run is not None:
        labels[RUN_LABEL] = _checked_run(request.run)
    if request.queue is not None:
        labels[QUEUE_LABEL] = request.queue
    if request.ttl_s is not None:
        spec["ttlSecondsAfterFinished"] = request.ttl_s
    if request.backoff is not None:
        spec["backoffLimit"] = request.backoff
    workers, gpus = _arrange(spec["rayClusterSpec"], request)
    spec["entrypoint"] = _entrypoint(spec["entrypoint"], request, workers, gpus)
    submitter = spec["submitterPodTemplate"]["spec"]["containers"][0]
    if "args" in submitter:  # its own command, which takes the job's; Kubernetes reads $$ as $
        submitter["args"] = [spec["entrypoint"].replace("$", "$$")]
    for pod in _pods(spec):
        pod["spec"].setdefault("tolerations", []).extend(toleration(text) for text in request.tolerations)
        if request.image is not None:
            pod["spec"]["containers"][0]["image"] = request.image
    return job


def toleration(text: str) -> Document:
    """``KEY[=VALUE][:EFFECT]`` as Kubernetes takes it.

    Raises:
        ConfigError: it is not of that form.
    """
    match = _TOLERATION.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"--toleration {text!r}, expected KEY[=VALUE][:EFFECT], such as nvidia.com/gpu:NoSchedule; effects are "
            "NoSchedule, PreferNoSchedule, NoExecute"
        )
    made: Document = {"key": match["key"], "operator": "Exists" if match["value"] is None else "Equal"}
    if match["value"] is not None:
        made["value"] = match["value"]
    if match["effect"]:
        made["effect"] = match["effect"]
    return made


def _arrange(cluster: Document, request: JobRequest) -> tuple[int, int]:
    """Workers and GPUs where they belong; how many there are, the latter of each pod that computes."""
    group = cluster["workerGroupSpecs"][0]
    head, worker = (_resources(part) for part in (cluster["headGroupSpec"], group))
    resource = next((name for one in (head, worker) for name in one["limits"] if "/" in name), request.gpu_resource)
    there = max(int(one["limits"].pop(resource, 0)) for one in (head, worker))
    for one in (head, worker):
        one["requests"].pop(resource, None)
    workers = group["replicas"] if request.workers is None else request.workers
    gpus = there if request.gpus is None else request.gpus
    group["replicas"] = group["minReplicas"] = group["maxReplicas"] = workers
    computing = worker if workers else head
    wanted = {"cpu": request.cpus, "memory": request.memory, resource: str(gpus) if gpus else None}
    for part in ("requests", "limits"):
        computing[part] |= {name: value for name, value in wanted.items() if value is not None}
    parameters = cluster["headGroupSpec"]["rayStartParams"]
    parameters.pop("num-cpus", None)
    if workers:
        parameters["num-cpus"] = "0"  # what is to be computed is computed by the workers
    return workers, gpus


def _entrypoint(given: str, request: JobRequest, workers: int, gpus: int) -> str:
    words = shlex.split(given)
    if request.run is not None:
        before = PurePosixPath(words[words.index("--run") + 1])
        words = _with(words, "--run", str(before.with_name(request.run)))
    if request.kind is JobKind.TRAIN:
        words = _with(words, "--workers", str(workers) if workers else None)
        words = _with(words, "--gpus", str(gpus * max(1, workers)) if gpus else None)
    return shlex.join([*words, *request.arguments])


def _with(words: Sequence[str], name: str, value: str | None) -> list[str]:
    """The words with an option set, or taken out."""
    kept = list(words)
    if name in kept:
        at = kept.index(name)
        del kept[at : at + 2]
    return kept if value is None else [*kept, name, value]


def _pods(spec: Document) -> list[Document]:
    cluster = spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [spec["submitterPodTemplate"], *(group["template"] for group in groups)]


def _resources(group: Document) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = group["template"]["spec"]["containers"][0]["resources"]
    return found


def _checked_run(run: str) -> str:
    if _LABEL_VALUE.fullmatch(run) is None:
        raise ConfigError(
            f"--run {run!r}, expected a name of at most 63 letters, digits, '.', '_' and '-' that begins and ends with "
            "a letter or digit; on a cluster runs are named, and lie beside the installation's"
        )
    return run
