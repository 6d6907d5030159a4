"""The operator needs only the rights that its command lists, and only in its namespace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tests.support.cluster.fake_serve import GOOD, FakeServe
from tests.support.cluster.kubectl import Kubectl
from tests.support.cluster.operator_runs import operating, over, settings_of, until
from tests.support.cluster.ray_service_resource import declared
from tests.support.cluster.rollout_manifests import QUICK

from reelway.platform.cluster.kube_api import KubeApi
from reelway.platform.errors import KubernetesError

pytestmark = pytest.mark.cluster

RULES = [
    {"apiGroups": ["reelway.dev"], "resources": ["releaserollouts"], "verbs": ["get", "list", "watch", "patch"]},
    {"apiGroups": ["reelway.dev"], "resources": ["releaserollouts/status"], "verbs": ["update"]},
    {"apiGroups": ["ray.io"], "resources": ["rayservices"], "verbs": ["get", "patch"]},
    {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "create", "update"]},
    {"apiGroups": [""], "resources": ["events"], "verbs": ["create"]},
    {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get"]},
]


@pytest.fixture
def operator_api(kube: Kubectl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KubeApi:
    """A client with the token of the operator's ServiceAccount."""
    kube.run("create", "serviceaccount", "operator")
    kube.apply(
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": "operator"}, "rules": RULES}
    )
    kube.run("create", "rolebinding", "operator", "--role=operator", f"--serviceaccount={kube.namespace}:operator")
    token = kube.run("create", "token", "operator").strip()
    config = yaml.safe_load(kube.kubeconfig.read_text())
    config["users"] = [{"name": "operator", "user": {"token": token}}]
    for context in config["contexts"]:
        context["context"]["user"] = "operator"
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(path))
    return KubeApi(kube.namespace)


def test_complete_rollout_needs_the_listed_rights_only(
    operator_api: KubeApi,
    kube: Kubectl,
    serve: FakeServe,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(KubernetesError, match="403"):
        operator_api.list("v1/secrets")
    kube.run("create", "configmap", "mine", "--from-literal=policy.yaml=" + yaml.safe_dump(QUICK))
    spec = {**over(serve)["spec"], "backend": {"rayService": {"name": "reelway"}}, "policyRef": {"name": "mine"}}
    del spec["policy"]
    kube.apply({**over(serve), "spec": spec})
    with operating(operator_api, settings_of(serve, tmp_path)):
        kube.run("wait", "--for=condition=Promoted", "releaserollout/one", "--timeout=60s")
        assert declared(kube) == serve.document
        assert serve.routing.arms[0].release == GOOD
        until(lambda: "CompletePromotion" in kube.run("get", "events"))
        kube.run("delete", "releaserollout", "one", "--timeout=30s")
    assert "403" not in caplog.text
    assert "orbidden" not in caplog.text
    holder = json.loads(kube.run("get", "lease", "reelway-operator", "-o", "json"))["spec"]["holderIdentity"]
    assert holder == ""  # released at the end
