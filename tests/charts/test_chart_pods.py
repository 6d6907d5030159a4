"""Every pod of the chart is restricted, sized and covered by a network policy, whatever the values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from tests.support.charts.chart_tool import COMBINATIONS, ENVIRONMENT_FILES, Document, named, rendered

# Environment variables with these words must refer to a Secret.
SECRET_WORDS = ("TOKEN", "PASSWORD", "SECRET", "KEY")


def pods(document: Document) -> Iterator[tuple[str, Document]]:
    """(path, spec) of every pod in an object, including those of RayServices and RayJobs."""
    name = f"{document['kind']}/{document['metadata'].get('name')}"

    def within(value: Any, path: str) -> Iterator[tuple[str, Document]]:
        if isinstance(value, dict):
            if "containers" in value:
                yield path, value
            for key, one in value.items():
                yield from within(one, f"{path}.{key}")
        elif isinstance(value, list):
            for index, one in enumerate(value):
                yield from within(one, f"{path}[{index}]")

    yield from within(document.get("spec"), name)


def all_pods(environment: str, component: str) -> list[tuple[str, Document]]:
    return [pod for document in rendered(environment, component) for pod in pods(document)]


@pytest.mark.parametrize(("environment", "component"), COMBINATIONS)
def test_every_pod_meets_the_restricted_level(environment: str, component: str) -> None:
    found = all_pods(environment, component)
    assert len(found) >= 1
    for where, pod in found:
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), where
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True, where
        assert security["runAsUser"] > 0, where
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, where
        allowed = {"emptyDir", "configMap", "secret", "persistentVolumeClaim", "projected"}
        for volume in pod.get("volumes", ()):
            assert volume.keys() - {"name"} <= allowed, (where, volume)
        for container in pod["containers"] + pod.get("initContainers", []):
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False, where
            assert own["capabilities"] == {"drop": ["ALL"]}, where
            assert own["readOnlyRootFilesystem"] is True, where
            assert not any("hostPort" in port for port in container.get("ports", ())), where


@pytest.mark.parametrize(("environment", "component"), COMBINATIONS)
def test_every_container_has_resources_with_a_pinned_image(environment: str, component: str) -> None:
    found = [(document, *pod) for document in rendered(environment, component) for pod in pods(document)]
    for document, where, pod in found:
        claims = document.get("spec", {}).get("volumeClaimTemplates", ())
        mounts = {volume["name"] for volume in pod.get("volumes", ())} | {one["metadata"]["name"] for one in claims}
        for container in pod["containers"]:
            resources = container["resources"]
            for kind in ("requests", "limits"):
                assert {"cpu", "memory"} <= resources[kind].keys(), (where, container["name"])
            image = container["image"]
            assert "@sha256:" in image or (image.rpartition(":")[2] not in ("", "latest") and ":" in image), image
            assert {mount["name"] for mount in container["volumeMounts"]} <= mounts, where
            for variable in container.get("env", ()):
                is_path = variable.get("value", "").startswith("/etc/reelway/tls/")
                if any(word in variable["name"] for word in SECRET_WORDS) and not is_path:
                    assert "secretKeyRef" in variable.get("valueFrom", {}), (where, variable)


@pytest.mark.parametrize(("environment", "component"), COMBINATIONS)
def test_roles_are_namespaced_without_wildcards(environment: str, component: str) -> None:
    for document in rendered(environment, component):
        assert document["kind"] not in ("ClusterRole", "ClusterRoleBinding")
        for rule in document.get("rules", ()):
            assert "*" not in [*rule["verbs"], *rule["resources"], *rule["apiGroups"]]
            if "secrets" in rule["resources"]:
                assert document["metadata"]["name"].endswith("-secrets")
                assert rule["verbs"] == ["create"]  # neither reads nor changes one


@pytest.mark.parametrize(("environment", "component"), COMBINATIONS)
def test_every_pod_has_a_network_policy(environment: str, component: str) -> None:
    objects = rendered(environment, component)
    policies = [one for one in objects if one["kind"] == "NetworkPolicy"]
    if component == "open-network":
        assert not policies
        return
    allowed = {one["spec"]["podSelector"]["matchLabels"].get("reelway.dev/component") for one in policies}
    for document in objects:
        for labels in pod_labels(document):
            assert labels["app.kubernetes.io/instance"] == "rw"
            assert labels["reelway.dev/component"] in allowed, labels


def pod_labels(document: Document) -> Iterator[dict[str, str]]:
    """Labels of every pod and pod template in an object."""
    if document["kind"] == "Pod":
        yield document["metadata"]["labels"]

    def within(value: Any) -> Iterator[dict[str, str]]:
        if isinstance(value, dict):
            if "spec" in value and "containers" in value["spec"]:
                yield value["metadata"]["labels"]
            for one in value.values():
                yield from within(one)
        elif isinstance(value, list):
            for one in value:
                yield from within(one)

    yield from within(document.get("spec"))


@pytest.mark.parametrize("environment", ENVIRONMENT_FILES)
def test_selectors_match_pods_of_one_component_only(environment: str) -> None:
    objects = rendered(environment, "budgets")
    labels = [one for document in objects for one in pod_labels(document)]
    for document in objects:
        if document["kind"] in ("Service", "PodDisruptionBudget"):
            selector = document["spec"]["selector"].get("matchLabels", document["spec"]["selector"])
            found = [one for one in labels if selector.items() <= one.items()]
            assert found, document["metadata"]["name"]
            assert len({one["reelway.dev/component"] for one in found}) == 1


def test_serving_pods_have_no_kubernetes_token() -> None:
    for where, pod in all_pods("air-gapped", "as-is") + all_pods("dev", "jobs"):
        if pod["serviceAccountName" if "serviceAccountName" in pod else "securityContext"] == "rw-reelway-serving":
            assert pod["automountServiceAccountToken"] is False, where


def test_serving_disabled_installs_jobs_with_the_operator_only() -> None:
    for environment in ("dev", "production-cpu"):
        objects = rendered(environment, "no-service")
        kinds = {one["kind"] for one in objects}
        assert {"RayJob", "Deployment"} <= kinds
        assert not kinds & {"RayService", "Ingress", "HTTPRoute"}
        assert {one["reelway.dev/component"] for document in objects for one in pod_labels(document)} <= {
            "jobs", "job-creator", "operator", "redis", "secrets",
        }  # fmt: skip


def test_operator_mounts_the_store_read_only() -> None:
    (pod,) = [pod for _, pod in pods(named(rendered("dev", "as-is"), "Deployment", "-operator"))]
    (store,) = [one for one in pod["volumes"] if one["name"] == "store"]
    (mount,) = [one for one in pod["containers"][0]["volumeMounts"] if one["name"] == "store"]
    assert store["persistentVolumeClaim"]["readOnly"] is True
    assert mount["readOnly"] is True


def serving_pods(component: str) -> list[Document]:
    """Pods of the RayService, head first."""
    return [pod for _, pod in pods(named(rendered("dev", component), "RayService"))]


@pytest.mark.parametrize(
    ("component", "folders"),
    [
        ("pvc", []),
        ("features-directory", ["features", "parity"]),
        ("parity-volume", ["features", "parity"]),
        ("live", ["overlay"]),
    ],
)
def test_serving_pods_write_named_folders_of_the_volume_only(component: str, folders: list[str]) -> None:
    found = serving_pods(component)
    assert len(found) >= 1
    for pod in found:
        for container in pod["containers"]:
            mounts = [one for one in container["volumeMounts"] if one["name"] == "releases"]
            writable = {one["mountPath"]: one["subPath"] for one in mounts if not one.get("readOnly")}
            if container["name"] == "ray":
                assert {"name": "releases", "mountPath": "/var/lib/reelway/volume", "readOnly": True} in mounts
                assert writable == {f"/var/lib/reelway/volume/{folder}": folder for folder in folders}
            else:
                assert not mounts
        created = [one["args"] for one in pod.get("initContainers", ())]
        assert created == ([[f"/var/lib/reelway/volume/{folder}" for folder in folders]] if folders else [])


@pytest.mark.parametrize("component", ["s3", "parity-s3", "live-elsewhere"])
def test_serving_pods_mount_no_volume_of_an_object_store(component: str) -> None:
    environment = "production-cpu"
    for _, pod in pods(named(rendered(environment, component), "RayService")):
        assert "initContainers" not in pod
        assert not [one for one in pod["volumes"] if one["name"] == "releases"]


def test_operator_verifies_releases_with_the_keys_of_the_serving_pods() -> None:
    for environment in ("dev", "production-cpu", "air-gapped"):
        found = rendered(environment, "as-is")
        settings = yaml.safe_load(named(found, "ConfigMap", "-operator")["data"]["settings.yaml"])
        ((_, operator),) = pods(named(found, "Deployment", "-operator"))
        serving = next(pod for _, pod in pods(named(found, "RayService")))
        mounted = [one["name"] for one in operator["containers"][0]["volumeMounts"]
                   if one["mountPath"] == settings["public_keys"] and one["readOnly"]]  # fmt: skip
        ours, theirs = (next(one for one in pod["volumes"] if one["name"] in mounted) for pod in (operator, serving))
        source = "configMap" if "configMap" in ours else "secret"
        assert ours == {**theirs, source: {**theirs[source], "optional": True}}


@pytest.mark.parametrize(("environment", "component"), COMBINATIONS)
def test_no_egress_allows_the_api_server_ports_everywhere(environment: str, component: str) -> None:
    for document in rendered(environment, component):
        if document["kind"] != "NetworkPolicy":
            continue
        for rule in document["spec"].get("egress", ()):
            if {"protocol": "TCP", "port": 6443} in rule.get("ports", ()):
                blocks = [peer["ipBlock"]["cidr"] for peer in rule["to"]]
                assert blocks
                assert not {"0.0.0.0/0", "::/0"} & set(blocks)


def test_operator_may_write_one_ray_service_with_its_lease() -> None:
    rules = named(rendered("dev", "as-is"), "Role", "-operator")["rules"]
    granted = {
        (group, resource): (set(rule["verbs"]), rule.get("resourceNames"))
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        if rule["verbs"] != ["create"]
    }
    assert granted[("ray.io", "rayservices")] == ({"get", "patch"}, ["rw-reelway"])
    assert granted[("coordination.k8s.io", "leases")] == ({"get", "update"}, ["rw-reelway-operator"])


def test_ray_listens_on_fixed_ports_only() -> None:
    document = named(rendered("dev", "as-is"), "RayService")
    (pod,) = [pod for _, pod in pods(document)]
    environment = {one["name"]: one.get("value") for one in pod["containers"][0]["env"]}
    assert environment["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"] == "30000"
    assert environment["RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"] == "30199"
    assert environment["RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT"] == "40000"
    options = document["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]
    pinned = (
        "port node-manager-port object-manager-port runtime-env-agent-port metrics-export-port min-worker-port "
        "max-worker-port dashboard-agent-grpc-port dashboard-agent-listen-port"
    )
    for name in pinned.split():
        assert int(options[name]) > 0


def test_job_kinds_inherit_the_defaults() -> None:
    objects = rendered("production-cpu", "jobs")
    jobs = {one["metadata"]["labels"]["reelway.dev/job"]: one for one in objects if one["kind"] == "RayJob"}
    assert set(jobs) == {"dataset", "features", "train", "evaluate", "release"}
    assert jobs["features"]["spec"]["activeDeadlineSeconds"] == 3600  # the default
    assert jobs["train"]["spec"]["activeDeadlineSeconds"] == 21600  # its own
    head = jobs["features"]["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert head["resources"]["limits"] == {"cpu": "2", "memory": "4Gi"}


def job_pods(kind: str) -> Iterator[tuple[str, Document]]:
    """(role, specification) of every pod of a job."""
    (job,) = [
        one
        for one in rendered("production-cpu", "jobs")
        if one["kind"] == "RayJob" and one["metadata"]["labels"]["reelway.dev/job"] == kind
    ]
    cluster = job["spec"]["rayClusterSpec"]
    yield "head", cluster["headGroupSpec"]["template"]["spec"]
    yield "worker", cluster["workerGroupSpecs"][0]["template"]["spec"]
    yield "submitter", job["spec"]["submitterPodTemplate"]["spec"]


def test_head_of_a_release_job_alone_mounts_the_signing_key() -> None:
    found = {
        (kind, role): yaml.safe_dump(pod).count("signing")
        for kind in ("dataset", "features", "train", "evaluate", "release")
        for role, pod in job_pods(kind)
    }
    assert {pod for pod, count in found.items() if count} == {("release", "head"), ("release", "submitter")}
    (submitter,) = [pod for role, pod in job_pods("release") if role == "submitter"]
    assert [volume["name"] for volume in submitter["volumes"]] == ["tmp"]  # it names the path of the key, no more
    elsewhere = [one for one in rendered("production-cpu", "jobs") if one["kind"] not in ("RayJob", "ConfigMap")]
    assert not [where for one in elsewhere for where, pod in pods(one) if "secretName: signing" in yaml.safe_dump(pod)]


def test_jobs_do_not_know_the_ray_token_of_the_service() -> None:
    jobs = [one for one in rendered("production-cpu", "jobs") if one["kind"] == "RayJob"]
    service = named(rendered("production-cpu", "jobs"), "RayService")["spec"]["rayClusterConfig"]
    assert service["authOptions"] == {"mode": "token", "secretName": "reelway-secrets"}
    for job in jobs:
        assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}  # KubeRay creates one for each job
        assert "auth_token" not in yaml.safe_dump(job)


def test_secret_generator_may_only_create_secrets() -> None:
    (rule,) = named(rendered("dev", "secrets"), "Role", "-secrets")["rules"]
    assert rule == {"apiGroups": [""], "resources": ["secrets"], "verbs": ["create"]}


def test_secret_generator_runs_before_the_pods_that_mount_the_secret() -> None:
    for kind in ("ServiceAccount", "Role", "RoleBinding"):
        annotations = named(rendered("dev", "secrets"), kind, "-secrets")["metadata"]["annotations"]
        assert annotations["helm.sh/hook"] == "pre-install,pre-upgrade"
        assert int(annotations["helm.sh/hook-weight"]) < 0
    (job,) = [one for one in rendered("dev", "secrets") if one["kind"] == "Job"]
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
