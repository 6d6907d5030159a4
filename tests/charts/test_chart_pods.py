"""What holds of every pod that the chart makes, whatever the values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.charts.chart_tool import COMBINATIONS, ENVIRONMENT_FILES, Document, named, rendered

# A password that a container reads comes by name; a value that looks like one was written out.
SECRET_WORDS = ("TOKEN", "PASSWORD", "SECRET", "KEY")


def pods(document: Document) -> Iterator[tuple[str, Document]]:
    """(where, spec) of every pod in an object, RayService and RayJob included."""
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
def test_every_pod_is_one_that_the_restricted_level_takes(environment: str, component: str) -> None:
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
def test_every_container_says_what_it_needs_and_from_where(environment: str, component: str) -> None:
    for where, pod in all_pods(environment, component):
        mounts = {volume["name"] for volume in pod.get("volumes", ())}
        for container in pod["containers"]:
            resources = container["resources"]
            for kind in ("requests", "limits"):
                assert {"cpu", "memory"} <= resources[kind].keys(), (where, container["name"])
            image = container["image"]
            assert "@sha256:" in image or (image.rpartition(":")[2] not in ("", "latest") and ":" in image), image
            assert {mount["name"] for mount in container["volumeMounts"]} <= mounts, where
            for variable in container.get("env", ()):
                if any(word in variable["name"] for word in SECRET_WORDS):
                    assert "secretKeyRef" in variable.get("valueFrom", {}), (where, variable)


@pytest.mark.parametrize(("environment", "component"), COMBINATIONS)
def test_no_right_is_given_beyond_the_namespace_and_no_verb_is_a_star(environment: str, component: str) -> None:
    for document in rendered(environment, component):
        assert document["kind"] not in ("ClusterRole", "ClusterRoleBinding")
        for rule in document.get("rules", ()):
            assert "*" not in [*rule["verbs"], *rule["resources"], *rule["apiGroups"]]
            assert "secrets" not in rule["resources"]


@pytest.mark.parametrize(("environment", "component"), COMBINATIONS)
def test_no_pod_is_outside_of_the_default_deny(environment: str, component: str) -> None:
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
    """Labels of every pod template, and of a pod itself."""
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
def test_selectors_of_services_and_budgets_find_pods_and_only_those_of_their_component(environment: str) -> None:
    objects = rendered(environment, "budgets")
    labels = [one for document in objects for one in pod_labels(document)]
    for document in objects:
        if document["kind"] in ("Service", "PodDisruptionBudget"):
            selector = document["spec"]["selector"].get("matchLabels", document["spec"]["selector"])
            found = [one for one in labels if selector.items() <= one.items()]
            assert found, document["metadata"]["name"]
            assert len({one["reelway.dev/component"] for one in found}) == 1


def test_the_pods_that_serve_and_train_have_no_kubernetes_token() -> None:
    for where, pod in all_pods("air-gapped", "as-is") + all_pods("dev", "jobs"):
        if pod["serviceAccountName" if "serviceAccountName" in pod else "securityContext"] == "rw-reelway-serving":
            assert pod["automountServiceAccountToken"] is False, where


def test_without_a_service_there_are_jobs_and_the_operator_and_no_pod_that_serves() -> None:
    for environment in ("dev", "production-cpu"):
        objects = rendered(environment, "no-service")
        kinds = {one["kind"] for one in objects}
        assert {"RayJob", "Deployment"} <= kinds
        assert not kinds & {"RayService", "StatefulSet", "Ingress", "HTTPRoute"}
        assert {one["reelway.dev/component"] for document in objects for one in pod_labels(document)} <= {
            "jobs", "job-creator", "controller", "redis",
        }  # fmt: skip


def test_the_operator_reads_the_store_and_cannot_write_it() -> None:
    (pod,) = [pod for _, pod in pods(named(rendered("dev", "as-is"), "Deployment", "-controller"))]
    (store,) = [one for one in pod["volumes"] if one["name"] == "store"]
    (mount,) = [one for one in pod["containers"][0]["volumeMounts"] if one["name"] == "store"]
    assert store["persistentVolumeClaim"]["readOnly"] is True
    assert mount["readOnly"] is True


def test_the_controller_may_write_one_ray_service_and_its_own_lease() -> None:
    rules = named(rendered("dev", "as-is"), "Role", "-controller")["rules"]
    granted = {
        (group, resource): (set(rule["verbs"]), rule.get("resourceNames"))
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        if rule["verbs"] != ["create"]
    }
    assert granted[("ray.io", "rayservices")] == ({"get", "patch"}, ["rw-reelway"])
    assert granted[("coordination.k8s.io", "leases")] == ({"get", "update"}, ["rw-reelway-controller"])
    static = named(rendered("air-gapped", "as-is"), "Role", "-controller")["rules"]
    assert not [rule for rule in static if "ray.io" in rule["apiGroups"]]


@pytest.mark.parametrize("component", ["static", "kuberay"])
def test_ray_opens_only_ports_that_are_pinned(component: str) -> None:
    kind = "RayService" if component == "kuberay" else "StatefulSet"
    document = next(one for one in rendered("dev", component) if one["kind"] == kind)
    (pod,) = [pod for _, pod in pods(document)]
    ray = pod["containers"][0]
    environment = {one["name"]: one.get("value") for one in ray["env"]}
    assert environment["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"] == "30000"
    assert environment["RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"] == "30199"
    if component == "kuberay":
        options = document["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]
    else:
        options = dict(one.removeprefix("--").split("=", 1) for one in ray["args"])
    pinned = (
        "port node-manager-port object-manager-port runtime-env-agent-port metrics-export-port min-worker-port "
        "max-worker-port dashboard-agent-grpc-port dashboard-agent-listen-port"
    )
    for name in pinned.split():
        assert int(options[name]) > 0
