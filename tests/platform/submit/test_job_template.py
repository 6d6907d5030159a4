"""What a person's flags make of the chart's own RayJobs."""

from __future__ import annotations

import json
import shlex

import pytest
import yaml
from tests.charts.chart_tool import Document, named, rendered

from reelway.platform.cluster.ray_job_template import JobKind, JobRequest, job_document, template_of, toleration
from reelway.platform.errors import ConfigError


@pytest.fixture(params=["dev", "production-gpu"])
def config_map(request: pytest.FixtureRequest) -> Document:
    return named(rendered(request.param, "as-is"), "ConfigMap", "-jobs")


@pytest.fixture
def on_gpus() -> Document:
    """Production's training: 4 workers with a GPU each, through Kueue."""
    return template_of([named(rendered("production-gpu", "as-is"), "ConfigMap", "-jobs")], JobKind.TRAIN, None)


@pytest.fixture
def small() -> Document:
    return template_of([named(rendered("dev", "as-is"), "ConfigMap", "-jobs")], JobKind.TRAIN, None)


def container(job: Document, group: str) -> Document:
    cluster = job["spec"]["rayClusterSpec"]
    place = cluster["headGroupSpec"] if group == "head" else cluster["workerGroupSpecs"][0]
    return dict(place["template"]["spec"]["containers"][0])


@pytest.mark.parametrize("kind", JobKind)
def test_without_flags_a_job_is_what_the_installation_says(config_map: Document, kind: JobKind) -> None:
    template = template_of([config_map], kind, "rw")
    assert comparable(job_document(template, JobRequest(kind))) == comparable(template)


def comparable(job: Document) -> Document:
    """Without what means the same in another spelling."""
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


def test_a_run_lies_beside_the_installations_and_is_a_label(small: Document) -> None:
    job = job_document(small, JobRequest(JobKind.TRAIN, run="try-2"))
    assert "--run /var/lib/reelway/work/runs/try-2" in job["spec"]["entrypoint"]
    assert job["metadata"]["labels"]["reelway.dev/run"] == "try-2"


def test_what_is_submitted_is_the_command_line_even_where_kubernetes_would_read_it_otherwise(small: Document) -> None:
    job = job_document(small, JobRequest(JobKind.TRAIN, run="try-2", arguments=("--note", "$(HOME)")))
    (given,) = job["spec"]["submitterPodTemplate"]["spec"]["containers"][0]["args"]
    assert given.replace("$$", "$") == job["spec"]["entrypoint"]
    assert "$$(HOME)" in given


@pytest.mark.parametrize("name", ["../production", "a/b", "-x", "", "x" * 64, "try "])
def test_a_run_that_is_no_name_is_refused(small: Document, name: str) -> None:
    with pytest.raises(ConfigError, match="expected a name"):
        job_document(small, JobRequest(JobKind.TRAIN, run=name))


def test_workers_take_the_work_and_the_gpus_and_the_head_takes_none(small: Document) -> None:
    job = job_document(small, JobRequest(JobKind.TRAIN, workers=4, gpus=2, cpus="8", memory="64Gi"))
    cluster = job["spec"]["rayClusterSpec"]
    assert [cluster["workerGroupSpecs"][0][key] for key in ("replicas", "minReplicas", "maxReplicas")] == [4, 4, 4]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert container(job, "workers")["resources"]["limits"] == {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "2"}
    assert container(job, "workers")["resources"]["requests"]["cpu"] == "8"
    assert "nvidia.com/gpu" not in container(job, "head")["resources"]["limits"]
    assert container(job, "head")["resources"]["limits"]["cpu"] != "8"
    assert job["spec"]["entrypoint"].endswith("--workers 4 --gpus 8")


def test_without_workers_the_head_does_all_of_it(on_gpus: Document) -> None:
    assert "--workers 4 --gpus 4" in on_gpus["spec"]["entrypoint"]
    job = job_document(on_gpus, JobRequest(JobKind.TRAIN, workers=0, memory="70Gi"))
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["workerGroupSpecs"][0]["replicas"] == 0
    assert "num-cpus" not in cluster["headGroupSpec"]["rayStartParams"]
    assert container(job, "head")["resources"]["limits"] == {"cpu": "8", "memory": "70Gi", "nvidia.com/gpu": "1"}
    assert "nvidia.com/gpu" not in container(job, "workers")["resources"]["limits"]
    assert "--workers" not in job["spec"]["entrypoint"]
    assert "--gpus 1" in job["spec"]["entrypoint"]


def test_no_gpus_are_asked_for_where_none_are_wanted(on_gpus: Document) -> None:
    job = job_document(on_gpus, JobRequest(JobKind.TRAIN, gpus=0))
    assert "nvidia.com/gpu" not in yaml.safe_dump([container(job, group) for group in ("head", "workers")])
    assert "--gpus" not in job["spec"]["entrypoint"]


def test_every_pod_has_the_image_and_the_tolerations(small: Document) -> None:
    job = job_document(small, JobRequest(JobKind.TRAIN, image="r/t:2", tolerations=("gpu=yes:NoSchedule", "spot")))
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
def test_a_toleration_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="KEY"):
        toleration(text)


def test_the_queue_the_time_to_live_and_the_tries_are_those_asked_for(small: Document) -> None:
    job = job_document(small, JobRequest(JobKind.TRAIN, queue="night", ttl_s=60, backoff=3))
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "night"
    assert (job["spec"]["ttlSecondsAfterFinished"], job["spec"]["backoffLimit"]) == (60, 3)


def test_arguments_reach_the_command_as_they_were_typed(small: Document) -> None:
    words = ("--set", "two_tower.dim=64", "--waive", "coverage=first week; it's $new")
    job = job_document(small, JobRequest(JobKind.TRAIN, arguments=words))
    assert shlex.split(job["spec"]["entrypoint"])[-4:] == list(words)


def test_the_template_is_never_changed(small: Document) -> None:
    before = yaml.safe_dump(small)
    job_document(small, JobRequest(JobKind.TRAIN, run="x", workers=2, gpus=1, image="x", tolerations=("a",)))
    assert yaml.safe_dump(small) == before


def test_two_installations_want_one_to_be_named(config_map: Document) -> None:
    other = yaml.safe_load(yaml.safe_dump(config_map))
    other["metadata"]["labels"]["app.kubernetes.io/instance"] = "second"
    with pytest.raises(ConfigError, match=r"\['rw', 'second'\].*--installation"):
        template_of([config_map, other], JobKind.TRAIN, None)
    assert template_of([config_map, other], JobKind.TRAIN, "second")["kind"] == "RayJob"
    with pytest.raises(ConfigError, match=r"found installations \[\].*jobs.runsClaim"):
        template_of([], JobKind.TRAIN, None)
