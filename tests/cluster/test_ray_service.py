"""The RayService backend writes Serve first, then the RayService, and repairs a difference between both."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from tests.support.cluster.fake_serve import GOOD, STABLE, FakeServe, document
from tests.support.cluster.kubectl import Kubectl
from tests.support.cluster.operator_runs import operating, over, settings_of, until
from tests.support.cluster.ray_service_resource import declare, declared

from reelway.platform.cluster.kube_api import KubeApi
from reelway.platform.cluster.ray_service import RayServiceBackend
from reelway.platform.errors import RolloutError
from reelway.platform.rollout.state import Phase, RolloutState
from reelway.platform.rollout.traffic.routing import Routing
from reelway.platform.rollout.traffic.serve_rest import ServeAddress, ServeRestBackend
from reelway.platform.rollout.traffic.target import traffic_target

pytestmark = pytest.mark.cluster


@pytest.fixture
def backend(api: KubeApi, kube: Kubectl, serve: FakeServe) -> Iterator[RayServiceBackend]:
    del kube
    rayservice_backend = RayServiceBackend(api, "reelway", ServeRestBackend(ServeAddress(serve.url, serve.url)))
    yield rayservice_backend
    rayservice_backend.close()


def state(canary_bp: int = 1000, phase: Phase = Phase.STEPPING) -> RolloutState:
    return RolloutState(
        id="r-1", salt="s", stable_release=STABLE, canary_release=GOOD, phase=phase, canary_bp=canary_bp, started_at=0,
        changed_at=0, tick_at=0,
    )  # fmt: skip


def test_serve_is_written_before_the_ray_service(
    backend: RayServiceBackend,
    kube: Kubectl,
    serve: FakeServe,
) -> None:
    before: list[dict[str, Any]] = []
    serve.before_taking = lambda: before.append(declared(kube))
    target = traffic_target(state())
    backend.observe()
    backend.apply(target)
    assert before == [document(Routing.single_release(STABLE))]
    assert declared(kube) == serve.document
    assert serve.routing == target.routing
    observation = backend.observe()
    assert (observation.routing, set(observation.releases)) == (target.routing, {STABLE, GOOD})
    version = json.loads(kube.run("get", "rayservice", "reelway", "-o", "json"))["metadata"]["resourceVersion"]
    backend.apply(target)
    assert len(serve.written) == 1
    assert version == json.loads(kube.run("get", "rayservice", "reelway", "-o", "json"))["metadata"]["resourceVersion"]


def test_status_writes_of_kuberay_cause_no_conflict(
    backend: RayServiceBackend,
    kube: Kubectl,
    serve: FakeServe,
) -> None:
    backend.observe()
    kube.run("annotate", "rayservice", "reelway", f"touched={uuid.uuid4()}")
    target = traffic_target(state())
    backend.apply(target)
    assert declared(kube) == serve.document
    assert serve.routing == target.routing


def test_traffic_is_written_on_top_of_concurrent_changes(
    backend: RayServiceBackend,
    kube: Kubectl,
    serve: FakeServe,
) -> None:
    """New options are written to the RayService between the read and the write of a rollout's traffic."""
    backend.observe()
    other = document(Routing.single_release(STABLE))
    other["applications"][-1]["deployments"][0]["num_replicas"] = 2
    declare(kube, other)
    target = traffic_target(state())
    backend.apply(target)
    assert serve.routing == target.routing
    assert declared(kube)["applications"][-1]["deployments"][0]["num_replicas"] == 2
    assert declared(kube) == serve.document
    assert backend.observe().routing == target.routing


def test_rollback_reaches_serve_without_a_declared_config(
    backend: RayServiceBackend, kube: Kubectl, serve: FakeServe
) -> None:
    """`kubectl replace` with the chart's RayService removes serveConfigV2; a rollback still works and declares it."""
    backend.observe()
    backend.apply(traffic_target(state()))
    kube.run("patch", "rayservice", "reelway", "--type=json", "-p", '[{"op":"remove","path":"/spec/serveConfigV2"}]')
    backend.observe()
    target = traffic_target(state(0, Phase.ROLLED_BACK))
    backend.apply(target)
    assert serve.routing == target.routing
    assert declared(kube) == serve.document


def test_older_config_submitted_by_kuberay_is_corrected(
    backend: RayServiceBackend,
    kube: Kubectl,
    serve: FakeServe,
) -> None:
    old = serve.document
    target = traffic_target(state(0, Phase.ROLLED_BACK))
    backend.observe()
    backend.apply(traffic_target(state()))
    serve.take(old)  # KubeRay was restarted before the second write and submits the older config.
    assert backend.observe().routing is None
    backend.apply(target)
    assert serve.routing == target.routing
    assert declared(kube) == serve.document


def test_changes_of_another_writer_are_kept(backend: RayServiceBackend, kube: Kubectl) -> None:
    """Another writer gives the router more replicas. The weights are added to that change."""
    backend.observe()
    upgraded = document(Routing.single_release(STABLE))
    upgraded["applications"][-1]["deployments"][0]["num_replicas"] = 3
    declare(kube, upgraded)
    backend.apply(traffic_target(state()))
    assert declared(kube)["applications"][-1]["deployments"][0]["num_replicas"] == 3
    assert backend.observe().routing == traffic_target(state()).routing


def test_rejected_target_leaves_the_ray_service_unchanged(
    backend: RayServiceBackend,
    kube: Kubectl,
    serve: FakeServe,
) -> None:
    before, serve.refuses = declared(kube), True
    with pytest.raises(RolloutError, match="answered 500"):
        backend.apply(traffic_target(state()))
    assert declared(kube) == before


def test_missing_ray_service_is_reported(api: KubeApi, kube: Kubectl, serve: FakeServe) -> None:
    del kube
    missing = RayServiceBackend(api, "other", ServeRestBackend(ServeAddress(serve.url, serve.url)))
    assert not missing.exists()
    assert "RayService other: it does not exist" in missing.observe().detail
    with pytest.raises(RolloutError, match="RayService other: it does not exist"):
        missing.apply(traffic_target(state()))
    missing.close()


def test_rollout_ends_with_serve_equal_to_the_ray_service(
    api: KubeApi,
    kube: Kubectl,
    serve: FakeServe,
    tmp_path: Any,
) -> None:
    kube.apply({**over(serve), "spec": {**over(serve)["spec"], "backend": {"rayService": {"name": "reelway"}}}})
    with operating(api, settings_of(serve, tmp_path)):
        kube.run("wait", "--for=condition=Promoted", "releaserollout/one", "--timeout=60s")
        assert declared(kube) == serve.document
        assert serve.routing.arms[0].release == GOOD
        # `helm uninstall` may delete the service first; the rollout must not wait for its traffic.
        kube.run("delete", "rayservice", "reelway")
        kube.run("delete", "releaserollout", "one", "--timeout=30s")
    until(lambda: "one" not in kube.run("get", "releaserollouts"))
