"""RayJobs that ``reelway submit`` builds from the chart's templates and the user's options."""

from __future__ import annotations

import json
import shlex

import pytest
import yaml
from tests.support.charts.chart_tool import Document, named, rendered

from reelway.platform.cluster.ray_job_template import (
    JobKind,
    JobRequest,
    build_ray_job,
    find_template,
    parse_toleration,
)
from reelway.platform.errors import ConfigError


@pytest.fixture(params=["dev", "production-gpu"])
def config_map(request: pytest.FixtureRequest) -> Document:
    return named(rendered(request.param, "as-is"), "ConfigMap", "-jobs")


@pytest.fixture
def on_gpus() -> Document:
    """Training in the production environment: 4 workers with one GPU each, through Kueue."""
    return find_template([named(rendered("production-gpu", "as-is"), "ConfigMap", "-jobs")], JobKind.TRAIN, None)


@pytest.fixture
def small() -> Document:
    return find_template([named(rendered("dev", "as-is"), "ConfigMap", "-jobs")], JobKind.TRAIN, None)


def container(job: Document, group: str) -> Document:
    cluster = job["spec"]["rayClusterSpec"]
    group_spec = cluster["headGroupSpec"] if group == "head" else cluster["workerGroupSpecs"][0]
    return dict(group_spec["template"]["spec"]["containers"][0])


@pytest.mark.parametrize("kind", JobKind)
def test_job_without_options_equals_the_template(config_map: Document, kind: JobKind) -> None:
    template = find_template([config_map], kind, "rw")
    assert comparable(build_ray_job(template, JobRequest(kind))) == comparable(template)


def comparable(job: Document) -> Document:
    """Returns the job without differences that have no effect, such as the order of options."""
    copied: Document = json.loads(json.dumps(job))
    spec = copied["spec"]
    assert spec["submitterPodTemplate"]["spec"]["containers"][0].pop("args") == [spec["entrypoint"]]
    spec["entrypoint"] = sorted(shlex.split(spec["entrypoint"]))
    groups = [spec["rayClusterSpec"]["headGroupSpec"], *spec["rayClusterSpec"]["workerGroupSpecs"]]
    for pod in (spec["submitterPodTemplate"], *(group["template"] for group in groups)):
        pod["spec"].setdefault("tolerations", [])
        for part in pod["spec"]["containers"][0]["resources"].values():
            part.update({name: str(value) for name, value in part.items()})
    return copied


def test_run_option_sets_directory_and_label(small: Document) -> None:
    job = build_ray_job(small, JobRequest(JobKind.TRAIN, run="try-2"))
    assert "--run /var/lib/reelway/work/runs/try-2" in job["spec"]["entrypoint"]
    assert job["metadata"]["labels"]["reelway.dev/run"] == "try-2"


def test_kubernetes_does_not_expand_the_command_line(small: Document) -> None:
    job = build_ray_job(small, JobRequest(JobKind.TRAIN, run="try-2", arguments=("--note", "$(HOME)")))
    (command,) = job["spec"]["submitterPodTemplate"]["spec"]["containers"][0]["args"]
    assert command.replace("$$", "$") == job["spec"]["entrypoint"]
    assert "$$(HOME)" in command


@pytest.mark.parametrize("name", ["../production", "a/b", "-x", "", "x" * 64, "try "])
def test_invalid_run_name_is_rejected(small: Document, name: str) -> None:
    with pytest.raises(ConfigError, match="expected a name"):
        build_ray_job(small, JobRequest(JobKind.TRAIN, run=name))


def test_workers_have_the_gpus(small: Document) -> None:
    job = build_ray_job(small, JobRequest(JobKind.TRAIN, workers=4, gpus=2, cpus="8", memory="64Gi"))
    cluster = job["spec"]["rayClusterSpec"]
    assert [cluster["workerGroupSpecs"][0][key] for key in ("replicas", "minReplicas", "maxReplicas")] == [4, 4, 4]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert container(job, "workers")["resources"]["limits"] == {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "2"}
    assert container(job, "workers")["resources"]["requests"]["cpu"] == "8"
    assert "nvidia.com/gpu" not in container(job, "head")["resources"]["limits"]
    assert container(job, "head")["resources"]["limits"]["cpu"] != "8"
    assert job["spec"]["entrypoint"].endswith("--workers 4 --gpus 8")


def test_head_runs_everything_without_workers(on_gpus: Document) -> None:
    assert "--workers 4 --gpus 4" in on_gpus["spec"]["entrypoint"]
    job = build_ray_job(on_gpus, JobRequest(JobKind.TRAIN, workers=0, memory="70Gi"))
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["workerGroupSpecs"][0]["replicas"] == 0
    assert "num-cpus" not in cluster["headGroupSpec"]["rayStartParams"]
    assert container(job, "head")["resources"]["limits"] == {"cpu": "8", "memory": "70Gi", "nvidia.com/gpu": "1"}
    assert "nvidia.com/gpu" not in container(job, "workers")["resources"]["limits"]
    assert "--workers" not in job["spec"]["entrypoint"]
    assert "--gpus 1" in job["spec"]["entrypoint"]


def test_zero_gpus_removes_the_gpu_resource(on_gpus: Document) -> None:
    job = build_ray_job(on_gpus, JobRequest(JobKind.TRAIN, gpus=0))
    assert "nvidia.com/gpu" not in yaml.safe_dump([container(job, group) for group in ("head", "workers")])
    assert "--gpus" not in job["spec"]["entrypoint"]


def test_every_pod_has_the_image_with_the_tolerations(small: Document) -> None:
    job = build_ray_job(small, JobRequest(JobKind.TRAIN, image="r/t:2", tolerations=("gpu=yes:NoSchedule", "spot")))
    cluster = job["spec"]["rayClusterSpec"]
    groups = (cluster["headGroupSpec"], cluster["workerGroupSpecs"][0])
    pods = [job["spec"]["submitterPodTemplate"], *(group["template"] for group in groups)]
    for pod in pods:
        assert pod["spec"]["containers"][0]["image"] == "r/t:2"
        assert pod["spec"]["tolerations"] == [
            {"key": "gpu", "operator": "Equal", "value": "yes", "effect": "NoSchedule"},
            {"key": "spot", "operator": "Exists"},
        ]


@pytest.mark.parametrize("text", ["", "gpu:Sometimes", "a b", "=x"])
def test_invalid_toleration_is_rejected(text: str) -> None:
    with pytest.raises(ConfigError, match="KEY"):
        parse_toleration(text)


def test_options_set_queue_ttl_with_backoff_limit(small: Document) -> None:
    job = build_ray_job(small, JobRequest(JobKind.TRAIN, queue="night", ttl_s=60, backoff_limit=3))
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "night"
    assert (job["spec"]["ttlSecondsAfterFinished"], job["spec"]["backoffLimit"]) == (60, 3)


def test_arguments_reach_the_command_verbatim(small: Document) -> None:
    words = ("--set", "two_tower.dim=64", "--waive", "coverage=first week; it's $new")
    job = build_ray_job(small, JobRequest(JobKind.TRAIN, arguments=words))
    assert shlex.split(job["spec"]["entrypoint"])[-4:] == list(words)


def test_template_is_never_modified(small: Document) -> None:
    before = yaml.safe_dump(small)
    build_ray_job(small, JobRequest(JobKind.TRAIN, run="x", workers=2, gpus=1, image="x", tolerations=("a",)))
    assert yaml.safe_dump(small) == before


def test_ambiguous_installation_is_rejected(config_map: Document) -> None:
    other = yaml.safe_load(yaml.safe_dump(config_map))
    other["metadata"]["labels"]["app.kubernetes.io/instance"] = "second"
    with pytest.raises(ConfigError, match=r"\['rw', 'second'\].*--installation"):
        find_template([config_map, other], JobKind.TRAIN, None)
    assert find_template([config_map, other], JobKind.TRAIN, "second")["kind"] == "RayJob"
    with pytest.raises(ConfigError, match=r"found installations \[\].*jobs.runsClaim"):
        find_template([], JobKind.TRAIN, None)
