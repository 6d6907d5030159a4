"""The operator composes ``serveConfigV2`` from the chart's options and keeps the traffic that exists."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.cluster.fake_serve import GOOD, STABLE, FakeServe, document
from tests.support.cluster.kubectl import Kubectl
from tests.support.cluster.operator_runs import held, operating, settings_of, until
from tests.support.cluster.ray_service_resource import declared
from tests.support.cluster.rollout_manifests import rollout

from reelway.platform.cluster.kube_api import KubeApi
from reelway.platform.cluster.ray_service import OPTIONS_DIGEST, RayServiceBackend
from reelway.platform.cluster.serve_config_reconciler import ServeConfigReconciler, digest_of
from reelway.platform.errors import ConfigError, RolloutError
from reelway.platform.rollout.state import Phase, RolloutState
from reelway.platform.rollout.traffic.routing import Routing
from reelway.platform.rollout.traffic.serve_config import find_routing, release_names
from reelway.platform.rollout.traffic.serve_rest import ServeAddress, ServeRestBackend
from reelway.platform.rollout.traffic.target import traffic_target

pytestmark = pytest.mark.cluster


def options(**changes: Any) -> str:
    values = {
        "releases": {"release_store": "/store", "release_cache": "/cache", "public_keys": "/keys"},
        "initial": {"release": STABLE, "salt": "s"},
        "metrics_dir": "/metrics",
        "outcomes": "/outcomes.db",
    }
    return yaml.safe_dump({**values, **changes})


class Chart:
    """Applies the two objects that the chart renders, as `kubectl apply --server-side` does."""

    def __init__(self, kubectl: Kubectl) -> None:
        self.kubectl = kubectl

    def apply_options(self, text: str) -> None:
        self.kubectl.apply({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "reelway-serving"},
            "data": {"options.yaml": text},
        })  # fmt: skip

    def apply_ray_service(self, text: str) -> None:
        container = {"name": "ray", "image": "none"}
        head = {"rayStartParams": {}, "template": {"spec": {"containers": [container]}}}
        self.kubectl.apply({
            "apiVersion": "ray.io/v1", "kind": "RayService",
            "metadata": {"name": "reelway", "annotations": {OPTIONS_DIGEST: digest_of(text)}},
            "spec": {"rayClusterConfig": {"headGroupSpec": head}},
        })  # fmt: skip

    def apply(self, text: str) -> None:
        self.apply_options(text)
        self.apply_ray_service(text)


@pytest.fixture
def chart(kube: Kubectl) -> Chart:
    """A namespace in which the chart was not yet applied."""
    kube.run("delete", "rayservice", "reelway")
    return Chart(kube)


@pytest.fixture
def backend(api: KubeApi) -> Iterator[RayServiceBackend]:
    """A RayService whose Serve does not answer yet."""
    nowhere = "http://127.0.0.1:9"
    created = RayServiceBackend(api, "reelway", ServeRestBackend(ServeAddress(nowhere, nowhere)))
    yield created
    created.close()


@pytest.fixture
def running(api: KubeApi, serve: FakeServe) -> Iterator[RayServiceBackend]:
    """A RayService whose Serve answers."""
    created = RayServiceBackend(api, "reelway", ServeRestBackend(ServeAddress(serve.url, serve.url)))
    yield created
    created.close()


def resource_version(kubectl: Kubectl) -> str:
    return kubectl.run("get", "rayservice", "reelway", "-o", "jsonpath={.metadata.resourceVersion}")


def half(canary_bp: int = 5000) -> RolloutState:
    return RolloutState(
        id="r-1", salt="s", stable_release=STABLE, canary_release=GOOD, phase=Phase.STEPPING, canary_bp=canary_bp,
        started_at=0, changed_at=0, tick_at=0,
    )  # fmt: skip


def test_new_ray_service_gets_the_initial_release(api: KubeApi, chart: Chart, backend: RayServiceBackend) -> None:
    chart.apply(options())
    prepared: list[str] = []
    reconciler = ServeConfigReconciler(api, backend, prepared.extend)
    assert reconciler.reconcile()
    assert release_names(declared(chart.kubectl)) == (STABLE,)
    assert Routing.model_validate(find_routing(declared(chart.kubectl))) == Routing.single_release(STABLE, salt="s")
    assert prepared == [STABLE]
    version = resource_version(chart.kubectl)
    assert not reconciler.reconcile()
    assert resource_version(chart.kubectl) == version


def test_changed_options_keep_releases_with_their_routing(
    api: KubeApi, chart: Chart, serve: FakeServe, running: RayServiceBackend
) -> None:
    serve.document = document(Routing.single_release(STABLE))
    reconciler = ServeConfigReconciler(api, running)
    chart.apply(options())
    reconciler.reconcile()
    running.observe()
    running.apply(traffic_target(half()))
    changed = options(initial={"release": "0" * 64}, port=9000, max_ongoing_requests=7)
    chart.apply(changed)
    running.observe()
    assert reconciler.reconcile()
    config = declared(chart.kubectl)
    assert release_names(config) == (STABLE, GOOD)
    assert Routing.model_validate(find_routing(config)) == traffic_target(half()).routing
    assert config["http_options"]["port"] == 9000
    router = next(app for app in config["applications"] if app["name"] == "router")
    assert router["args"]["max_ongoing_requests"] == 7


def test_options_wait_for_the_ray_service_they_belong_to(
    api: KubeApi, chart: Chart, backend: RayServiceBackend
) -> None:
    """Helm writes the ConfigMap a moment before the RayService with the new image."""
    reconciler = ServeConfigReconciler(api, backend)
    chart.apply(options())
    reconciler.reconcile()
    chart.apply_options(options(port=9000))
    assert not reconciler.reconcile()
    chart.apply_ray_service(options(port=9000))
    assert reconciler.reconcile()
    assert declared(chart.kubectl)["http_options"]["port"] == 9000


def test_applying_the_chart_again_changes_no_serve_config(
    api: KubeApi, chart: Chart, backend: RayServiceBackend
) -> None:
    chart.apply(options())
    ServeConfigReconciler(api, backend).reconcile()
    before = declared(chart.kubectl)
    for _ in range(2):
        chart.apply(options())
    assert declared(chart.kubectl) == before


def test_replaced_ray_service_gets_the_routing_that_serve_runs(
    api: KubeApi, chart: Chart, serve: FakeServe, running: RayServiceBackend
) -> None:
    """`kubectl replace` drops serveConfigV2 while the service runs on."""
    promoted = Routing.single_release(GOOD, salt="r-1")
    serve.document = document(promoted)
    chart.apply(options())
    assert ServeConfigReconciler(api, running).reconcile()
    assert release_names(declared(chart.kubectl)) == (GOOD,)
    assert Routing.model_validate(find_routing(declared(chart.kubectl))) == promoted


def test_config_without_a_routing_is_not_overwritten(api: KubeApi, chart: Chart, backend: RayServiceBackend) -> None:
    chart.apply(options())
    change = json.dumps({"spec": {"serveConfigV2": yaml.safe_dump({"applications": []})}})
    chart.kubectl.run("patch", "rayservice", "reelway", "--type=merge", "-p", change)
    with pytest.raises(RolloutError, match="serveConfigV2 has no valid routing"):
        ServeConfigReconciler(api, backend).reconcile()
    assert declared(chart.kubectl) == {"applications": []}


def test_wrong_options_are_reported_with_their_path(api: KubeApi, chart: Chart, backend: RayServiceBackend) -> None:
    chart.apply(options(port="x"))
    with pytest.raises(ConfigError, match=r"ConfigMap reelway-serving, options\.yaml: port"):
        ServeConfigReconciler(api, backend).reconcile()


def test_ray_service_without_options_is_left_alone(api: KubeApi, chart: Chart, backend: RayServiceBackend) -> None:
    reconciler = ServeConfigReconciler(api, backend)
    assert not reconciler.reconcile()
    chart.apply_options(options())
    assert not reconciler.reconcile()  # no RayService yet


def test_operator_applies_options_in_mid_rollout_without_moving_viewers(
    api: KubeApi, chart: Chart, serve: FakeServe, tmp_path: Path
) -> None:
    chart.apply(options())
    ray = {"service": "reelway", "trusted_hosts": ["127.0.0.1"], "dashboard_url": serve.url, "internal_url": serve.url}
    with operating(api, settings_of(serve, tmp_path, ray=ray)):
        until(lambda: release_names(_declared_or_empty(chart.kubectl)) == (STABLE,))
        chart.kubectl.apply(rollout("one", GOOD, policy=held(50)))
        until(lambda: serve.routing.rollout != "" and len(serve.routing.arms) == 2)
        routing = serve.routing
        until(lambda: find_routing(declared(chart.kubectl)) == routing.model_dump(mode="json"))
        chart.apply(options(port=9000))
        until(lambda: declared(chart.kubectl)["http_options"]["port"] == 9000)
        time.sleep(1)  # longer than several reconciles
        assert serve.routing == routing
        assert find_routing(declared(chart.kubectl)) == routing.model_dump(mode="json")


def _declared_or_empty(kubectl: Kubectl) -> dict[str, Any]:
    text = kubectl.run("get", "rayservice", "reelway", "-o", "jsonpath={.spec.serveConfigV2}")
    return yaml.safe_load(text) or {}
