"""The InferenceService of a release: its template, its state, and its owner."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.cluster.kubectl import Kubectl
from tests.support.e2e.wait_until import until

from reelway.platform.cluster.inference_service import (
    OWNER_ANNOTATION,
    PATH,
    InferenceServiceRankers,
    RankerState,
    ranker_state,
    read_template,
)
from reelway.platform.cluster.kube_api import KubeApi
from reelway.platform.errors import ConfigError, KubernetesError

OLD, NEW = "a" * 64, "b" * 64
TEMPLATE: dict[str, Any] = {
    "apiVersion": "serving.kserve.io/v1beta1",
    "kind": "InferenceService",
    "metadata": {
        "name": "test-{release}",
        "labels": {
            "app.kubernetes.io/managed-by": "Helm",
            "app.kubernetes.io/instance": "test",
            "reelway.dev/component": "ranker",
            "reelway.dev/release": "{release}",
        },
        "annotations": {"serving.kserve.io/deploymentMode": "Standard"},
    },
    "spec": {
        "predictor": {
            "containers": [{"name": "kserve-container", "image": "reelway/serving", "args": ["--release={release_id}"]}]
        }
    },
}


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ({}, RankerState(False, "KServe is preparing it")),
        ({"conditions": [{"type": "Ready", "status": "True"}]}, RankerState(True)),
        (
            {"conditions": [{"type": "Ready", "status": "True"}], "observedGeneration": 1},
            RankerState(False, "KServe has not observed it yet"),
        ),
        (
            {"conditions": [{"type": "PredictorReady", "status": "False", "message": "0 of 1\n updated"},
                            {"type": "Ready", "status": "False", "message": "0 of 1\n updated"}]},
            RankerState(False, "0 of 1 updated"),
        ),
        (
            {"modelStatus": {"transitionStatus": "BlockedByFailedLoad", "lastFailureInfo": {"message": "exit 6"}}},
            RankerState(False, "exit 6", failed=True),
        ),
    ],
)  # fmt: skip
def test_inference_service_status_maps_to_ranker_state(status: dict[str, Any], expected: RankerState) -> None:
    assert ranker_state({"metadata": {"name": "x", "generation": 2}, "status": status}) == expected


def test_deleted_inference_service_is_not_ready() -> None:
    status = {"conditions": [{"type": "Ready", "status": "True"}]}
    assert not ranker_state({"metadata": {"name": "x", "deletionTimestamp": "now"}, "status": status}).ready


@pytest.mark.parametrize(
    "text", ["", "kind: [", "kind: Service", "kind: InferenceService\nmetadata: {name: x, labels: {}}"]
)
def test_template_without_release_fields_is_rejected(tmp_path: Path, text: str) -> None:
    path = tmp_path / "template.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="not a template of a ranker"):
        read_template(path)
    path.write_text(yaml.safe_dump(TEMPLATE))
    assert read_template(path) == TEMPLATE


@pytest.fixture
def services(kubectl: Kubectl, api: KubeApi) -> Iterator[InferenceServiceRankers]:
    if "inferenceservices" not in kubectl.run("api-resources", "--api-group=serving.kserve.io", "-o", "name"):
        pytest.skip("the cluster has no KServe; install it with `python infra/cluster kserve`")
    yield InferenceServiceRankers(api, TEMPLATE)
    kubectl.run("delete", "inferenceservice", "--all")


@pytest.mark.cluster
def test_each_release_has_one_inference_service(
    kubectl: Kubectl, api: KubeApi, services: InferenceServiceRankers
) -> None:
    other = json.loads(json.dumps(TEMPLATE).replace("test", "other").replace("{release}", OLD[:12]))
    kubectl.apply(other)
    for release in (OLD, NEW, OLD):
        services.ensure(release)
    assert services.states().keys() == {OLD[:12], NEW[:12]}
    created = api.get(f"{PATH}/test-{NEW[:12]}")
    assert created is not None
    assert created["spec"]["predictor"]["containers"][0]["args"] == [f"--release={NEW}"]
    assert created["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "reelway-operator"
    services.remove(NEW)
    services.remove(NEW)
    assert not services.states().get(NEW[:12], RankerState(False)).ready
    assert OLD[:12] in services.states()
    assert api.get(f"{PATH}/other-{OLD[:12]}") is not None


@pytest.mark.cluster
def test_inference_service_is_deleted_with_its_owner(
    kubectl: Kubectl, api: KubeApi, services: InferenceServiceRankers
) -> None:
    owned = copy.deepcopy(TEMPLATE)
    owned["metadata"]["annotations"][OWNER_ANNOTATION] = "test-ranker"
    rankers = InferenceServiceRankers(api, owned)
    with pytest.raises(KubernetesError, match="ConfigMap test-ranker, the owner of all rankers, does not exist"):
        rankers.ensure(NEW)
    kubectl.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "test-ranker"}})
    rankers.ensure(NEW)
    services.ensure(OLD)
    created = api.get(f"{PATH}/test-{NEW[:12]}")
    assert created is not None
    assert OWNER_ANNOTATION not in created["metadata"]["annotations"]
    kubectl.run("delete", "configmap", "test-ranker")
    listed = ("get", "inferenceservice", "-o", "name")
    until(
        "the InferenceService is garbage-collected",
        lambda: f"test-{NEW[:12]}" not in kubectl.run(*listed),
        30,
        lambda: kubectl.run(*listed),
    )
    assert f"test-{OLD[:12]}" in kubectl.run(*listed)
