"""A wrong value is refused before anything is installed, by its path and with what is allowed."""

from __future__ import annotations

from typing import Any, Final

import pytest
from tests.charts.chart_tool import ENVIRONMENTS, NEEDED, Document, helm_template, merged

BIG: Final = {"requests": {"cpu": "4", "memory": "1Gi"}, "limits": {"cpu": "2", "memory": "1Gi"}}
HUNGRY: Final = {"requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"cpu": "1", "memory": "1500Mi"}}
MONITORS: Final = {"monitoring.monitors.enabled": True}

# value, what it is set to, a word of what is allowed, and what else must be so for it to be wrong
WRONG: Final[list[tuple[str, Any, str, dict[str, Any]]]] = [
    # What the schema states.
    ("image.pullPolicy", "Sometimes", "IfNotPresent", {}),
    ("image.serving.tag", "latest", "not", {}),
    ("image.serving.digest", "sha256:12", "sha256:[0-9a-f]{64}", {}),
    ("image.controler", {}, "additional properties", {}),
    ("image.controller.name", "x", "additional properties", {}),
    ("serving.workers.cpu.replica", 2, "additional properties", {}),
    ("releases.initial", "3f9c", "[0-9a-f]{64}", {}),
    ("releases.store.type", "ftp", "s3", {}),
    ("releases.store.pvc.size", "20", "[MGT]", {}),
    ("releases.store.pvc.accessMode", "ReadWrite", "ReadWriteMany", {}),
    ("releases.store.hostPath.path", "relative/path", "^(/.+)?$", {}),
    ("releases.store.s3.endpoint", "s3.example.com", "https?://", {}),
    ("ray.mode", "slurm", "static", {}),
    ("ray.version", "2.60", "[0-9]+", {}),
    ("ray.upgrade", "Recreate", "NewCluster", {}),
    ("ray.ports.gcs", 70000, "65,535", {}),
    ("ray.ports.dashboard", "8265", "want integer", {}),
    ("serving.port", 0, "minimum", {}),
    ("serving.deployments.router.replicas", 0, "minimum", {}),
    ("serving.deployments.scorer", {}, "additional properties", {}),
    ("serving.parity.ratio", 2, "maximum", {}),
    ("serving.budgetsMs.ranking", -5, "minimum", {}),
    ("serving.queue.atOnce", 0, "minimum", {}),
    ("serving.queue.standing", 65, "at most serving.queue.atOnce, which is 64", {}),
    ("serving.head.resources.limits", {"cpu": "1", "memory": None}, "missing property 'memory'", {}),
    ("serving.head.resources.requests.memory", "lots", "[kMGT]", {}),
    ("serving.env.BAD NAME", "x", "additional properties", {}),
    ("serving.workers.GPU", {}, "additional properties", {}),
    ("serving.salt", "", "minLength", {}),
    ("serving.terminationGracePeriodSeconds", 1, "minimum", {}),
    ("serving.head.tolerations", [{"key": "a", "effect": "Never"}], "NoSchedule", {}),
    ("controller.replicas", 0, "minimum", {}),
    ("controller.extraArgs", ["operator"], "^-", {}),
    ("controller.prometheusUrl", "prometheus:9090", "https?://", {}),
    ("features.type", "sqlite", "redis", {}),
    ("features.redis.maxMemory", "1Gi", "kb|mb|gb", {}),
    ("jobs.training.schedule", "nightly", "@(hourly|daily", {}),
    ("jobs.training.command", [], "minItems", {}),
    ("jobs.backoffLimit", -1, "minimum", {}),
    ("jobs.workPath", "runs/-production", "does not match pattern", {}),
    ("jobs.startWithinSeconds", 5, "minimum", {}),
    ("jobs.submitters", [{"kind": "Team", "name": "ml"}], "must be one of", {}),
    ("stream.events", "kafka:9092", "kafka://", {}),
    ("stream.latenessSeconds", -1, "minimum", {}),
    ("monitoring.monitors.interval", "5", "(ms|s|m|h)", {}),
    ("monitoring.rules.latencyMs", 300, "250", {}),
    ("monitoring.rules.availabilityPercent", 100, "maximum", {}),
    ("networkPolicies.clients", [{"ipBlock": {"cidr": "10.0.0.0"}}], "/[0-9]{1,3}", {}),
    ("tests.viewer", "first", "want integer", {}),
    # What the chart states.
    ("releases.initial", "", "64 hexadecimal digits", {}),
    ("secrets.name", "", "impression-tokens", {"secrets.generate": False}),
    ("releases.store.hostPath.path", "", "absolute path", {}),
    ("releases.store.s3.bucket", "", "a bucket", {"releases.store.type": "s3"}),
    ("releases.store.gs.bucket", "", "a bucket", {"releases.store.type": "gs"}),
    ("releases.store.pvc.existingClaim", "mine", "nothing", {}),
    ("releases.publicKeys.configMap", "", "*.public.pem", {}),
    ("releases.publicKeys.secret", "keys", "nothing", {}),
    ("ray.autoscaling.enabled", True, "horizontalPodAutoscaler", {"ray.mode": "static"}),
    ("ray.gcs.redisAddress", "redis:6379", "ray.mode is static", {"ray.mode": "static"}),
    ("ray.ports.workerMax", 10002, "more than ray.ports.workerMin", {}),
    ("ray.ports.ingressMax", 29000, "more than ray.ports.ingressMin", {}),
    ("ray.ports.metrics", 8265, "ray.ports.dashboard", {}),
    ("ray.ports.objectManager", 10500, "outside of ray.ports.workerMin", {}),
    ("serving.port", 30100, "outside of ray.ports.ingressMin", {}),
    ("serving.head.cpus", 0, "no worker", {}),
    ("serving.head.resources.limits.cpu", "2", "at least the request", {"serving.head.resources": BIG}),
    ("serving.head.resources.limits.memory", "1500Mi", "at least the request", {"serving.head.resources": HUNGRY}),
    ("serving.deployments.ranking.gpus", 1, "no group of serving.workers has GPUs", {}),
    ("serving.deployments.ranking.autoscaling.min", 9, "at most autoscaling.max", {}),
    ("serving.horizontalPodAutoscaler.enabled", True, "use ray.autoscaling", {}),
    ("serving.horizontalPodAutoscaler.group", "cpus", "one of serving.workers",
     {"ray.mode": "static", "serving.horizontalPodAutoscaler.enabled": True}),
    ("serving.ingress.host", "", "a host name", {"serving.ingress.enabled": True}),
    ("serving.httpRoute.parentRefs", [], "at least one Gateway", {"serving.httpRoute.enabled": True}),
    ("serving.env.RAY_AUTH_TOKEN", "hunter2", "read from a Secret", {}),
    ("controller.podDisruptionBudget.enabled", True, "controller.replicas is below 2", {}),
    ("features.type", "directory", "no volume",
     {"releases.store.type": "gs", "releases.store.gs.bucket": "releases"}),
    ("features.registry", "", "Feast's registry", {"features.type": "redis"}),
    ("features.redis.host", "", "external", {"features.type": "redis", "features.registry": "s3://a/b"}),
    ("features.redis.tls", True, "bundled",
     {"features.type": "redis", "features.registry": "s3://a/b", "features.redis.mode": "bundled"}),
    ("jobs.workClaim", "", "releases.store.type is no volume",
     {"releases.store.type": "gs", "releases.store.gs.bucket": "releases", "jobs.training.enabled": True}),
    ("releases.store.type", "gs", "served vectors are read from the volume",
     {"releases.store.gs.bucket": "releases", "jobs.workClaim": "work", "jobs.parity.enabled": True}),
    ("jobs.parity.command", ["sh"], "additional properties", {}),
    ("stream.events", "", "kafka://host:port/topic", {"stream.enabled": True}),
    ("stream.overlay", "", "a URL that serving pods reach",
     {"stream.enabled": True, "stream.events": "kafka://k:9092/t", "jobs.workClaim": "work",
      "releases.store.type": "gs", "releases.store.gs.bucket": "releases"}),
    ("controller.prometheusAccess.token", "x", "additional properties", {}),
    ("controller.prometheusAccess.labels", {"a-b": "x"}, "additional properties", {}),
    ("monitoring.rules.interval", "often", "(ms|s|m|h)$", {}),
    ("monitoring.monitors.enabled", False, "rules without their scrape jobs", {"monitoring.rules.enabled": True}),
    ("monitoring.rules.enabled", False, "no alert to route",
     {**MONITORS, "monitoring.alertmanagerConfig.enabled": True}),
]  # fmt: skip
GROUP: Final = {
    "minReplicas": 1, "replicas": 2, "maxReplicas": 3, "gpus": 0, "gpuResource": "nvidia.com/gpu",
    "resources": {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"cpu": "1", "memory": "1Gi"}},
}  # fmt: skip


def test_the_table_is_long_enough() -> None:
    assert len({(path, str(value)) for path, value, _, _ in WRONG}) >= 40


@pytest.mark.parametrize(
    ("path", "value", "allowed", "besides"), WRONG, ids=[f"{one[0]}={one[1]}"[:60] for one in WRONG]
)
def test_a_wrong_value_is_refused_by_its_path(path: str, value: Any, allowed: str, besides: dict[str, Any]) -> None:
    values = NEEDED
    for where, what in {**besides, path: value}.items():
        values = merged(values, at(where, what))
    done = helm_template(values, ENVIRONMENTS / "dev.yaml")
    assert done.returncode != 0, f"{path}={value} was taken"
    parent, _, last = path.rpartition(".")
    by_path = [path, "/" + path.replace(".", "/")]
    by_parent = "/" + parent.replace(".", "/")
    assert any(one in done.stderr for one in by_path) or (by_parent in done.stderr and last in done.stderr), done.stderr
    assert allowed in done.stderr, done.stderr
    assert "hunter2" not in done.stderr


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"minReplicas": 4}, "serving.workers.cpu.minReplicas"),
        ({"replicas": 4}, "serving.workers.cpu.replicas"),
        ({"replicas": 0}, "serving.workers.cpu.replicas"),
    ],
)
def test_a_worker_group_whose_numbers_disagree_is_refused(change: Document, path: str) -> None:
    values = merged(NEEDED, at("serving.workers.cpu", {**GROUP, **change}))
    done = helm_template(values, ENVIRONMENTS / "dev.yaml")
    assert done.returncode != 0
    assert f"{path}: saw" in done.stderr


def test_the_group_itself_is_taken() -> None:
    done = helm_template(merged(NEEDED, at("serving.workers.cpu", GROUP)), ENVIRONMENTS / "dev.yaml")
    assert done.returncode == 0, done.stderr


def at(path: str, value: Any) -> Document:
    """``value`` at a dotted path."""
    for part in reversed(path.split(".")):
        value = {part: value}
    made: Document = value
    return made
