"""Who may ask: the chart's values as the service reads them, and what is published."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import pytest
import yaml
from tests.support.charts.chart_tool import NEEDED, Document, documents, helm_template, merged, named, rendered

from reelway.platform.rollout.traffic.access_options import AccessOptions, GatewayOptions, JwtOptions, RateLimit
from reelway.platform.rollout.traffic.serving_options import ServingOptions


def access_of(objects: tuple[Document, ...]) -> AccessOptions:
    text = named(objects, "ConfigMap", "-serving")["data"]["options.yaml"]
    return ServingOptions.parse(text, source="chart").access


def head_of(objects: tuple[Document, ...]) -> dict[str, Any]:
    head: dict[str, Any] = named(objects, "RayService")["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    return head


def mounted_keys(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [one for volume in pod["volumes"] if volume["name"] == "access" for one in volume["projected"]["sources"]]


def test_chart_has_the_defaults_of_the_service() -> None:
    objects = rendered("dev", "as-is")
    assert access_of(objects) == AccessOptions()
    assert mounted_keys(head_of(objects)) == []


def test_issuer_with_a_key_set_is_reached() -> None:
    objects = rendered("dev", "ingress")
    expected = JwtOptions(audience="reelway", jwks_url="https://id.test:8443/keys")
    assert (access_of(objects).mode, access_of(objects).jwt) == ("jwt", expected)
    egress = named(objects, "NetworkPolicy", "-serving")["spec"]["egress"]
    assert {"ports": [{"protocol": "TCP", "port": 8443}]} in egress


def test_keys_in_a_configmap_are_mounted() -> None:
    objects = rendered("dev", "jwt-keys")
    access = access_of(objects)
    assert access.jwt == JwtOptions(
        audience="reelway", issuer="https://id.test", keys_file="/etc/reelway/access/keys"  # type: ignore[arg-type]
    )  # fmt: skip
    assert access.trusted_proxies == 2
    assert access.unlimited_networks[-1] == ip_network("10.1.0.0/16")
    assert (access.per_viewer, access.per_address) == (
        RateLimit(per_second=20, burst=100), RateLimit(per_second=200, burst=1000)
    )  # fmt: skip
    pod = head_of(objects)
    assert mounted_keys(pod) == [{"configMap": {"name": "k", "items": [{"key": "keys", "path": "keys"}]}}]
    (ray, _) = pod["containers"]
    assert {"name": "access", "mountPath": "/etc/reelway/access", "readOnly": True} in ray["volumeMounts"]
    assert not [rule for rule in named(objects, "NetworkPolicy", "-serving")["spec"]["egress"] if "443" in str(rule)]


def test_gateway_secrets_are_mounted() -> None:
    objects = rendered("dev", "http-route")
    access = access_of(objects)
    assert access.mode == "gateway"
    assert access.gateway == GatewayOptions(keys_file="/etc/reelway/access/keys")  # type: ignore[arg-type]
    assert [one["secret"]["name"] for one in mounted_keys(head_of(objects))] == ["gateway-keys"]


def test_route_without_authentication_must_be_allowed() -> None:
    """With the quotes that YAML needs, and without them."""
    route = {"serving": {"httpRoute": {"enabled": True, "parentRefs": [{"name": "g"}]}}, "secrets": {"name": "s"}}
    keys = {"releases": {**NEEDED["releases"], "publicKeys": {"configMap": "k"}}}
    allowed_mode = {"allowUnauthenticated": True, "trustedProxies": 1}
    for mode in ("off", False):
        auth = {"auth": {"mode": mode}}
        assert "auth.mode: saw" in helm_template(merged(merged(route, keys), auth)).stderr
        allowed = helm_template(merged(merged(route, keys), {"auth": {**allowed_mode, "mode": mode}}))
        assert allowed.returncode == 0, allowed.stderr
        assert access_of(documents(allowed.stdout)).mode == "off"


def test_production_environment_demands_a_proof() -> None:
    access = access_of(rendered("production-cpu", "as-is"))
    assert (access.mode, access.trusted_proxies) == ("jwt", 1)


@pytest.mark.parametrize(("component", "kind"), [("ingress", "Ingress"), ("http-route", "HTTPRoute")])
def test_route_publishes_two_exact_paths(component: str, kind: str) -> None:
    text = yaml.safe_dump(named(rendered("production-cpu", component), kind))
    assert sorted(line.split()[-1] for line in text.splitlines() if " /" in line) == ["/v1/outcomes", "/v1/recommend"]
    assert text.count("Exact") == 2
    assert "internal" not in text
    assert "8001" not in text


def test_internal_api_listens_in_the_head_only() -> None:
    objects = rendered("production-cpu", "monitoring")
    ray, metrics = head_of(objects)["containers"]
    assert {"name": "internal", "containerPort": 8001} in ray["ports"]  # KubeRay adds it to the head's Service
    assert metrics["args"] == ["--internal-port", "8001", "--service-url", "http://localhost:8000"]
    assert "REELWAY_TOKEN_SECRET" in {one["name"] for one in metrics["env"]}
    (group,) = named(objects, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    worker = group["template"]["spec"]["containers"][1]
    assert "args" not in worker
    assert {one["name"] for one in worker["env"]} == {"PROMETHEUS_MULTIPROC_DIR"}


def test_only_operator_and_monitoring_reach_the_internal_api() -> None:
    objects = rendered("production-cpu", "monitoring")
    rules = named(objects, "NetworkPolicy", "-serving")["spec"]["ingress"]
    reaching = [rule for rule in rules if {"protocol": "TCP", "port": 8001} in rule.get("ports", ())]
    peers = [peer for rule in reaching for peer in rule["from"]]
    assert [peer["podSelector"]["matchLabels"]["reelway.dev/component"] for peer in peers if "podSelector" in peer] == [
        "operator"
    ]
    assert [peer["namespaceSelector"]["matchLabels"] for peer in peers if "namespaceSelector" in peer] == [
        {"kubernetes.io/metadata.name": "monitoring"}
    ]
    (endpoint,) = named(objects, "PodMonitor", "-outcomes")["spec"]["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("internal", "/v1/outcomes/metrics")
    settings = named(objects, "ConfigMap", "-operator")["data"]
    assert "internal_url: http://{name}-head-svc.{namespace}.svc:8001" in yaml.safe_dump(settings, width=200)
