"""A wrong value fails the rendering with its path and the values allowed."""

from __future__ import annotations

from typing import Any, Final

import pytest
from tests.support.charts.chart_tool import ENVIRONMENTS, NEEDED, Document, helm_template, merged

BIG: Final = {"requests": {"cpu": "4", "memory": "1Gi"}, "limits": {"cpu": "2", "memory": "1Gi"}}
HUNGRY: Final = {"requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"cpu": "1", "memory": "1500Mi"}}
MONITORS: Final = {"monitoring.monitors.enabled": True}
LIVE: Final = {"eventLog.address": "kafka://k:9092"}

# Path, value, part of the message, and other values that are needed for the error.
WRONG: Final[list[tuple[str, Any, str, dict[str, Any]]]] = [
    # Errors of the schema.
    ("image.pullPolicy", "Sometimes", "IfNotPresent", {}),
    ("image.serving.tag", "latest", "not", {}),
    ("image.serving.digest", "sha256:12", "sha256:[0-9a-f]{64}", {}),
    ("image.controler", {}, "additional properties", {}),
    ("image.operator.name", "x", "additional properties", {}),
    ("serving.workers.cpu.replica", 2, "additional properties", {}),
    ("releases.initial", "3f9c", "[0-9a-f]{64}", {}),
    ("releases.store.type", "ftp", "s3", {}),
    ("releases.store.pvc.size", "20", "[MGT]", {}),
    ("releases.store.pvc.accessMode", "ReadWrite", "ReadWriteMany", {}),
    ("releases.store.hostPath.path", "relative/path", "^(/.+)?$", {}),
    ("releases.store.s3.endpoint", "s3.example.com", "https?://", {}),
    ("ray.version", "2.60", "[0-9]+", {}),
    ("ray.upgradeStrategy", "Recreate", "NewCluster", {}),
    ("ray.ports.workerMax", 70000, "65,535", {}),
    ("ray.ports.ingressMin", "30000", "want integer", {}),
    ("ray.ports.gcs", 6379, "additional properties", {}),
    ("serving.port", 0, "minimum", {}),
    ("serving.deployments.router.replicas", 0, "minimum", {}),
    ("serving.deployments.scorer", {}, "additional properties", {}),
    ("serving.parity.ratio", 2, "maximum", {}),
    ("serving.budgetsMs.ranking", -5, "minimum", {}),
    ("serving.queue.maxOngoingRequests", 0, "minimum", {}),
    ("serving.queue.maxOngoingSustained", 65, "at most serving.queue.maxOngoingRequests, which is 64", {}),
    ("serving.head.resources.limits", {"cpu": "1", "memory": None}, "missing property 'memory'", {}),
    ("serving.head.resources.requests.memory", "lots", "[kMGT]", {}),
    ("serving.env.BAD NAME", "x", "additional properties", {}),
    ("serving.workers.GPU", {}, "additional properties", {}),
    ("serving.bucketSalt", "", "minLength", {}),
    ("serving.terminationGracePeriodSeconds", 1, "minimum", {}),
    ("serving.head.tolerations", [{"key": "a", "effect": "Never"}], "NoSchedule", {}),
    ("operator.replicas", 0, "minimum", {}),
    ("operator.prometheusUrl", "prometheus:9090", "https?://", {}),
    ("operator.prometheusUrl", "http://p.test", "in clear text", {"operator.prometheusAccess.tokenSecret": "t"}),
    ("operator.alertmanagerUrl", "http://10.0.0.1", "in clear text", {"operator.alertmanagerAccess.tokenSecret": "t"}),
    ("features.redis.host", "redis:6379,password=p", "does not match pattern", {}),
    ("features.redis.tlsFiles.secret", "ca", "features.redis.tls is false",
     {"features.type": "redis", "features.registry": "s3://a/b", "features.redis.host": "redis.test"}),
    ("ray.tls.caSecret", "No Secret", "does not match pattern", {}),
    ("operator.webhookTls.caSecret", "x", "additional properties", {}),
    ("features.type", "sqlite", "redis", {}),
    ("features.redis.maxMemory", "1Gi", "kb|mb|gb", {}),
    ("jobs.train.schedule", "nightly", "@(hourly|daily", {}),
    ("jobs.train.command", [], "minItems", {}),
    ("jobs.train.command", ["python", "-c", "1"], "a command that begins with reelway", {}),
    ("jobs.allowedImages", ["a b"], "does not match pattern", {}),
    ("services.ipFamilies", ["IPv5"], "must be one of", {}),
    ("services.ipFamilyPolicy", "Dual", "must be one of", {}),
    ("jobs.defaults.schedule", "@daily", "additional properties", {}),
    ("jobs.defaults.workers", -1, "minimum", {}),
    ("jobs.materialisation", {}, "additional properties", {}),
    ("jobs.backoffLimit", -1, "minimum", {}),
    ("jobs.runsPath", "runs/-production", "does not match pattern", {}),
    ("jobs.startTimeoutSeconds", 5, "minimum", {}),
    ("jobs.submitters", [{"kind": "Team", "name": "ml"}], "must be one of", {}),
    ("eventLog.address", "kafka:9092", "kafka://", {}),
    ("eventLog.partitions.viewers", 0, "minimum", {}),
    ("eventLog.retentionHours", 1, "minimum", {}),
    ("stream.eventLog", "kafka://k:9092", "additional properties", {}),
    ("stream.replicas", 0, "minimum", {}),
    ("stream.state.size", "10", "[MGT]", {}),
    ("overlay.replicas", 2, "additional properties", {}),
    ("overlay.url", "features", "://", {}),
    ("catalogue.port", 0, "minimum", {}),
    ("networkPolicies.kafka", [{"ipBlock": {"cidr": "10.0.0.0"}}], "(3[0-2]", {}),
    ("monitoring.monitors.interval", "5", "(ms|s|m|h)", {}),
    ("monitoring.rules.latencyThresholdMs", 300, "250", {}),
    ("monitoring.rules.availabilityObjectivePercent", 100, "maximum", {}),
    ("networkPolicies.clients", [{"ipBlock": {"cidr": "10.0.0.0"}}], "(3[0-2]", {}),
    ("tests.viewer", "first", "want integer", {}),
    # Errors of the templates.
    ("releases.initial", "", "64 hexadecimal digits", {}),
    ("secrets.name", "", "impression-tokens", {"secrets.generate": False}),
    ("releases.store.hostPath.path", "", "absolute path", {}),
    ("releases.store.s3.bucket", "", "a bucket", {"releases.store.type": "s3"}),
    ("releases.store.gs.bucket", "", "a bucket", {"releases.store.type": "gs"}),
    ("releases.store.pvc.existingClaim", "mine", "no value", {}),
    ("releases.publicKeys.configMap", "", "*.public.pem", {}),
    ("releases.publicKeys.secret", "keys", "no value", {}),
    ("ray.ports.workerMax", 10002, "more than ray.ports.workerMin", {}),
    ("ray.ports.ingressMax", 29000, "more than ray.ports.ingressMin", {}),
    ("ray.ports.ingressMin", 10500, "outside of ray.ports.workerMin", {}),
    ("ray.ports.workerMin", 8000, "no overlap of Ray's", {}),
    ("serving.metrics.port", 8265, "Ray's dashboard port", {}),
    ("serving.port", 30100, "the range 30000 to 30199", {}),
    ("serving.port", 40100, "the range 40000 to 40199", {}),
    ("serving.head.cpus", 0, "no worker", {}),
    ("serving.workers", {}, "expected at least 0.7: the routers and the stages", {"serving.head.cpus": 0.5}),
    ("serving.workers", {}, "expected at least 0.3: the routers, and one more replica",
     {"serving.head.cpus": 0.2, "serving.composition": "fused"}),
    ("serving.composition", "fused", "staged, because ranker.backend is kserve", {"ranker.backend": "kserve"}),
    ("serving.composition", "merged", "must be one of", {}),
    ("features.redis.tlsFiles.secret", "", "because features.redis.tlsFiles.clientCertificate is true",
     {"features.type": "redis", "features.redis.host": "r.test", "features.registry": "s3://a/registry.db",
      "features.redis.tls": True, "features.redis.tlsFiles.clientCertificate": True}),
    ("eventLog.tlsFiles.secret", "", "because eventLog.tlsFiles.clientCertificate is true",
     {"eventLog.address": "kafka://k.test:9092", "eventLog.tlsFiles.clientCertificate": True}),
    ("auth.unlimitedCidrs", ["10.0.0.0/33"], "does not match pattern", {}),
    ("serving.head.resources.limits.cpu", "2", "at least the request", {"serving.head.resources": BIG}),
    ("serving.head.resources.limits.memory", "1500Mi", "at least the request", {"serving.head.resources": HUNGRY}),
    ("serving.deployments.ranking.gpus", 1, "no group of serving.workers has GPUs", {}),
    ("serving.deployments.ranking.autoscaling.min", 9, "at most autoscaling.max", {}),
    ("serving.ingress.host", "", "a host name", {"serving.ingress.enabled": True}),
    ("serving.httpRoute.parentRefs", [], "at least one Gateway", {"serving.httpRoute.enabled": True}),
    ("serving.internalPort", 8265, "Ray's dashboard port", {}),
    ("auth.mode", "off", "jwt or gateway, because serving.ingress.enabled is true",
     {"serving.ingress.enabled": True, "serving.ingress.host": "a.test"}),
    ("auth.mode", False, "jwt or gateway, because serving.httpRoute.enabled is true",
     {"serving.httpRoute.enabled": True, "serving.httpRoute.parentRefs": [{"name": "g"}]}),
    ("auth.trustedProxies", 0, "all clients would have the address of its proxy",
     {"serving.httpRoute.enabled": True, "serving.httpRoute.parentRefs": [{"name": "g"}],
      "auth.allowUnauthenticated": True}),
    ("auth.jwt.audience", "", "because auth.mode is jwt", {"auth.mode": "jwt", "auth.jwt.jwksUrl": "https://id.test"}),
    ("auth.jwt.jwksUrl", "", "a ConfigMap in auth.jwt.keysConfigMap", {"auth.mode": "jwt", "auth.jwt.audience": "a"}),
    ("auth.jwt.keysConfigMap", "keys", "no value, because auth.jwt.jwksUrl is https://id.test",
     {"auth.mode": "jwt", "auth.jwt.audience": "a", "auth.jwt.jwksUrl": "https://id.test"}),
    ("auth.gateway.keysSecret", "", "a Secret with the key", {"auth.mode": "gateway"}),
    ("auth.mode", "basic", "must be one of", {}),
    ("auth.jwt.algorithms", ["HS256"], "must be one of", {}),
    ("auth.jwt.jwksUrl", "id.test/keys", "https?://", {}),
    ("auth.perViewer.burst", 0, "minimum", {}),
    ("auth.unlimitedCidrs", ["10.0.0.0"], "(3[0-2]", {}),
    ("serving.env.RAY_AUTH_TOKEN", "hunter2", "read from a Secret", {}),
    ("operator.podDisruptionBudget.enabled", True, "operator.replicas is below 2", {}),
    ("features.type", "directory", "no volume",
     {"releases.store.type": "gs", "releases.store.gs.bucket": "releases"}),
    ("features.registry", "", "Feast's registry", {"features.type": "redis"}),
    ("features.redis.host", "", "external", {"features.type": "redis", "features.registry": "s3://a/b"}),
    ("features.redis.tls", True, "bundled",
     {"features.type": "redis", "features.registry": "s3://a/b", "features.redis.mode": "bundled"}),
    ("jobs.runsClaim", "", "releases.store.type is no volume",
     {"releases.store.type": "gs", "releases.store.gs.bucket": "releases", "jobs.train.enabled": True}),
    ("serving.parity.log", "/vectors", "a URL that serving pods and the parity job reach",
     {"releases.store.type": "gs", "releases.store.gs.bucket": "releases"}),
    ("serving.parity.log", "/vectors", "a folder below /var/lib/reelway/volume", {}),
    ("serving.parity.log", "/var/lib/reelway/volume/", "a folder without", {}),
    ("serving.parity.log", "/var/lib/reelway/volume/a/../releases", "a folder without", {}),
    ("features.directory", "releases", "does not contain the release store",
     {"features.type": "directory", "releases.store.path": "releases"}),
    ("features.directory", "runs", "does not contain the release store",
     {"features.type": "directory", "releases.store.path": "runs/one/releases"}),
    ("overlay.url", "/var/lib/reelway/volume/runs/one", "does not contain the release store",
     {**LIVE, "releases.store.path": "runs/one/releases"}),
    ("networkPolicies.apiServer.cidrs", [], "minItems", {}),
    ("jobs.parity.run", "runs/production", "pattern", {}),
    ("jobs.parity.command", ["sh"], "additional properties", {}),
    ("eventLog.replication.minInSync", 2, "at most eventLog.replication.factor, which is 1", LIVE),
    ("stream.replicas", 3, "at most eventLog.partitions.viewers, which is 2", LIVE),
    ("jobs.runsClaim", "", "stream.enabled is true",
     {**LIVE, "releases.store.type": "gs", "releases.store.gs.bucket": "releases"}),
    ("overlay.url", "/var/lib/reelway/volume/overlay", "a URL that serving pods reach",
     {**LIVE, "jobs.runsClaim": "runs", "releases.store.type": "gs", "releases.store.gs.bucket": "releases"}),
    ("overlay.url", "/srv/overlay", "a folder below /var/lib/reelway/volume", LIVE),
    ("catalogue.resources.limits.cpu", "2", "at least the request", {**LIVE, "catalogue.resources": BIG}),
    ("operator.prometheusAccess.token", "x", "additional properties", {}),
    ("operator.prometheusAccess.labels", {"a-b": "x"}, "additional properties", {}),
    ("monitoring.rules.interval", "often", "(ms|s|m|h)$", {}),
    ("monitoring.monitors.enabled", False, "rules without their scrape jobs", {"monitoring.rules.enabled": True}),
    ("monitoring.rules.enabled", False, "no alert to route",
     {**MONITORS, "monitoring.alertmanagerConfig.enabled": True}),
]  # fmt: skip
GROUP: Final = {
    "minReplicas": 1, "replicas": 2, "maxReplicas": 3, "gpus": 0, "gpuResource": "nvidia.com/gpu",
    "resources": {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"cpu": "1", "memory": "1Gi"}},
}  # fmt: skip


def test_table_covers_at_least_forty_values() -> None:
    assert len({(path, str(value)) for path, value, _, _ in WRONG}) >= 40


@pytest.mark.parametrize(
    ("path", "value", "allowed", "besides"), WRONG, ids=[f"{one[0]}={one[1]}"[:60] for one in WRONG]
)
def test_wrong_value_fails_with_its_path(path: str, value: Any, allowed: str, besides: dict[str, Any]) -> None:
    values = NEEDED
    for where, what in {**besides, path: value}.items():
        values = merged(values, at(where, what))
    done = helm_template(values, ENVIRONMENTS / "dev.yaml")
    assert done.returncode != 0, f"{path}={value} rendered"
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
def test_worker_group_with_contradicting_replicas_fails(change: Document, path: str) -> None:
    values = merged(NEEDED, at("serving.workers.cpu", {**GROUP, **change}))
    done = helm_template(values, ENVIRONMENTS / "dev.yaml")
    assert done.returncode != 0
    assert f"{path}: saw" in done.stderr


def test_consistent_worker_group_renders() -> None:
    done = helm_template(merged(NEEDED, at("serving.workers.cpu", GROUP)), ENVIRONMENTS / "dev.yaml")
    assert done.returncode == 0, done.stderr


def at(path: str, value: Any) -> Document:
    """``value`` nested under a dotted path."""
    for part in reversed(path.split(".")):
        value = {part: value}
    made: Document = value
    return made
