"""Builds the RayJob of a submitted job: the chart's template with the user's options applied.

The template is a RayJob in a ConfigMap of the installation; the CronJobs create the same one. No I/O. Values that would
fail minutes later in a pod are rejected here: a run name that is not a label value, an invalid toleration.
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
    """Options of one job. None keeps the value of the installation."""

    kind: JobKind
    run: str | None = None
    """Name of the run; its directory is next to the installation's run."""
    workers: int | None = None
    """Worker pods; 0 runs everything on the head."""
    gpus: int | None = None
    """GPUs of each worker, or of the head without workers."""
    gpu_resource: str = "nvidia.com/gpu"
    cpus: str | None = None
    """CPU quantity of each pod that computes; ``memory`` likewise."""
    memory: str | None = None
    queue: str | None = None
    tolerations: tuple[str, ...] = ()
    """``KEY[=VALUE][:EFFECT]``."""
    ttl_s: int | None = None
    backoff_limit: int | None = None
    image: str | None = None
    arguments: tuple[str, ...] = ()
    """Arguments appended to the command line."""


def find_template(config_maps: Iterable[Mapping[str, Any]], kind: JobKind, installation: str | None) -> Document:
    """Returns the chart's RayJob for a kind of job.

    Args:
        config_maps: the ConfigMaps of Reelway's jobs in the namespace.
        installation: name of the Helm release; None if there is only one.

    Raises:
        ConfigError: if no installation or several installations match.
    """
    found = {str(one["metadata"]["labels"].get(INSTALLATION_LABEL)): one for one in config_maps}
    if installation is not None:
        found = {name: one for name, one in found.items() if name == installation}
    if len(found) != 1:
        raise ConfigError(
            f"Reelway's job templates: found installations {sorted(found)}, expected one; "
            + ("select it with --installation" if found else _NOT_INSTALLED)
        )
    text = next(iter(found.values()))["data"].get(f"{kind}.yaml")
    if text is None:
        raise ConfigError(f"the installation has no template {kind}.yaml; upgrade its chart")
    loaded: Document = yaml.safe_load(text)
    return loaded


_NOT_INSTALLED: Final = (
    "check that Reelway is installed in this namespace (-n). If the release store is not a volume, set jobs.runsClaim, "
    "the volume of the run directories"
)


def build_ray_job(template: Mapping[str, Any], request: JobRequest) -> Document:
    """Returns the RayJob to create.

    Raises:
        ConfigError: if an option is invalid.
    """
    job = copy.deepcopy(dict(template))
    spec, labels = job["spec"], job["metadata"]["labels"]
    if request.run is not None:
        labels[RUN_LABEL] = _checked_run(request.run)
    if request.queue is not None:
        labels[QUEUE_LABEL] = request.queue
    if request.ttl_s is not None:
        spec["ttlSecondsAfterFinished"] = request.ttl_s
    if request.backoff_limit is not None:
        spec["backoffLimit"] = request.backoff_limit
    workers, gpus = _set_workers_and_gpus(spec["rayClusterSpec"], request)
    spec["entrypoint"] = _entrypoint(spec["entrypoint"], request, workers, gpus)
    submitter = spec["submitterPodTemplate"]["spec"]["containers"][0]
    if "args" in submitter:  # the submitter takes the job's command; Kubernetes reads $$ as $
        submitter["args"] = [spec["entrypoint"].replace("$", "$$")]
    for pod in _pods(spec):
        pod["spec"].setdefault("tolerations", []).extend(parse_toleration(text) for text in request.tolerations)
        if request.image is not None:
            pod["spec"]["containers"][0]["image"] = request.image
    return job


def parse_toleration(text: str) -> Document:
    """Parses ``KEY[=VALUE][:EFFECT]`` into a Kubernetes toleration.

    Raises:
        ConfigError: if the text does not have that form.
    """
    match = _TOLERATION.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"--toleration: saw {text!r}, expected KEY[=VALUE][:EFFECT], such as nvidia.com/gpu:NoSchedule; the "
            "effects are NoSchedule, PreferNoSchedule and NoExecute"
        )
    toleration: Document = {"key": match["key"], "operator": "Exists" if match["value"] is None else "Equal"}
    if match["value"] is not None:
        toleration["value"] = match["value"]
    if match["effect"]:
        toleration["effect"] = match["effect"]
    return toleration


def _set_workers_and_gpus(cluster: Document, request: JobRequest) -> tuple[int, int]:
    """Sets workers and GPUs. Returns the number of workers and the GPUs of each pod that computes."""
    group = cluster["workerGroupSpecs"][0]
    head, worker = (_resources(part) for part in (cluster["headGroupSpec"], group))
    resource = next((name for one in (head, worker) for name in one["limits"] if "/" in name), request.gpu_resource)
    existing_gpus = max(int(one["limits"].pop(resource, 0)) for one in (head, worker))
    for one in (head, worker):
        one["requests"].pop(resource, None)
    workers = group["replicas"] if request.workers is None else request.workers
    gpus = existing_gpus if request.gpus is None else request.gpus
    group["replicas"] = group["minReplicas"] = group["maxReplicas"] = workers
    computing = worker if workers else head
    requested = {"cpu": request.cpus, "memory": request.memory, resource: str(gpus) if gpus else None}
    for part in ("requests", "limits"):
        computing[part] |= {name: value for name, value in requested.items() if value is not None}
    parameters = cluster["headGroupSpec"]["rayStartParams"]
    parameters.pop("num-cpus", None)
    if workers:
        parameters["num-cpus"] = "0"  # Ray schedules tasks on the workers only
    return workers, gpus


def _entrypoint(entrypoint: str, request: JobRequest, workers: int, gpus: int) -> str:
    args = shlex.split(entrypoint)
    if request.run is not None:
        run_path = PurePosixPath(args[args.index("--run") + 1])
        args = _with_option(args, "--run", str(run_path.with_name(request.run)))
    if request.kind is JobKind.TRAIN:
        args = _with_option(args, "--workers", str(workers) if workers else None)
        args = _with_option(args, "--gpus", str(gpus * max(1, workers)) if gpus else None)
    return shlex.join([*args, *request.arguments])


def _with_option(args: Sequence[str], name: str, value: str | None) -> list[str]:
    """Returns the command line with one option set, or removed if the value is None."""
    remaining = list(args)
    if name in remaining:
        index = remaining.index(name)
        del remaining[index : index + 2]
    return remaining if value is None else [*remaining, name, value]


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
            f"--run: saw {run!r}, expected a name of at most 63 letters, digits, '.', '_' and '-' that begins and ends "
            "with a letter or digit, not a path"
        )
    return run
